"""Find a trained model by the name that a user gives: a run directory, a checkpoint, an MLflow run or a model URI."""

import contextlib
import json
import logging
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmran.config import Features, InitRecord, Mode, Precision, RunConfig, SelectionSplit, TrainConfig, parse
from cmran.errors import CheckpointError, CmranError, TrackingError
from cmran.utils.files import sha256_file, what_is_at

if TYPE_CHECKING:
    from cmran.data.dataset import FeatureFolder
    from cmran.model.network import CMRAN
    from cmran.training.run_dir import InitialWeights


log = logging.getLogger(__name__)

RUN_FILE = "run.json"
"""File in a run directory that names the MLflow run of the training."""
PUBLISHED_SEGMENTS, PUBLISHED_GRID = 10, (7, 7)
"""T and (H, W) of the published features. A published checkpoint does not state them."""


@dataclass(frozen=True, kw_only=True)
class FoundModel:
    """A network with the provenance of its weights."""

    name: str
    """The model as the user named it."""
    model: "CMRAN"
    """The network."""
    config: RunConfig | None
    """Settings of the training; `None` for a published checkpoint."""
    run_id: str | None
    """MLflow run of the training, if it is known. The store in use may not have it."""
    fingerprint: str | None
    """Fingerprint of the training data; `None` for a published checkpoint."""
    data: Path | None
    """Data folder of the training, at that time."""
    segments: int
    """T of the training data."""
    grid: tuple[int, int]
    """(H, W) of the training data."""
    val_accuracy: float | None
    """Accuracy on val of the checkpoint's epoch, measured in training, in %."""
    metrics: dict[str, Any] | None
    """metrics.json of the training, if it was found."""
    unfinished: bool
    """Whether the training is not finished, according to its run directory."""
    file: Path
    """The checkpoint."""
    version: str | None = None
    """models:/NAME/VERSION if the user named a registered model."""
    init: InitRecord | None = None
    """Source of the weights that the training started from; `None`: they were random, or it is unknown."""

    @property
    def mode(self) -> Mode:
        """Supervised ("full") or weakly supervised ("weak")."""
        return self.model.config.mode

    @property
    def precision(self) -> Precision:
        """Precision of the training; float32 for a published checkpoint, because float64 predicts no better."""
        return "float32" if self.config is None else self.config.train.precision

    @property
    def features(self) -> Features:
        """The kind of visual maps that the training read."""
        return "stored" if self.config is None else self.config.train.effective_features

    @property
    def selection_split(self) -> SelectionSplit:
        """The split on which the epoch was selected; unknown for a published checkpoint without its run."""
        return "unknown" if self.config is None else self.config.train.selection_split

    def notes(self) -> list[str]:
        """Return the notes that every report of this model must show."""
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
        if self.init is not None:
            notes.append(init_note(self.init))
        return notes

    def init_known(self) -> dict[str, str]:
        """Return the source of the initial weights as tags and metadata of a release."""
        if self.init is None:
            return {}
        known = self.init.model_dump(mode="json", exclude_none=True)
        return {key: json.dumps(value) if isinstance(value, bool) else str(value) for key, value in known.items()}

    def check_fits(self, folder: "FeatureFolder") -> None:
        """Raise CmranError if the feature widths of the folder differ from those of the model."""
        from cmran.training.inference import check_fits

        config = self.config or RunConfig(recipe="published", model=self.model.config, train=TrainConfig())
        check_fits(config, folder)


def init_note(init: InitRecord) -> str:
    """Return one line about the initial weights of a training."""
    start = f"Initialized from {init.source} (SHA-256 {init.sha256[:12]})"
    if init.selected_on_test:
        return (
            f"**{start}, which was, or may have been, selected on the test split**: a test score may be too high, for"
            " comparison only."
        )
    return f"{start}."


