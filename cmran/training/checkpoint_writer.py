"""Write the files of an epoch in a background thread while the next epoch trains."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from cmran.config import RunConfig
from cmran.model.checkpoints import published_name, published_state, save
from cmran.training.run_dir import EpochRecord, write_epochs_csv


class AsyncCheckpointWriter:
    """Runs one write at a time in a background thread, then calls back in the training thread.

    It is a context manager: at its end the last write has completed, however the training ended.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "cmran-save")
        self._pending: tuple[Future[None], Callable[[], None] | None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._thread:
            # After Ctrl-C the write completes, but the callback is not called: the user wants to stop.
            if kind is None or issubclass(kind, Exception):
                self.finish()

    def start(self, write: Callable[[], None], on_written: Callable[[], None] | None) -> None:
        """Start a write. The previous one must be finished."""
        self._pending = self._thread.submit(write), on_written

    def poll(self) -> None:
        """Call back if the write has completed."""
        if self._pending is not None and self._pending[0].done():
            self.finish()

    def finish(self) -> None:
        """Wait for the write, then call back. Raises the exceptions of both."""
        if self._pending is not None:
            (written, on_written), self._pending = self._pending, None
            written.result()
            if on_written is not None:
                on_written()


def write_epoch(
    out: Path,
    config: RunConfig,
    history: list[EpochRecord],
    epoch_state: dict[str, Any],
    resume_state: dict[str, Any],
) -> None:
    """Write last.pt, epochs.csv and, after the best epoch so far, best.pt and its published form.

    Args:
        out: The run directory.
        config: Settings of the run.
        history: All epochs so far.
        epoch_state: Weights and provenance of the last epoch, the content of best.pt.
        resume_state: What last.pt holds besides, to resume the run.
    """
    record = history[-1]
    # best.pt is first: if the process is killed in between, the resumed run repeats this epoch and writes it again.
    if record.is_best:
        assert record.best_accuracy is not None
        save(out / "best.pt", epoch_state)
        published = out / published_name(record.epoch, record.best_accuracy)
        if weights := published_state(epoch_state["model"], config.model):
            save(published, weights)
        for older in out.glob("model_epoch_*_best_model.pth.tar"):
            if older != published:
                older.unlink()
    save(out / "last.pt", epoch_state | resume_state)
    write_epochs_csv(out, history, config.train.selection_split)


def copy_to_host(state: Any) -> Any:
    """Copy nested dictionaries and lists with all their tensors to the CPU."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: copy_to_host(value) for key, value in state.items()}
    return [copy_to_host(value) for value in state] if isinstance(state, list) else state
