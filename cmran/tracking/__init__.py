"""MLflow tracking: runs, metrics, artifacts, data lineage, the model registry and its aliases.

No other package calls MLflow. All calls use `MlflowClient` with explicit run ids, because MLflow's "active run" is a
thread-local global: a log call from another thread would start an unwanted run.
"""

from cmran.errors import TrackingError
from cmran.tracking.registry import (
    CHALLENGER,
    CHAMPION,
    Registered,
    ResolvedModel,
    Version,
    register_release,
    registered_versions,
    resolve_model,
)
from cmran.tracking.runs import (
    PIPELINE_EXPERIMENT,
    PIPELINE_TAG,
    GitState,
    Run,
    RunInfo,
    Status,
    check_adopted_run,
    checkpoint_of_run,
    experiment_of,
    git_state,
    logged_epochs,
    numbers,
    open_run,
    run_artifact,
    run_exists,
    run_info,
    start_run,
)
from cmran.tracking.store import adopt_run, connect, connect_registry, shown_tracking_uri, tracking_uri

__all__ = [
    "CHALLENGER",
    "CHAMPION",
    "PIPELINE_EXPERIMENT",
    "PIPELINE_TAG",
    "GitState",
    "Registered",
    "ResolvedModel",
    "Run",
    "RunInfo",
    "Status",
    "TrackingError",
    "Version",
    "adopt_run",
    "check_adopted_run",
    "checkpoint_of_run",
    "connect",
    "connect_registry",
    "experiment_of",
    "git_state",
    "logged_epochs",
    "numbers",
    "open_run",
    "register_release",
    "registered_versions",
    "resolve_model",
    "run_artifact",
    "run_exists",
    "run_info",
    "shown_tracking_uri",
    "start_run",
    "tracking_uri",
]
