"""Finding a trained model by what a user has of it: a run's folder, a checkpoint file, or the id of an MLflow run."""

import contextlib
import json
import logging
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmran.config import Features, Mode, Precision, RunConfig, SelectionSplit, TrainConfig
from cmran.errors import UserError
from cmran.files import what_is_at

if TYPE_CHECKING:
    from cmran.data.features import FeatureFolder
    from cmran.model import CMRAN

log = logging.getLogger(__name__)

RUN_FILE = "run.json"
"""In a training's folder: the MLflow run that it is logged to."""

PUBLISHED_SEGMENTS, PUBLISHED_GRID = 10, (7, 7)
"""Segments and visual cells of the published features, which a published checkpoint does not tell."""


@dataclass(frozen=True, kw_only=True)
class FoundModel:
    """A network and what is known of its training."""

    name: str
    # As the user named it.
    model: "CMRAN"
    config: RunConfig | None
    # None: a published checkpoint.
    run_id: str | None
    # MLflow run of the training, as far as known; it may be unknown to the store in use.
    fingerprint: str | None
    data: Path | None
    # The folder it was trained on, where it lay then.
    segments: int
    grid: tuple[int, int]
    val_accuracy: float | None
    # In %, of the checkpoint's epoch, measured in training.
    metrics: dict[str, Any] | None
    # metrics.json of the training, where it was at hand.
    unfinished: bool
    # The training's folder says so.

    @property
    def mode(self) -> Mode:
        """Full or weak."""
        return self.model.config.mode

    @property
    def precision(self) -> Precision:
        """As it was trained; float32 for a published checkpoint, whose float64 is no better for an answer."""
        return "float32" if self.config is None else self.config.train.precision

    @property
    def features(self) -> Features:
        """The visual maps it was trained on."""
        return "stored" if self.config is None else self.config.train.effective_features

    @property
    def selection_split(self) -> SelectionSplit:
        """The split that picked the epoch; a published-format file without its run does not say."""
        return "unknown" if self.config is None else self.config.train.selection_split

    def notes(self) -> list[str]:
        """What must stand beside every figure of this model."""
        notes = []
        if self.unfinished:
            notes.append("**Its training is not finished**: this is the best epoch so far.")
        if self.selection_split == "test":
            notes.append("**Its epoch was selected on the test split**: a test score is too high, for comparison only.")
        elif self.selection_split == "unknown":
            notes.append(
                "**Its selection split is unknown**: published checkpoints were selected on test, which makes a test "
                "score too high."
            )
        return notes

    def check_fits(self, folder: "FeatureFolder") -> None:
        """Raises UserError where the folder's feature widths are not the model's."""
        from cmran.training import check_fits

        config = self.config or RunConfig(recipe="published", model=self.model.config, train=TrainConfig())
        check_fits(config, folder)


@contextlib.contextmanager
def find_model(name: str, mode: Mode | None = None) -> Iterator[FoundModel]:
    """The model that `name` means: a run's folder, best.pt, last.pt, a published .pth.tar, or an MLflow run's id.

    A published-format file with the weights of the best.pt beside it is that run's model. The weights of a published
    checkpoint tell its mode; `mode` refuses another one. What was downloaded is removed when
    the block ends. Raises UserError: nothing there, damaged, of another mode.
    """
    from cmran.checkpoints import load_model

    with contextlib.ExitStack() as stack:
        path, run_id = Path(name), None
        if (found := what_is_at(path)) not in ("a file", "a folder"):
            if not re.fullmatch("[0-9a-f]{32}", name):
                raise UserError(
                    f"{name}: found {found} there, and no id of an MLflow run (32 hex digits): name a run's folder, "
                    "its best.pt, a published .pth.tar or an MLflow run"
                )
            from cmran import tracking

            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cmran-")))
            run_id = name
            path = tracking.checkpoint_of_run(run_id, folder)
            tracking.run_artifact(run_id, "metrics.json", path.parent)
        file = path / "best.pt" if path.is_dir() else path
        model, state = load_model(file, mode)
        if file.name.endswith(".pth.tar"):
            state = _run_beside(file, model) or state
        ours = "config" in state
        grid = state.get("grid", PUBLISHED_GRID)
        yield FoundModel(
            name=name,
            model=model,
            config=RunConfig.model_validate(state["config"]) if ours else None,
            # The folder knows best: a resumed training may have had to begin a new run.
            run_id=run_id or (run_of_folder(file.parent) if ours else None) or state.get("run_id"),
            fingerprint=state.get("fingerprint"),
            data=Path(state["data"]) if "data" in state else None,
            segments=state.get("segments", PUBLISHED_SEGMENTS),
            grid=(grid[0], grid[1]),
            val_accuracy=state.get("val_accuracy"),
            metrics=_metrics_of(file, state) if ours else None,
            unfinished=(file.parent / "last.pt").exists() and not (file.parent / "metrics.json").exists(),
        )


def _run_beside(file: Path, model: "CMRAN") -> dict[str, Any] | None:
    """What best.pt beside a published-format file says, where both hold the same weights; None where they do not."""
    import torch

    from cmran.checkpoints import load_model

    best = file.with_name("best.pt")
    if what_is_at(best) != "a file":
        return None
    try:
        other, state = load_model(best)
    except UserError as error:
        log.warning("%s: cannot be compared with the run it lies in, its selection split is unknown: %s", file, error)
        return None
    weights, others = model.state_dict(), other.state_dict()
    same = weights.keys() == others.keys() and all(
        torch.equal(value.float(), others[key].float()) for key, value in weights.items()
    )
    if not same or other.config.mode != model.config.mode:
        log.warning("%s: its weights are not those of %s: its selection split is unknown", file, best.name)
        return None
    return state


def run_of_folder(folder: Path) -> str | None:
    """The MLflow run that a training's folder names; None where it names none."""
    run_id = (_read(folder / RUN_FILE) or {}).get("run_id")
    return run_id if isinstance(run_id, str) else None


def _metrics_of(file: Path, state: dict[str, Any]) -> dict[str, Any] | None:
    """metrics.json beside the checkpoint, if it is about this very epoch and data."""
    found = _read(file.parent / "metrics.json")
    if found is None or (found.get("best_epoch"), found.get("fingerprint")) != (state["epoch"], state["fingerprint"]):
        return None
    return found


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
