"""Runs: params, metrics, artifacts, data lineage, system metrics, and what can be read back of them."""

import contextlib
import getpass
import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from cmran.errors import CmranError, TrackingError
from cmran.tracking.artifacts import located
from cmran.tracking.store import (
    artifact_root,
    connected_client,
    mlflow_module,
    one_line,
    shown_tracking_uri,
    tracking_errors,
    tracking_uri,
)
from cmran.utils.uris import redact, sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from pydantic import BaseModel

log = logging.getLogger(__name__)

PIPELINE_EXPERIMENT = "cmran-pipeline"
"""Experiment of the runs that only hold a pipeline together."""

SYSTEM_METRICS_EVERY_S = 5
"""Sampling of processor, memory, disk, network and GPU (MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL changes it)."""

PIPELINE_TAG = "cmran.pipeline_run_id"
"""Tag of every run of a pipeline, its own included: the id of the pipeline's run. Children have it of their parent."""

MAX_PARAMS = 100
MAX_METRICS = 1000
MAX_VALUE = 5000
"""MLflow's bounds: params or tags a call, metrics a call, and (a little under it) characters a value."""

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Epoch(Protocol):
    """What `Run.log_epoch` takes from a `cmran.training.run_dir.EpochRecord`."""

    @property
    def epoch(self) -> int:
        """1-based number of the epoch."""

    @property
    def lr(self) -> float:
        """Learning rate of the epoch."""

    @property
    def train_loss(self) -> float:
        """Mean loss over the epoch."""

    @property
    def train_accuracy(self) -> float | None:
        """Segment accuracy in %, if known."""

    @property
    def grad_norm(self) -> float:
        """Mean global gradient norm before clipping."""

    @property
    def val(self) -> Mapping[str, Any] | None:
        """Evaluation on val after the epoch; None where there was none."""

    @property
    def test(self) -> Mapping[str, Any] | None:
        """Evaluation on test after the epoch, only where the epoch is selected on test."""

    @property
    def seconds(self) -> float:
        """Wall time of the epoch."""


@dataclass(frozen=True)
class RunInfo:
    """A run as the tracking store knows it."""

    run_id: str
    experiment_id: str
    experiment: str
    name: str
    status: str
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]


@dataclass(frozen=True)
class GitState:
    """Commit of the source tree that this package was imported from, and whether a tracked file differed from it."""

    commit: str
    dirty: bool


def experiment_of(mode: str) -> str:
    """Name of the experiment of a mode: `cmran-full` or `cmran-weak`. The registered model has the same name."""
    return f"cmran-{mode}"


