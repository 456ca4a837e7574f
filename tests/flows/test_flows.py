"""The Prefect flows on a tiny folder, with a real Prefect server."""

import errno
import json
import logging
import shutil

import pytest
import requests

from cmran import tracking
from cmran.errors import CmranError
from flows import support
from flows.jobs import pipeline, validate
from flows.jobs.pipeline import PipelineParameters
from flows.jobs.train import TrainParameters
from flows.jobs.validate import ValidateParameters
from tests.flows.test_jobs import artifacts, runs

pytestmark = pytest.mark.usefixtures("prefect")


def published():
    """Return the Markdown of the newest artifact of each key."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        artifacts = sorted(client.read_artifacts(), key=lambda artifact: artifact.created)
    return {artifact.key: artifact.data for artifact in artifacts}


def flow_runs(name):
    """Return all runs of a flow, in no particular order."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName

    with get_client(sync_client=True) as client:
        return client.read_flow_runs(flow_filter=FlowFilter(name=FlowFilterName(any_=[name])))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_pipeline_end_to_end(data, tiny, tracking_db, tmp_path, monkeypatch):
    from flows.pipeline_flow import cmran_pipeline

    monkeypatch.chdir(tmp_path)
    parameters = PipelineParameters(
        data=data, config=tiny, out=tmp_path / "out", trials=2, search_epochs=1, epochs=2, device="cpu"
    )
    result = cmran_pipeline(parameters)

    assert [row.mode for row in result.modes] == ["full", "weak"]
    for row in result.modes:
        assert row.trials == 2
        # Such a tiny network predicts background everywhere. That only equals the baseline: no champion.
        assert (row.release.name, row.release.version, row.release.alias) == (f"cmran-{row.mode}", 1, "challenger")
        assert "trivial baseline" in row.release.reason
        assert row.release.parity_max_abs_difference < 1e-3
        assert row.videos == 4
        folder = result.out / row.mode
        manifest = json.loads((folder / "predictions" / "manifest.json").read_text())
        assert manifest["model"]["version"] == 1
        assert manifest["metrics"]["test"]["accuracy"] == row.test_accuracy
        metrics = json.loads((folder / "train" / "metrics.json").read_text())
        assert len(metrics["epochs"]) == 2
        assert metrics["val"]["accuracy"] == row.val_accuracy
        version = tracking.registered_versions(f"cmran-{row.mode}")[0]
        assert version.tags["study"].startswith(f"pipeline-{result.out.name}-")
    assert (result.out / "summary.md").read_text() == result.markdown()
    text = result.text()
    assert "mlflow ui --backend-store-uri sqlite:///" in text
    assert "cmran-weak v1" in text

    # Every run is a descendant of the pipeline's run and names it in a tag.
    everything = [*runs("cmran-full"), *runs("cmran-weak")]
    parents = {run.info.run_id: run.data.tags.get("mlflow.parentRunId") for run in everything}
    for run in everything:
        assert run.info.status == "FINISHED"
        assert run.data.tags["cmran.pipeline_run_id"] == result.run_id
        top = run.info.run_id
        while parents.get(top):
            top = parents[top]
        assert top == result.run_id
    kinds = sorted((run.data.tags["cmran.mode"], run.data.tags["cmran.job"]) for run in everything)
    each = ["predict", "search", "train", "trial", "trial"]
    assert kinds == sorted([("full", job) for job in each] + [("weak", job) for job in [*each, "validate"]])
    (top_run,) = runs("cmran-pipeline")
    assert top_run.info.run_id == result.run_id
    assert artifacts(result.run_id) == {"summary.md", "summary.json"}

    keys = {"validate-features", "search-full", "train-full", "release-full", "batch-inference", "cmran-pipeline"}
    assert keys | {"search-weak", "train-weak", "release-weak"} <= published().keys()
    assert published()["cmran-pipeline"] == result.markdown()
    assert all(run.state.is_completed() for run in flow_runs("cmran-pipeline"))

    # A finished pipeline cannot be resumed, and a version is registered only once.
    with pytest.raises(CmranError, match="no unfinished pipeline to resume"):
        pipeline.run(parameters.model_copy(update={"resume": True}))
    (result.out / "summary.json").unlink()
    again = pipeline.run(parameters.model_copy(update={"resume": True}))
    assert again.run_id == result.run_id
    assert [row.release for row in again.modes] == [row.release for row in result.modes]
    # Killed after the registration, before release.json was written.
    (result.out / "full" / "release.json").unlink()
    (result.out / "weak" / "release.json").write_text("{")
    (result.out / "summary.json").unlink()
    with pytest.raises(CmranError, match=r"release\.json is damaged"):
        pipeline.run(parameters.model_copy(update={"resume": True}))
    (result.out / "weak" / "release.json").unlink()
    again = pipeline.run(parameters.model_copy(update={"resume": True}))
    assert [(row.release.version, row.release.alias) for row in again.modes] == [(1, "challenger")] * 2
    assert len(tracking.registered_versions("cmran-full")) == 1
    for text in ("{", "{}", "[]"):
        (result.out / "summary.json").unlink(missing_ok=True)
        (result.out / "pipeline.json").write_text(text)
        with pytest.raises(CmranError, match=r"pipeline\.json is damaged"):
            pipeline.run(parameters.model_copy(update={"resume": True}))


