"""MLflow runs: logging of params, metrics, artifacts, data lineage and system metrics, and reading them back."""

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
from typing import TYPE_CHECKING, Any, Literal

from cmran.errors import CheckpointError, CmranError, ConfigError, TrackingError
from cmran.tracking.artifacts import locate_artifacts
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

    from cmran.training.run_dir import EpochRecord

log = logging.getLogger(__name__)

PIPELINE_EXPERIMENT = "cmran-pipeline"
"""Experiment of the pipeline runs, which are the parents of the runs of their jobs."""

SYSTEM_METRICS_EVERY_S = 5
"""Sampling interval of CPU, memory, disk, network and GPU; MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL overrides it."""

PIPELINE_TAG = "cmran.pipeline_run_id"
"""Tag of every run of a pipeline: the id of the pipeline's run. Child runs inherit it."""

MAX_PARAMS = 100
"""MLflow's limit of params or tags per call."""

MAX_METRICS = 1000
"""MLflow's limit of metrics per call."""

MAX_VALUE = 5000
"""Longest param or tag in characters, slightly below MLflow's limit."""

Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class RunInfo:
    """A run as the tracking store knows it."""

    run_id: str
    """Id of the run."""
    experiment_id: str
    """Id of its experiment."""
    experiment: str
    """Name of its experiment."""
    name: str
    """Name of the run; empty without one."""
    status: str
    """RUNNING, FINISHED, FAILED or KILLED."""
    tags: dict[str, str]
    """All tags."""
    params: dict[str, str]
    """All params."""
    metrics: dict[str, float]
    """Last value of each metric."""


@dataclass(frozen=True)
class GitState:
    """State of the source tree that this package was imported from."""

    commit: str
    """Hash of the checked-out commit."""
    dirty: bool
    """Whether a tracked file differs from the commit."""


def experiment_of(mode: str) -> str:
    """Return the name of a mode's experiment and registered model: `cmran-full` or `cmran-weak`."""
    return f"cmran-{mode}"


class Run:
    """An MLflow run, identified by its id. It can be used from any thread.

    Every method raises TrackingError if the tracking store fails.
    """

    def __init__(self, run_id: str, experiment_id: str, client: "MlflowClient") -> None:
        self.run_id, self.experiment_id = run_id, experiment_id
        self._client = client
        self._monitor: Any = None

    def log_params(self, values: "BaseModel | Mapping[str, Any]", prefix: str = "cfg.") -> None:
        """Log nested settings as flat params, such as `cfg.train.lr`.

        Lists become JSON and long values are truncated. MLflow does not allow a param to change: if a resumed run has
        a different value, the new value becomes the tag `changed.<param>`.

        Args:
            values: The settings.
            prefix: Prefix of the param names.
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
        """Log numbers under their names at `step`, except those that are None."""
        Metric, now = mlflow_module().entities.Metric, int(time.time() * 1000)
        metrics = [Metric(key, float(value), now, step) for key, value in values.items() if value is not None]
        with tracking_errors("log metrics"):
            for start in range(0, len(metrics), MAX_METRICS):
                self._client.log_batch(self.run_id, metrics=metrics[start : start + MAX_METRICS])

    def log_epoch(self, record: "EpochRecord") -> None:
        """Log one epoch of training at step = epoch (1-based): `train.*` and, if it was evaluated, `val.*`.

        Only a run whose epoch is selected on test has scores on test; they are `test_selected_on_test.*`.
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
        """Copy the file `path`, or the content of a folder, to the run's artifacts under `artifact_path`."""
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
        """Set tags, except those that are None. Long values are truncated."""
        RunTag = mlflow_module().entities.RunTag
        entries = [RunTag(key, as_text(value)) for key, value in tags.items() if value is not None]
        with tracking_errors("set tags"):
            for start in range(0, len(entries), MAX_PARAMS):
                self._client.log_batch(self.run_id, tags=entries[start : start + MAX_PARAMS])

    def log_dataset(self, path: Path, fingerprint: str, context: str) -> None:
        """Record a data folder as an input of the run. The data is not read.

        Args:
            path: The data folder.
            fingerprint: Fingerprint of the data.
            context: Use of the data: "training", "evaluation" or "inference".
        """
        mlflow, folder = mlflow_module(), path.resolve()
        with tracking_errors("log the dataset"):
            source = mlflow_module("mlflow.data.sources").LocalArtifactDatasetSource(str(folder))
            dataset = mlflow_module("mlflow.data.meta_dataset").MetaDataset(
                source, name=folder.name, digest=fingerprint
            )
            tag = mlflow.entities.InputTag("mlflow.data.context", context)
            entry = mlflow.entities.DatasetInput(dataset=dataset._to_mlflow_entity(), tags=[tag])
            self._client.log_inputs(self.run_id, datasets=[entry])
        self.set_tags({"cmran.fingerprint": fingerprint})

    def finish(self, status: Status = "FINISHED") -> None:
        """Stop the system metrics and end the run."""
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
        # finish() only logs its errors. A run shorter than the sampling interval has no sample yet, so take one here.
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
    """Start or resume a run, which is RUNNING within the block and ends after it.

    The run ends as FINISHED; as FAILED on an exception; as KILLED on an interrupt, a SystemExit or one of `killed_by`.
    The exception is raised in each case. After a kill -9, the run stays RUNNING until it is resumed.

    Args:
        experiment: Name of the experiment of a new run; it is created if it is missing.
        name: Name of a new run.
        parent_run_id: Run that becomes the parent.
        run_id: Run to resume, for example one that `mlflow run` opened. It keeps its name, experiment and history.
        tags: Tags to set.
        system_metrics: Whether to log system metrics.
        killed_by: Exceptions that end the run as KILLED instead of FAILED.

    Raises:
        ConfigError: The run or its parent is unknown or deleted.
        TrackingError: The tracking store fails, or the experiment is deleted.
    """
    client = connected_client(create=True)
    run: Run | None = None
    try:
        # An interrupt within this block is raised at its end, so that no run is left without an end.
        with tracking_errors("start a run"):
            if run_id is None:
                run = _new_run(client, experiment, name, parent_run_id)
            else:
                known = existing_run(client, run_id)
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
            # The user needs to see the first error.
            log.warning("%s", second)
        raise
    run.finish("FINISHED")


