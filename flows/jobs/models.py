"""Finding a trained model by what a user has of it: a run's folder, a checkpoint file, or the id of an MLflow run."""

import contextlib
import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmran.config import Features, InitRecord, Mode, Precision, RunConfig, SelectionSplit, TrainConfig, parse
from cmran.errors import CmranError
from cmran.utils.files import what_is_at

if TYPE_CHECKING:
    from cmran.data.dataset import FeatureFolder
    from cmran.model.network import CMRAN
    from cmran.training.run_dir import InitialWeights


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
    file: Path
    # The checkpoint.
    version: str | None = None
    # models:/NAME/VERSION, where a registered model was named.
    init: InitRecord | None = None
    # Source of the weights that its training started from; None: they were random, or it is not known.

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
        if self.init is not None:
            notes.append(init_note(self.init))
        return notes

    def init_known(self) -> dict[str, str]:
        """What is known of the weights that its training started from, as tags and metadata of a release."""
        if self.init is None:
            return {}
        known = self.init.model_dump(mode="json", exclude_none=True)
        return {key: json.dumps(value) if isinstance(value, bool) else str(value) for key, value in known.items()}

    def check_fits(self, folder: "FeatureFolder") -> None:
        """Raises CmranError where the folder's feature widths are not the model's."""
        from cmran.training.inference import check_fits

        config = self.config or RunConfig(recipe="published", model=self.model.config, train=TrainConfig())
        check_fits(config, folder)


def init_note(init: InitRecord) -> str:
    """One line about the initial weights of a training."""
    start = f"Initialized from {init.source} (SHA-256 {init.sha256[:12]})"
    if init.selected_on_test:
        return (
            f"**{start}, which was, or may have been, selected on the test split**: a test score may be too high, for"
            " comparison only."
        )
    return f"{start}."


@contextlib.contextmanager
def find_model(name: str, mode: Mode | None = None) -> Iterator[FoundModel]:
    """The model that `name` means: a run directory, best.pt, last.pt, a published .pth.tar, an MLflow run's id, or a
    registered model.

    A registered model (models:/NAME@ALIAS, models:/NAME/VERSION) leads to the checkpoint of the run that trained it.
    A published-format file with the weights of the best.pt beside it is that run's model. The weights of a published
    checkpoint tell its mode; `mode` refuses another one. What was downloaded is removed when
    the block ends. Raises CmranError: nothing there, damaged, of another mode.
    """
    from cmran.model.checkpoints import load_model

    with contextlib.ExitStack() as stack:
        path, run_id, version, exported = Path(name), None, None, None
        if name.startswith("models:"):
            from cmran import tracking

            resolved = tracking.resolve_model(name)
            version, exported, run_id = f"models:/{resolved.name}/{resolved.version}", resolved.path, resolved.run_id
            if run_id is None:
                raise CmranError(f"{name}: does not name the run that trained it: name a run directory or a checkpoint")
        elif (found := what_is_at(path)) not in ("a file", "a folder"):
            if not re.fullmatch("[0-9a-f]{32}", name):
                raise CmranError(
                    f"{name}: found {found} there, and no id of an MLflow run (32 hex digits): name a run's folder, "
                    "its best.pt, a published .pth.tar, an MLflow run or models:/NAME@ALIAS"
                )
            run_id = name
        if run_id is not None:
            from cmran import tracking

            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cmran-")))
            try:
                path = tracking.checkpoint_of_run(run_id, folder)
            except tracking.TrackingError:
                raise
            except CmranError as error:
                if version is None:
                    raise
                raise CmranError(f"{name}: there is no checkpoint of it: {error}") from error
            with contextlib.suppress(CmranError) if version else contextlib.nullcontext():
                tracking.run_artifact(run_id, "metrics.json", path.parent)
        file = path / "best.pt" if path.is_dir() else path
        model, state = load_model(file, mode)
        if file.name.endswith(".pth.tar"):
            state = _run_beside(file, model) or state
        if exported is not None:
            _check_exported(name, exported, model)
        ours = "config" in state
        grid = state.get("grid", PUBLISHED_GRID)
        init = state.get("init")
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
            file=file,
            version=version,
            init=None if init is None else parse(InitRecord, init, f"{file}: init"),
        )


def initial_weights(name: str, config: RunConfig) -> "InitialWeights":
    """The weights of the model that `name` means (as `find_model`), to start a training with these settings from.

    A checkpoint's own numbers: what float64 holds is not rounded for a training in float64. Raises CmranError as
    `find_model`.
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
            sha256=hashlib.sha256(found.file.read_bytes()).hexdigest(),
            run_id=found.run_id,
            version=found.version,
            fingerprint=found.fingerprint,
            epoch=state.get("epoch"),
            selected_on_test=found.selection_split != "val" or (found.init is not None and found.init.selected_on_test),
        )
        return InitialWeights(model=found.model.config, weights=weights, record=record)


def _check_exported(name: str, exported: Path, model: "CMRAN") -> None:
    """Raises CmranError where the checkpoint of a registered model's run is not what was registered."""
    from serving.parity import check_parity

    if failures := check_parity(exported, model).failures:
        raise CmranError(
            f"{name}: the checkpoint of the run that trained it is not the registered model ({failures[0]}): the run"
            " was continued since; name a checkpoint"
        )


def _run_beside(file: Path, model: "CMRAN") -> dict[str, Any] | None:
    """What best.pt beside a published-format file says, where both hold the same weights; None where they do not."""
    import torch

    from cmran.model.checkpoints import load_model

    best = file.with_name("best.pt")
    if what_is_at(best) != "a file":
        return None
    try:
        other, state = load_model(best)
    except CmranError as error:
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