class Run:
    """One MLflow run, addressed by its id: usable from any thread.

    Every method raises TrackingError where the tracking store fails.
    """

    def __init__(self, run_id: str, experiment_id: str, client: "MlflowClient") -> None:
        self.run_id, self.experiment_id = run_id, experiment_id
        self._client = client
        self._monitor: Any = None

    def log_params(self, values: "BaseModel | Mapping[str, Any]", prefix: str = "cfg.") -> None:
        """Log nested settings as flat params (`cfg.train.lr`); lists become JSON, long values are cut.

        A param cannot change in MLflow: on a resumed run a value that differs goes into the tag `changed.<param>`.
        """
        plain = values if isinstance(values, Mapping) else values.model_dump(mode="json")
        flat = {f"{prefix}{key}": as_text(value) for key, value in _flatten(plain)}
        entities = mlflow_module().entities
        with tracking_errors("log params"):
            known = self._client.get_run(self.run_id).data.params
            new = [entities.Param(key, value) for key, value in flat.items() if key not in known]
            for start in range(0, len(new), MAX_PARAMS):
                self._client.log_batch(self.run_id, params=new[start : start + MAX_PARAMS])
        self.set_tags({f"changed.{key}": value for key, value in flat.items() if known.get(key, value) != value})

    def log_metrics(self, values: Mapping[str, float | None], step: int = 0) -> None:
        """Log numbers under their names at `step`; None is left out."""
        Metric, now = mlflow_module().entities.Metric, int(time.time() * 1000)
        metrics = [Metric(key, float(value), now, step) for key, value in values.items() if value is not None]
        with tracking_errors("log metrics"):
            for start in range(0, len(metrics), MAX_METRICS):
                self._client.log_batch(self.run_id, metrics=metrics[start : start + MAX_METRICS])

    def log_epoch(self, record: Epoch) -> None:
        """Log one epoch of training: `train.*` and, where it was evaluated, `val.*` at step = epoch (1-based).

        Test figures exist only where the published rule selects on them: they are `test_selected_on_test.*`.
        """
        train = {
            "train.loss": record.train_loss,
            "train.accuracy": record.train_accuracy,
            "train.grad_norm": record.grad_norm,
            "train.lr": record.lr,
            "train.seconds": record.seconds,
        }
        evaluated = numbers(record.val or {}, "val.") | numbers(record.test or {}, "test_selected_on_test.")
        self.log_metrics(train | evaluated, step=record.epoch)

    def log_artifact(self, path: Path, artifact_path: str | None = None) -> None:
        """Copy the file `path`, or all that a folder holds, to the run's artifacts under `artifact_path`."""
        with tracking_errors(f"log {path.name}"):
            if path.is_dir():
                self._client.log_artifacts(self.run_id, str(path), artifact_path)
            else:
                self._client.log_artifact(self.run_id, str(path), artifact_path)

    def log_text(self, text: str, name: str) -> None:
        """Store `text` as the artifact `name`."""
        with tracking_errors(f"log {name}"):
            self._client.log_text(self.run_id, redact(text), name)

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Set tags; None is left out, long values are cut."""
        RunTag = mlflow_module().entities.RunTag
        entries = [RunTag(key, as_text(value)) for key, value in tags.items() if value is not None]
        with tracking_errors("set tags"):
            for start in range(0, len(entries), MAX_PARAMS):
                self._client.log_batch(self.run_id, tags=entries[start : start + MAX_PARAMS])

    def log_dataset(self, path: Path, fingerprint: str, context: str) -> None:
        """Record the data folder `path` by its fingerprint as an input of the run, without reading it.

        `context` says what for: "training", "evaluation", "inference".
        """
        mlflow, folder = mlflow_module(), path.resolve()
        with tracking_errors("log the data set"):
            source = mlflow_module("mlflow.data.sources").LocalArtifactDatasetSource(str(folder))
            dataset = mlflow_module("mlflow.data.meta_dataset").MetaDataset(
                source, name=folder.name, digest=fingerprint
            )
            tag = mlflow.entities.InputTag("mlflow.data.context", context)
            entry = mlflow.entities.DatasetInput(dataset=dataset._to_mlflow_entity(), tags=[tag])
            self._client.log_inputs(self.run_id, datasets=[entry])
        self.set_tags({"cmran.fingerprint": fingerprint})

    def finish(self, status: Status = "FINISHED") -> None:
        """End the run. System metrics stop first."""
        self._stop_monitor()
        with tracking_errors("end the run"):
            self._client.set_terminated(self.run_id, status)

    def _start_monitor(self) -> None:
        if os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "").lower() == "false":
            return
        with tracking_errors("start system metrics"):
            self._monitor = mlflow_module("mlflow.system_metrics.system_metrics_monitor").SystemMetricsMonitor(
                self.run_id, sampling_interval=SYSTEM_METRICS_EVERY_S, resume_logging=True, tracking_uri=tracking_uri()
            )
            self._monitor.start()

    def _stop_monitor(self) -> None:
        monitor, self._monitor = self._monitor, None
        if monitor is None:
            return
        # finish() only logs its errors. The last sample is ours: a run shorter than the interval would have none.
        monitor.finish()
        try:
            monitor.collect_metrics()
            monitor.publish_metrics(monitor.aggregate_metrics())
            monitor.mlflow_logger.flush()
        except Exception as error:
            log.warning("the last system metrics of run %s are missing: %s", self.run_id, one_line(error))


@contextlib.contextmanager
def start_run(
    *,
    experiment: str,
    name: str,
    parent_run_id: str | None = None,
    run_id: str | None = None,
    tags: Mapping[str, object] | None = None,
    system_metrics: bool = True,
    killed_by: tuple[type[BaseException], ...] = (),
) -> Iterator[Run]:
    """A run that is RUNNING within the block and ended after it.

    With `run_id` that run goes on (a resumed run, or one that `mlflow run` opened): it keeps its name, its experiment
    and its past. Otherwise a new one is made in `experiment`, which is created where it is missing.

    It ends as FINISHED; as FAILED on an exception; as KILLED on an interrupt, a SystemExit or one of `killed_by`. The
    exception goes on either way. After a kill -9 it stays RUNNING until it is resumed.

    Raises CmranError: unknown or deleted run, deleted experiment. TrackingError: the store fails.
    """
    client = connected_client(create=True)
    run: Run | None = None
    try:
        # An interrupt that comes in here is raised at the block's end.
        with tracking_errors("start a run"):
            if run_id is None:
                run = _new_run(client, experiment, name, parent_run_id)
            else:
                known = known_run(client, run_id)
                if parent_run_id is not None:
                    known.set_tags(_child_tags(client, parent_run_id))
                client.update_run(run_id, status="RUNNING")
                run = known
        run.set_tags(_source_tags() | dict(tags or {}))
        if system_metrics:
            run._start_monitor()
        yield run
    except BaseException as error:
        if run is None:
            raise
        killed = not isinstance(error, Exception) or isinstance(error, killed_by)
        try:
            run.finish("KILLED" if killed else "FAILED")
        except TrackingError as second:
            # The first error is what the user must see.
            log.warning("%s", second)
        raise
    run.finish("FINISHED")


def open_run(run_id: str) -> Run:
    """A run to log to, whatever its status, without starting or ending it. Raises CmranError if it is unknown."""
    client = connected_client()
    with tracking_errors("open a run"):
        return known_run(client, run_id)


def check_adopted_run(run_id: str) -> None:
    """Raises CmranError, which names the variable, unless MLFLOW_RUN_ID named a run that can be logged to."""
    given = f"MLFLOW_RUN_ID={run_id} (set by `mlflow run`, or left over)"
    try:
        client = connected_client()
    except CmranError as error:
        raise CmranError(
            f"{given} names an MLflow run, but {error}; or unset MLFLOW_RUN_ID for a run of its own"
        ) from error
    with tracking_errors(f"look up the run of {given}"):
        run = _find_run(client, run_id)
    if run is None:
        raise CmranError(
            f"{given} names a run that is unknown or deleted at {shown_tracking_uri()}: "
            "unset MLFLOW_RUN_ID for a run of its own, or correct MLFLOW_TRACKING_URI"
        )
    log.info("working in the MLflow run %s (%s), which MLFLOW_RUN_ID names", run.info.run_name, run_id)


def _new_run(client: "MlflowClient", experiment: str, name: str, parent_run_id: str | None) -> Run:
    experiment_id = _experiment_id(client, experiment)
    tags = {"mlflow.source.name": sys.argv[0] or "python", "mlflow.source.type": "LOCAL"}
    # No name for this user id, as in some containers.
    with contextlib.suppress(KeyError, OSError):
        tags["mlflow.user"] = getpass.getuser()
    if parent_run_id is not None:
        tags |= _child_tags(client, parent_run_id)
    run = client.create_run(experiment_id, tags=tags, run_name=name)
    return Run(run.info.run_id, experiment_id, client)


def _child_tags(client: "MlflowClient", parent_run_id: str) -> dict[str, str]:
    """What ties a run to its parent, and to the pipeline that this belongs to. CmranError where there is no parent."""
    known_run(client, parent_run_id)
    pipeline = client.get_run(parent_run_id).data.tags.get(PIPELINE_TAG)
    return {"mlflow.parentRunId": parent_run_id, **({PIPELINE_TAG: pipeline} if pipeline else {})}


def known_run(client: "MlflowClient", run_id: str) -> Run:
    """The run, if it exists and is not deleted. Raises CmranError otherwise."""
    run = _find_run(client, run_id)
    if run is None:
        raise CmranError(
            f"MLflow run {run_id!r} is unknown or deleted at {shown_tracking_uri()}: "
            "give the id of a run there, or correct MLFLOW_TRACKING_URI"
        )
    return Run(run_id, run.info.experiment_id, client)


def _find_run(client: "MlflowClient", run_id: str) -> Any:
    """The run, or None if there is none or it is deleted."""
    try:
        run = client.get_run(run_id)
    except mlflow_module().exceptions.MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def _experiment_id(client: "MlflowClient", name: str) -> str:
    exceptions = mlflow_module().exceptions
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        database = sqlite_path(tracking_uri())
        location = None if database is None else (artifact_root(database) / name).as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except exceptions.MlflowException as error:
            # Another process was quicker.
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise error
    if experiment.lifecycle_stage != "active":
        raise CmranError(
            f"MLflow experiment {name!r} is deleted: bring it back with "
            f"`mlflow experiments restore --experiment-id {experiment.experiment_id}`"
        )
    return str(experiment.experiment_id)


def run_exists(run_id: str) -> bool:
    """Whether the tracking store knows this run and it is not deleted."""
    client = connected_client()
    with tracking_errors(f"look up run {run_id}"):
        return _find_run(client, run_id) is not None


def run_info(run_id: str) -> RunInfo:
    """What the store knows about a run: tags, params and the last value of each metric. CmranError if unknown."""
    client = connected_client()
    with tracking_errors(f"read run {run_id}"):
        known_run(client, run_id)
        run = client.get_run(run_id)
        experiment = client.get_experiment(run.info.experiment_id)
    return RunInfo(
        run_id=run_id,
        experiment_id=run.info.experiment_id,
        experiment=experiment.name,
        name=run.info.run_name or "",
        status=run.info.status,
        tags=dict(run.data.tags),
        params=dict(run.data.params),
        metrics=dict(run.data.metrics),
    )


def logged_epochs(run_id: str) -> int:
    """The last epoch that `Run.log_epoch` logged to this run; 0 for none. For filling in after a resume."""
    client = connected_client()
    with tracking_errors(f"read the epochs of run {run_id}"):
        return max((metric.step for metric in client.get_metric_history(run_id, "train.loss")), default=0)


def run_artifact(run_id: str, path: str, folder: Path) -> Path:
    """Download one artifact of a run into `folder` (made if missing). CmranError: no such run or artifact."""
    client = connected_client()
    with tracking_errors(f"look up run {run_id}"):
        known_run(client, run_id)
        parent = path.rpartition("/")[0]
        if path not in {entry.path for entry in client.list_artifacts(run_id, parent or None)}:
            root = located(client.get_run(run_id).info.artifact_uri)
            gone = f" ({root} is not there)" if root is not None and not root.exists() else ""
            raise CmranError(
                f"MLflow run {run_id} has no artifact {path!r}{gone}: "
                "give a run that was trained to its end, or the file itself"
            )
    with tracking_errors(f"download {path} of run {run_id}"):
        folder.mkdir(parents=True, exist_ok=True)
        return Path(client.download_artifacts(run_id, path, str(folder)))


def checkpoint_of_run(run_id: str, folder: Path) -> Path:
    """Download the best checkpoint of a training run into `folder`. CmranError: no such run, or it logged none."""
    return run_artifact(run_id, "checkpoint/best.pt", folder)


def numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float | None]:
    """The figures of an evaluation that MLflow can hold: numbers, pairs as `.low` and `.high`, nested ones dotted.

    Tables and matrices are left out (they are artifacts).
    """
    found: dict[str, float | None] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= numbers(value, f"{name}.")
        elif isinstance(value, Sequence) and len(value) == 2 and all(_is_number(part) for part in value):
            found |= {f"{name}.low": float(value[0]), f"{name}.high": float(value[1])}
        elif _is_number(value):
            found[name] = float(value)
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def as_text(value: object) -> str:
    """`value` as a param or tag: lists as JSON, without passwords, cut to what MLflow takes."""
    text = redact(json.dumps(value) if isinstance(value, (list, tuple)) else str(value))
    return text if len(text) <= MAX_VALUE else text[: MAX_VALUE - 3] + "..."


def _source_tags() -> dict[str, object]:
    state = git_state()
    if state is None:
        return {}
    return {"mlflow.source.git.commit": state.commit, "cmran.git_dirty": str(state.dirty).lower()}


@cache
def git_state() -> GitState | None:
    """Commit of the source tree; None where the package is installed elsewhere than in its repository.

    Read once: what this process imported does not change when the tree does. Untracked files do not count as changes:
    data, runs and exported models lie in the tree of everybody who works there.
    """
    return _git_state(Path(__file__).resolve())


def _git_state(here: Path) -> GitState | None:
    """Commit of the repository that tracks the file `here`; None where none does."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()

    try:
        # A package inside a virtual environment can lie in the folder of a repository it does not belong to.
        git("ls-files", "--error-unmatch", here.name)
        return GitState(
            commit=git("rev-parse", "HEAD"), dirty=bool(git("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