def open_run(run_id: str) -> Run:
    """Return a run to log to, whatever its status, without starting or ending it.

    Raises:
        ConfigError: The run is unknown or deleted.
    """
    client = connected_client()
    with tracking_errors("open the run"):
        return existing_run(client, run_id)


def check_adopted_run(run_id: str) -> None:
    """Check the run of `adopt_run` before any work.

    Raises:
        TrackingError: The tracking store fails. The message names MLFLOW_RUN_ID.
        ConfigError: The run is unknown or deleted. The message names MLFLOW_RUN_ID.
    """
    variable = f"MLFLOW_RUN_ID={run_id} (set by `mlflow run`, or left over)"
    try:
        client = connected_client()
    except CmranError as error:
        raise TrackingError(
            f"{variable} names an MLflow run, but {error}; or unset MLFLOW_RUN_ID to start a new run"
        ) from error
    with tracking_errors(f"look up the run of {variable}"):
        run = _find_run(client, run_id)
    if run is None:
        raise ConfigError(
            f"{variable} names a run that is unknown or deleted at {shown_tracking_uri()}",
            "unset MLFLOW_RUN_ID to start a new run, or correct MLFLOW_TRACKING_URI",
        )
    log.info("using the MLflow run %s (%s) of MLFLOW_RUN_ID", run.info.run_name, run_id)


def _new_run(client: "MlflowClient", experiment: str, name: str, parent_run_id: str | None) -> Run:
    experiment_id = _experiment_id(client, experiment)
    tags = {"mlflow.source.name": sys.argv[0] or "python", "mlflow.source.type": "LOCAL"}
    # In some containers the user id has no name.
    with contextlib.suppress(KeyError, OSError):
        tags["mlflow.user"] = getpass.getuser()
    if parent_run_id is not None:
        tags |= _child_tags(client, parent_run_id)
    run = client.create_run(experiment_id, tags=tags, run_name=name)
    return Run(run.info.run_id, experiment_id, client)


def _child_tags(client: "MlflowClient", parent_run_id: str) -> dict[str, str]:
    """Return the tags that link a run to its parent and to the pipeline of the parent."""
    existing_run(client, parent_run_id)
    pipeline = client.get_run(parent_run_id).data.tags.get(PIPELINE_TAG)
    return {"mlflow.parentRunId": parent_run_id, **({PIPELINE_TAG: pipeline} if pipeline else {})}


def existing_run(client: "MlflowClient", run_id: str) -> Run:
    """Return the run; raise ConfigError if it is unknown or deleted."""
    run = _find_run(client, run_id)
    if run is None:
        raise ConfigError(
            f"MLflow run {run_id!r} is unknown or deleted at {shown_tracking_uri()}",
            "give the id of a run there, or correct MLFLOW_TRACKING_URI",
        )
    return Run(run_id, run.info.experiment_id, client)