@contextlib.contextmanager
def find_model(name: str, mode: Mode | None = None) -> Iterator[FoundModel]:
    """Find and load a trained model. Downloaded files are removed when the block ends.

    Args:
        name: A run directory, best.pt, last.pt, a published .pth.tar, the id of an MLflow run, or the URI of a
            registered model (models:/NAME@ALIAS, models:/NAME/VERSION), which stands for the checkpoint of the run that
            trained it. A file in the published format with the weights of a best.pt beside it is the model of that run.
        mode: The expected mode. Default: that of the weights.

    Raises:
        CheckpointError: There is no such model, its file is damaged, or it has another mode.
        TrackingError: The MLflow store failed.
    """
    from cmran.model.checkpoints import load_model

    with contextlib.ExitStack() as stack:
        path, run_id, version, exported = Path(name), None, None, None
        if name.startswith("models:"):
            from cmran import tracking

            resolved = tracking.resolve_model(name)
            version, exported, run_id = f"models:/{resolved.name}/{resolved.version}", resolved.path, resolved.run_id
            if run_id is None:
                raise CheckpointError(
                    f"{name}: does not name the run that trained it", hint="name a run directory or a checkpoint"
                )
        elif (found := what_is_at(path)) not in ("a file", "a folder"):
            if not re.fullmatch("[0-9a-f]{32}", name):
                raise CheckpointError(
                    f"{name}: found {found} there, and the name is not the id of an MLflow run (32 hex digits)",
                    hint="name a run directory, its best.pt, a published .pth.tar, an MLflow run or models:/NAME@ALIAS",
                )
            run_id = name
        if run_id is not None:
            from cmran import tracking

            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cmran-")))
            try:
                path = tracking.checkpoint_of_run(run_id, folder)
            except TrackingError:
                raise
            except CmranError as error:
                if version is None:
                    raise
                raise CheckpointError(f"{name}: there is no checkpoint of it: {error}") from error
            with contextlib.suppress(CmranError) if version else contextlib.nullcontext():
                tracking.run_artifact(run_id, "metrics.json", path.parent)
        file = path / "best.pt" if path.is_dir() else path
        model, state = load_model(file, mode)
        if file.name.endswith(".pth.tar"):
            state = _run_beside(file, model) or state
        if exported is not None:
            _check_exported(name, exported, model)
        trained_here = "config" in state
        grid = state.get("grid", PUBLISHED_GRID)
        init = state.get("init")
        yield FoundModel(
            name=name,
            model=model,
            config=RunConfig.model_validate(state["config"]) if trained_here else None,
            # The run directory comes first: a resumed training may have had to start a new run.
            run_id=run_id or (run_of_folder(file.parent) if trained_here else None) or state.get("run_id"),
            fingerprint=state.get("fingerprint"),
            data=Path(state["data"]) if "data" in state else None,
            segments=state.get("segments", PUBLISHED_SEGMENTS),
            grid=(grid[0], grid[1]),
            val_accuracy=state.get("val_accuracy"),
            metrics=_metrics_of(file, state) if trained_here else None,
            unfinished=(file.parent / "last.pt").exists() and not (file.parent / "metrics.json").exists(),
            file=file,
            version=version,
            init=None if init is None else parse(InitRecord, init, f"{file}: init"),
        )


def initial_weights(name: str, config: RunConfig) -> "InitialWeights":
    """Load weights from which a training starts.

    They have the precision of the checkpoint: weights in float64 are not rounded for a training in float64.

    Args:
        name: A trained model, as for `find_model`.
        config: Settings of the new training.

    Raises:
        CmranError: As `find_model`.
    """
    import torch

    from cmran.model.checkpoints import import_published, load
    from cmran.training.run_dir import InitialWeights
    from cmran.training.step import WEIGHTS

    with find_model(name) as found:
        state: dict[str, Any] = {}
        if found.file.name.endswith(".pth.tar"):
            weights = import_published(
                found.file, found.mode, WEIGHTS.get(config.train.precision, torch.float32)
            ).state_dict()
        else:
            state = load(found.file)
            weights = state["model"]
        record = InitRecord(
            source=name,
            sha256=sha256_file(found.file),
            run_id=found.run_id,
            version=found.version,
            fingerprint=found.fingerprint,
            epoch=state.get("epoch"),
            selected_on_test=found.selection_split != "val" or (found.init is not None and found.init.selected_on_test),
        )
        return InitialWeights(model=found.model.config, weights=weights, record=record)


def _check_exported(name: str, exported: Path, model: "CMRAN") -> None:
    """Raise CheckpointError if the checkpoint of a registered model's run is not the registered model."""
    from serving.parity import check_parity

    if failures := check_parity(exported, model).failures:
        raise CheckpointError(
            f"{name}: the checkpoint of the run that trained it is not the registered model ({failures[0]}):"
            " the run was continued later",
            hint="name a checkpoint",
        )


def _run_beside(file: Path, model: "CMRAN") -> dict[str, Any] | None:
    """The state of the best.pt beside a published-format file if both have the same weights, else None."""
    import torch

    from cmran.model.checkpoints import load_model

    best = file.with_name("best.pt")
    if what_is_at(best) != "a file":
        return None
    try:
        other, state = load_model(best)
    except CmranError as error:
        log.warning(
            "%s: cannot be compared with best.pt of its run directory, so that its selection split is unknown: %s",
            file,
            error,
        )
        return None
    weights, others = model.state_dict(), other.state_dict()
    same = weights.keys() == others.keys() and all(
        torch.equal(value.float(), others[key].float()) for key, value in weights.items()
    )
    if not same or other.config.mode != model.config.mode:
        log.warning("%s: its weights differ from those of %s, so that its selection split is unknown", file, best.name)
        return None
    return state


def run_of_folder(folder: Path) -> str | None:
    """Return the MLflow run of a run directory; `None` if it names none."""
    run_id = (_read(folder / RUN_FILE) or {}).get("run_id")
    return run_id if isinstance(run_id, str) else None


def _metrics_of(file: Path, state: dict[str, Any]) -> dict[str, Any] | None:
    """metrics.json beside the checkpoint, if it describes the same epoch and data."""
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