def test_bad_folder_fails_the_flow_after_its_report(data, tracking_db, tmp_path):
    from flows.validate_flow import validate_features

    bad = shutil.copytree(data, tmp_path / "bad")
    (bad / "audio_feature.h5").unlink()
    with pytest.raises(CmranError, match=r"audio_feature\.h5"):
        validate_features(ValidateParameters(data=bad))
    assert "missing_file" in published()["validate-features"]
    assert sum(run.state.is_failed() for run in flow_runs("validate-features")) == 1
    (run,) = runs("cmran-full")
    assert artifacts(run.info.run_id) == {"validation.json", "validation.md"}


def test_log_lines_reach_prefect(data, tracking_db, caplog):
    """Log lines of our packages reach Prefect's logger of the run; the loggers are restored."""
    from flows.validate_flow import validate_features

    seen = []

    class Seen(logging.Handler):
        def emit(self, record):
            seen.append((record.name, record.getMessage()))

    handlers = {name: Seen() for name in ("prefect.flow_runs", "prefect.task_runs")}
    for name, handler in handlers.items():
        logging.getLogger(name).addHandler(handler)
    real = validate.run

    def logging_job(parameters, **more):
        logging.getLogger("cmran.anything").info("a line of ours")
        return real(parameters, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.jobs.validate.run", logging_job)
        validate_features(ValidateParameters(data=data))
    for name, handler in handlers.items():
        logging.getLogger(name).removeHandler(handler)
    assert ("prefect.task_runs", "a line of ours") in seen
    assert any("0 errors, 0 warnings" in line for _, line in seen)
    logger = logging.getLogger("cmran")
    assert logger.propagate
    assert not any(isinstance(handler, support._ToPrefect) for handler in logger.handlers)


@pytest.fixture
def quick_retries(monkeypatch):
    monkeypatch.setattr(support, "RETRY_DELAYS_S", [0.0, 0.0])


@pytest.mark.usefixtures("quick_retries")
class TestRetries:
    def flow_of(self, errors, *, on_retry=None):
        from prefect import flow

        attempts = []

        def job(parameters):
            attempts.append(parameters.resume)
            if errors:
                raise errors.pop(0)
            return "done"

        @flow
        def probe():
            parameters = TrainParameters(data="d", mode="full", out="o")
            return support.run_step(job, parameters, on_retry=on_retry)

        return probe, attempts

    def test_io_error_is_reattempts_with_resume(self):
        caused = CmranError("cannot read")
        caused.__cause__ = requests.exceptions.ReadTimeout("slow server")
        probe, attempts = self.flow_of([OSError(errno.EIO, "bad cable"), caused], on_retry=support.resumed)
        assert probe() == "done"
        assert attempts == [False, True, True]

    def test_retries_are_exhausted(self):
        probe, attempts = self.flow_of([OSError(errno.EIO, "bad cable")] * 9)
        with pytest.raises(OSError, match="bad cable"):
            probe()
        assert attempts == [False] * 3

    @pytest.mark.parametrize(
        "error",
        [
            CmranError("loss is nan"),
            ValueError("a bug"),
            FileNotFoundError(errno.ENOENT, "no such file"),
            OSError(errno.ENOSPC, "disk full"),
            OSError("h5py: file signature not found"),
            PermissionError(errno.EACCES, "not yours"),
        ],
        ids=repr,
    )
    def test_other_errors_are_not_reattempts(self, error):
        probe, attempts = self.flow_of([error])
        with pytest.raises(type(error)):
            probe()
        assert attempts == [False]


def test_retry_never_resumes_a_run_that_existed_before(training, tracking_db, monkeypatch):
    from flows.train_flow import train

    calls = []

    def recorded(_job, _parameters, *, on_retry=None):
        calls.append(on_retry)
        raise CmranError("stop")

    monkeypatch.setattr("flows.train_flow.run_step", recorded)
    parameters = training()
    with pytest.raises(CmranError):
        train(parameters)
    parameters.out.mkdir()
    with pytest.raises(CmranError):
        train(parameters)
    assert calls == [support.resumed, None]


@pytest.mark.slow
def test_failed_flow_is_one_line(cmran, data, tmp_path):
    """A failed step of `cmran pipeline`: exit code 1, one line, no traceback."""
    bad = shutil.copytree(data, tmp_path / "bad")
    (bad / "audio_feature.h5").unlink()
    done = cmran("pipeline", "bad", "--out", "out")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if "rror" in line]
    assert len(errors) == 1
    assert errors[0].startswith("error: bad: not usable in mode weak: missing_file: audio_feature.h5")