def _find_run(client: "MlflowClient", run_id: str) -> Any:
    """Return the run; None if it is unknown or deleted."""
    try:
        run = client.get_run(run_id)
    except mlflow_module().exceptions.MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def _experiment_id(client: "MlflowClient", name: str) -> str:
    """Return the id of the experiment `name`; create it if it is missing."""
    exceptions = mlflow_module().exceptions
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        database = sqlite_path(tracking_uri())
        location = None if database is None else (artifact_root(database) / name).as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except exceptions.MlflowException as error:
            # Another process may have created it in the meantime.
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise error
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"MLflow experiment {name!r} is deleted",
            f"restore it with `mlflow experiments restore --experiment-id {experiment.experiment_id}`",
        )
    return str(experiment.experiment_id)


def run_exists(run_id: str) -> bool:
    """Return whether the tracking store has this run and it is not deleted."""
    client = connected_client()
    with tracking_errors(f"look up run {run_id}"):
        return _find_run(client, run_id) is not None


def run_info(run_id: str) -> RunInfo:
    """Read the tags, the params and the last value of each metric of a run.

    Raises:
        ConfigError: The run is unknown or deleted.
    """
    client = connected_client()
    with tracking_errors(f"read run {run_id}"):
        existing_run(client, run_id)
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
    """Return the last epoch that `Run.log_epoch` logged to this run, or 0. A resumed run logs the missing epochs."""
    client = connected_client()
    with tracking_errors(f"read the epochs of run {run_id}"):
        return max((metric.step for metric in client.get_metric_history(run_id, "train.loss")), default=0)


def run_artifact(run_id: str, path: str, folder: Path) -> Path:
    """Download an artifact of a run.

    Args:
        run_id: Id of the run.
        path: Path of the artifact within the run.
        folder: Folder for the file; it is created if it is missing.

    Returns:
        The path of the downloaded file.

    Raises:
        ConfigError: The run is unknown or deleted.
        CheckpointError: The run has no such artifact.
    """
    client = connected_client()
    with tracking_errors(f"look up run {run_id}"):
        existing_run(client, run_id)
        parent = path.rpartition("/")[0]
        if path not in {entry.path for entry in client.list_artifacts(run_id, parent or None)}:
            root = locate_artifacts(client.get_run(run_id).info.artifact_uri)
            missing = f" ({root} does not exist)" if root is not None and not root.exists() else ""
            raise CheckpointError(
                f"MLflow run {run_id} has no artifact {path!r}{missing}",
                "give a run whose training is finished, or the file itself",
            )
    with tracking_errors(f"download {path} of run {run_id}"):
        folder.mkdir(parents=True, exist_ok=True)
        return Path(client.download_artifacts(run_id, path, str(folder)))


def checkpoint_of_run(run_id: str, folder: Path) -> Path:
    """Download the best checkpoint of a training run into `folder`. Exceptions as for `run_artifact`."""
    return run_artifact(run_id, "checkpoint/best.pt", folder)


def numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float | None]:
    """Return the scalar scores of an evaluation as MLflow metrics.

    Pairs become `.low` and `.high`, and nested names are joined by dots. Tables and matrices are left out; they are
    logged as artifacts.

    Args:
        values: Scores as in `Evaluation.to_dict()`.
        prefix: Prefix of the names.
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
    """Format a param or tag: lists as JSON, without passwords, truncated to MLflow's limit."""
    text = redact(json.dumps(value) if isinstance(value, (list, tuple)) else str(value))
    return text if len(text) <= MAX_VALUE else text[: MAX_VALUE - 3] + "..."


def _source_tags() -> dict[str, object]:
    state = git_state()
    if state is None:
        return {}
    return {"mlflow.source.git.commit": state.commit, "cmran.git_dirty": str(state.dirty).lower()}


@cache
def git_state() -> GitState | None:
    """Return the commit of the source tree; None if the package was not imported from its repository.

    It is read once per process, because imported code does not change with the tree. Untracked files, such as data,
    runs and exported models, do not count as changes.
    """
    return _git_state(Path(__file__).resolve())


def _git_state(here: Path) -> GitState | None:
    """Return the commit of the repository that tracks the file `here`; None without such a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()

    try:
        # A virtual environment can be inside the folder of a repository that does not track it.
        git("ls-files", "--error-unmatch", here.name)
        return GitState(
            commit=git("rev-parse", "HEAD"), dirty=bool(git("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
