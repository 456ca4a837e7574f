"""The jobs behind the commands and flows: their results, and what they log to MLflow."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from cmran import tracking
from cmran.errors import CmranError
from cmran.model.checkpoints import load, load_model
from cmran.tracking import Run, TrackingError
from flows.jobs import evaluate, export, pipeline, predict, release, seeds, synth, train, validate
from flows.jobs.common import resolve_config
from flows.jobs.evaluate import EvaluateParameters
from flows.jobs.export import ExportParameters
from flows.jobs.models import find_model
from flows.jobs.pipeline import PipelineParameters, Steps
from flows.jobs.predict import PredictParameters
from flows.jobs.release import ReleaseParameters
from flows.jobs.seeds import SeedsParameters
from flows.jobs.synth import SynthParameters
from flows.jobs.train import COMPLETE
from flows.jobs.validate import ValidateParameters
from serving.export import export_onnx
from serving.parity import check_parity
from serving.release import export_with_parity_check


def runs(experiment):
    client = tracking.store.connected_client()
    found = client.get_experiment_by_name(experiment)
    return client.search_runs([found.experiment_id]) if found else []


def artifacts(run_id, folder=None):
    client = tracking.store.connected_client()
    names = set()
    for entry in client.list_artifacts(run_id, folder):
        names |= artifacts(run_id, entry.path) if entry.is_dir else {entry.path}
    return names


def steps(run_id, key):
    client = tracking.store.connected_client()
    return [metric.step for metric in client.get_metric_history(run_id, key)]


class TestTraining:
    def test_mlflow_run_is_complete(self, training, tracking_db):
        result = train.run(training(mode="full", seed=7))
        run = tracking.run_info(result.run_id)
        assert run.status == "FINISHED"
        assert run.experiment == "cmran-full"
        assert run.params["cfg.train.seed"] == "7"
        assert run.params["cfg.model.width"] == "8"
        assert run.tags["cmran.fingerprint"] == result.fit.fingerprint
        assert run.tags["cmran.selection_split"] == "val"
        assert run.tags[COMPLETE] == "true"
        assert steps(result.run_id, "val.accuracy") == [1, 2, 3]
        assert steps(result.run_id, "train.loss") == [1, 2, 3]
        assert run.metrics["best.val.accuracy"] == result.fit.val["accuracy"]
        assert run.metrics["best.test.accuracy"] == result.fit.test["accuracy"]
        assert artifacts(result.run_id) == {
            "config.json",
            "metrics.json",
            "checkpoint/best.pt",
            "figures/confusion.png",
            "figures/curves.png",
            "figures/timelines.png",
            "tables/per_category.csv",
            "tables/per_category.md",
        }
        inputs = tracking.store.connected_client().get_run(result.run_id).inputs.dataset_inputs
        assert [entry.dataset.digest for entry in inputs] == [result.fit.fingerprint]
        # The run directory and the checkpoints name the MLflow run.
        assert json.loads((result.fit.run_dir / "run.json").read_text())["run_id"] == result.run_id
        assert load(result.fit.best_checkpoint)["run_id"] == result.run_id

    def test_selection_on_test_marks_the_scores(self, training, tracking_db):
        result = train.run(training(selection_split="test"))
        run = tracking.run_info(result.run_id)
        assert run.tags["cmran.selection_split"] == "test"
        assert run.metrics["best.test_selected_on_test.accuracy"] == result.fit.test["accuracy"]
        assert steps(result.run_id, "test_selected_on_test.accuracy") == [1, 2, 3]
        assert not any(key.startswith(("best.val.", "best.test.", "test.")) for key in run.metrics)
        assert "selected on test" in result.markdown()
        assert "selected on test" not in train.run(training(out=training().out.with_name("on_val"))).markdown()

    def test_early_stopping_and_epochs_without_scores_are_logged(self, training, tiny, tracking_db, tmp_path):
        config = yaml.safe_load(tiny.read_text())
        config["train"] |= {"epochs": 9, "eval_every": 2, "patience": 1, "lr": 1e-8}
        (tmp_path / "stop.yaml").write_text(yaml.safe_dump(config))
        result = train.run(training(config=tmp_path / "stop.yaml"))
        assert (
            "Ended by early stopping after epoch 4 of 9: no better accuracy on val since epoch 2" in result.markdown()
        )
        assert "early stopping" in tracking.run_info(result.run_id).tags["cmran.stopped_early"]
        assert steps(result.run_id, "train.loss") == [1, 2, 3, 4]
        assert steps(result.run_id, "val.accuracy") == steps(result.run_id, "val.loss") == [2, 4]
        # Resuming a finished run returns its result.
        again = train.run(training(config=tmp_path / "stop.yaml", resume=True))
        assert (again.run_id, again.fit) == (result.run_id, result.fit)

    def test_rejected_training_opens_no_mlflow_run(self, training, tracking_db):
        train.run(training())
        before = len(runs("cmran-full"))
        with pytest.raises(CmranError, match="already holds a run"):
            train.run(training())
        with pytest.raises(CmranError, match="no-such"):
            train.run(training(data="no-such", out=training().out.with_name("other")))
        assert len(runs("cmran-full")) == before

    def test_unreachable_store_fails_before_any_work(self, training, monkeypatch):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        with pytest.raises(CmranError, match=r"127\.0\.0\.1:9 \(MLFLOW_TRACKING_URI\) is not reachable"):
            train.run(training())
        assert not training().out.exists()

    def test_resume_continues_the_same_mlflow_run(self, training, tracking_db, monkeypatch):
        whole = train.run(training(out=training().out.with_name("whole")))
        log_epoch = Run.log_epoch

        def interrupted(self, record):
            if record.epoch == 2:
                raise KeyboardInterrupt
            log_epoch(self, record)

        monkeypatch.setattr(Run, "log_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.run(training())
        (started,) = (run for run in runs("cmran-full") if run.info.run_id != whole.run_id)
        assert started.info.status == "KILLED"

        monkeypatch.setattr(Run, "log_epoch", log_epoch)
        result = train.run(training(resume=True))
        assert result.run_id == started.info.run_id
        assert tracking.run_info(result.run_id).status == "FINISHED"
        # Epoch 2 was trained but not logged: it is logged now, once.
        assert steps(result.run_id, "val.accuracy") == [1, 2, 3]
        for key, value in load(whole.fit.best_checkpoint)["model"].items():
            assert torch.equal(value, load(result.fit.best_checkpoint)["model"][key])

    def test_resume_with_another_store_starts_a_new_run(self, training, tracking_db, tmp_path, monkeypatch, caplog):
        first = train.run(training())
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
        second = train.run(training(resume=True))
        assert second.run_id != first.run_id
        assert "a new run is started" in caplog.text
        assert steps(second.run_id, "val.accuracy") == [1, 2, 3]
        assert tracking.run_info(second.run_id).tags[COMPLETE] == "true"

    def test_adopted_run_is_used(self, training, tracking_db):
        with tracking.start_run(experiment="elsewhere", name="by mlflow run") as run:
            pass
        result = train.run(training(), run_id=run.run_id)
        assert result.run_id == run.run_id
        assert runs("cmran-full") == []
        assert tracking.run_info(run.run_id).experiment == "elsewhere"

    def test_store_failure_during_training_loses_no_epoch(self, training, tracking_db, monkeypatch, caplog):
        log_epoch, tried = Run.log_epoch, []

        def flaky(self, record):
            tried.append(record.epoch)
            if len(tried) in (1, 2):
                raise TrackingError("gone")
            log_epoch(self, record)

        monkeypatch.setattr(Run, "log_epoch", flaky)
        result = train.run(training())
        assert tried == [1, 1, 1, 2, 3]
        assert steps(result.run_id, "val.accuracy") == [1, 2, 3]
        assert caplog.text.count("training continues") == 2

    def test_store_failure_at_the_end_loses_nothing(self, training, tracking_db, monkeypatch):
        log_artifact = Run.log_artifact

        def broken(self, path, artifact_path=None):
            if path.name == "best.pt":
                raise TrackingError("gone")
            log_artifact(self, path, artifact_path)

        monkeypatch.setattr(Run, "log_artifact", broken)
        with pytest.raises(CmranError, match=r"gone; training has finished.*`resume=True` to log the result"):
            train.run(training())
        assert (training().out / "metrics.json").exists()
        (started,) = runs("cmran-full")
        assert started.info.status == "FAILED"

        monkeypatch.setattr(Run, "log_artifact", log_artifact)
        result = train.run(training(resume=True))
        assert result.run_id == started.info.run_id
        assert "checkpoint/best.pt" in artifacts(result.run_id)
        assert steps(result.run_id, "val.accuracy") == [1, 2, 3]

    def test_omitted_options_keep_the_settings(self, training):
        config = resolve_config(training())
        assert (config.train.epochs, config.train.lr) == (3, 0.01)
        assert config.recipe == "published-full"
        changed = resolve_config(training(epochs=9, precision="float64", recipe="demo", seed=5))
        assert (changed.train.epochs, changed.train.precision, changed.train.seed) == (9, "float64", 5)
        assert changed.recipe == "demo"


def test_seeds(training, tracking_db, tmp_path):
    one = training()
    result = seeds.run(
        SeedsParameters(
            data=one.data,
            mode="full",
            config=one.config,
            out=tmp_path / "seeds",
            seeds=(1, 2),
            report=tmp_path / "s.json",
        )
    )
    scores = {
        seed: json.loads((tmp_path / "seeds" / f"seed-{seed}" / "metrics.json").read_text())["test"]["accuracy"]
        for seed in (1, 2)
    }
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["spread"]["test"]["accuracy"]["mean"] == pytest.approx(sum(scores.values()) / 2)
    assert found["spread"]["test"]["accuracy"]["n"] == 2
    assert found["by_seed"]["1"]["test"] == scores[1]
    assert "| test" in result.text()
    parent = tracking.run_info(result.run_id)
    assert parent.metrics["test.accuracy.mean"] == pytest.approx(sum(scores.values()) / 2)
    children = [run for run in runs("cmran-full") if run.data.tags.get("mlflow.parentRunId") == result.run_id]
    assert sorted(run.data.params["cfg.train.seed"] for run in children) == ["1", "2"]


class TestModels:
    @pytest.fixture
    def trained(self, training, tracking_db):
        return train.run(training(epochs=1))

    def test_find_by_folder_file_and_mlflow_run(self, trained):
        folder = trained.fit.run_dir
        expected = load(trained.fit.best_checkpoint)["model"]
        for name in (folder, folder / "best.pt", trained.run_id):
            with find_model(str(name)) as found:
                assert found.run_id == trained.run_id
                assert found.fingerprint == trained.fit.fingerprint
                assert (found.segments, found.grid) == (4, (2, 2))
                assert found.metrics["val"] == trained.fit.val
                assert all(torch.equal(value, expected[key]) for key, value in found.model.state_dict().items())

    def test_metrics_of_another_epoch_are_ignored(self, trained, tmp_path):
        state = load(trained.fit.best_checkpoint)
        torch.save(state | {"epoch": 99}, trained.fit.best_checkpoint)
        with find_model(str(trained.fit.run_dir)) as found:
            assert found.metrics is None

    def test_newest_mlflow_run_of_a_resumed_training_counts(self, trained):
        """A resumed training whose run was missing has started another; an earlier best.pt names the old one."""
        state = load(trained.fit.best_checkpoint)
        torch.save(state | {"run_id": "0" * 32}, trained.fit.best_checkpoint)
        with find_model(str(trained.fit.run_dir)) as found:
            assert found.run_id == trained.run_id

    def test_unfinished_training_is_reported(self, trained, tmp_path):
        with find_model(str(trained.fit.run_dir)) as found:
            assert found.notes() == []
        (trained.fit.run_dir / "metrics.json").unlink()
        with find_model(str(trained.fit.run_dir)) as found:
            assert "not finished" in found.notes()[0]
        result = export.run(ExportParameters(checkpoint=str(trained.fit.run_dir), out=tmp_path / "m.onnx"))
        assert "not finished" in result.text()

    @pytest.mark.parametrize("selection", ["val", "test"])
    def test_published_file_with_the_weights_of_its_run_directory(
        self, training, tracking_db, tmp_path, monkeypatch, selection
    ):
        trained = train.run(training(epochs=1, out=tmp_path / "other", selection_split=selection))
        path = trained.fit.run_dir / "model_epoch_1_top1_50.000_task_full_best_model.pth.tar"
        model = self.read_as_published(path, trained, monkeypatch)
        with find_model(str(path)) as found:
            assert found.selection_split == selection
            assert (found.run_id, found.fingerprint) == (trained.run_id, trained.fit.fingerprint)
            assert found.metrics["val"] == trained.fit.val
            assert found.data is not None
        # With other weights, nothing of the run directory applies.
        with torch.no_grad():
            model.event_head.bias += 1
        with find_model(str(path)) as found:
            assert found.selection_split == "unknown"
            assert (found.run_id, found.fingerprint, found.metrics, found.data) == (None, None, None, None)
            assert "selection split is unknown" in found.notes()[0]

    @pytest.mark.parametrize("best", ["none", "damaged"])
    def test_published_file_alone_has_an_unknown_selection_split(
        self, trained, training, tmp_path, monkeypatch, caplog, best
    ):
        path = tmp_path / "alone" / "model_epoch_1_top1_50.000_task_full_best_model.pth.tar"
        path.parent.mkdir()
        if best == "damaged":
            (path.parent / "best.pt").write_bytes(b"x")
        self.read_as_published(path, trained, monkeypatch)
        result = evaluate.run(EvaluateParameters(checkpoint=str(path), data=training().data, track=True))
        assert result.to_dict()["selection_split"] == "unknown"
        assert "published checkpoints were selected on test" in result.text()
        assert "**Its epoch was selected on" not in result.text()
        assert ("cannot be compared" in caplog.text) == (best == "damaged")
        found = next(run for run in runs("cmran-full") if run.info.run_id != trained.run_id)
        assert "test_selection_unknown.accuracy" in found.data.metrics
        assert "test.accuracy" not in found.data.metrics

    @staticmethod
    def read_as_published(path, trained, monkeypatch):
        """Make every published file load as best.pt, because the tiny network cannot be one."""
        from cmran.model import checkpoints

        model, _ = load_model(trained.fit.best_checkpoint)
        torch.save({}, path)
        monkeypatch.setattr(checkpoints, "import_published", lambda *_: model)
        return model

    @pytest.mark.parametrize("name", ["nowhere", "0" * 32, ""])
    def test_missing_model(self, name, tracking_db, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(CmranError), find_model(name):
            pass

    def test_evaluate_agrees_with_training(self, trained, training, tmp_path):
        for split, scores in (("val", trained.fit.val), ("test", trained.fit.test)):
            result = evaluate.run(
                EvaluateParameters(
                    checkpoint=str(trained.fit.run_dir), data=training().data, split=split, report=tmp_path / "r.json"
                )
            )
            assert result.scores["accuracy"] == scores["accuracy"]
            assert result.scores["confusion"] == scores["confusion"]
            assert json.loads((tmp_path / "r.json").read_text())["split"] == split
            assert "always background" in result.text()

    def test_evaluate_is_logged_on_request(self, trained, training):
        options = {"checkpoint": str(trained.fit.run_dir), "data": training().data}
        evaluate.run(EvaluateParameters(**options))
        assert len(runs("cmran-full")) == 1
        evaluate.run(EvaluateParameters(**options, track=True))
        found = next(run for run in runs("cmran-full") if run.info.run_id != trained.run_id)
        assert found.data.metrics["test.accuracy"] == trained.fit.test["accuracy"]
        assert artifacts(found.info.run_id) == {"test.json", "test.md"}

    def test_evaluate_notes_other_data(self, trained, tmp_path):
        from tests.helpers import make_folder

        other = make_folder(tmp_path / "other", seed=5)
        result = evaluate.run(EvaluateParameters(checkpoint=str(trained.fit.run_dir), data=other))
        assert "other data" in result.text()

    def test_other_feature_widths_are_rejected(self, trained, tmp_path):
        from tests.helpers import make_folder

        other = make_folder(tmp_path / "other", audio_features=9)
        with pytest.raises(CmranError, match="9 audio_features"):
            evaluate.run(EvaluateParameters(checkpoint=str(trained.fit.run_dir), data=other))


@pytest.fixture(scope="module")
def exported():
    return {}


class TestRelease:
    @pytest.fixture
    def trained(self, training, tracking_db):
        return train.run(training(epochs=1))

    @pytest.fixture
    def quick_export(self, exported, monkeypatch):
        """Export only once: all training runs here end with equal weights, and an export takes seconds."""
        real = export_onnx

        def copy(model, path, **shape):
            if "content" not in exported:
                exported["content"] = real(model, path, **shape).read_bytes()
            path.write_bytes(exported["content"])
            return path

        monkeypatch.setattr("serving.export.export_onnx", copy)

    def test_export(self, trained, tmp_path):
        out = tmp_path / "model.onnx"
        result = export.run(ExportParameters(checkpoint=trained.run_id, out=out))
        assert result.ok
        assert out.is_file()
        assert result.parity.rows > 0
        assert "Parity check passed" in result.text()
        from serving.session import open_session

        metadata = open_session(out, "cpu").all_metadata
        assert metadata["run_id"] == trained.run_id
        assert metadata["fingerprint"] == trained.fit.fingerprint
        assert metadata["git_commit"]
        assert [path.name for path in tmp_path.glob("model.onnx*")] == ["model.onnx"]

    def test_export_without_data_is_noted(self, training, data, tracking_db, quick_export, tmp_path, caplog):
        moved = shutil.copytree(data, tmp_path / "moved")
        trained = train.run(training(epochs=1, data=moved))
        shutil.rmtree(moved)
        result = export.run(ExportParameters(checkpoint=str(trained.fit.run_dir), out=tmp_path / "model.onnx"))
        assert result.ok
        assert result.parity.rows == 0
        assert "not there any more" in caplog.text
        assert "No val video was compared" in result.text()

    def test_data_of_other_sizes_are_rejected(self, trained, training, tmp_path):
        from tests.helpers import make_folder

        for change in ({"segments": 6}, {"grid": 3}):
            other = make_folder(tmp_path / str(change), **change)
            with pytest.raises(CmranError, match=r"found \d segments and a \dx\d grid, expected 4 and 2x2"):
                export.run(ExportParameters(checkpoint=str(trained.fit.run_dir), out=tmp_path / "m.onnx", data=other))

    def test_nonfinite_features_are_reported_as_data_error(self, trained, training, tmp_path):
        import numpy as np

        from tests.helpers import read, write

        broken = shutil.copytree(training().data, tmp_path / "broken")
        row = int(read(broken / "val_order.h5", "order")[1])
        values = read(broken / "audio_feature.h5")
        values[row, 0, 0] = np.nan
        write(broken / "audio_feature.h5", values)
        for run in (
            lambda: release.run(ReleaseParameters(checkpoint=str(trained.fit.run_dir), data=broken)),
            lambda: evaluate.run(EvaluateParameters(checkpoint=str(trained.fit.run_dir), data=broken, split="val")),
        ):
            with pytest.raises(CmranError, match=rf"audio_feature\.h5 \[avadataset\], row {row}:"):
                run()

    def test_failed_parity_check_is_not_released(self, trained, quick_export, tmp_path, monkeypatch):
        real = check_parity
        out = tmp_path / "model.onnx"
        out.write_bytes(b"the old one")

        def failed(*args, **kwargs):
            return real(*args, **kwargs).model_copy(update={"failures": ("segments: all wrong",)})

        monkeypatch.setattr("serving.parity.check_parity", failed)
        result = export.run(ExportParameters(checkpoint=str(trained.fit.run_dir), out=out))
        assert not result.ok
        assert "PARITY CHECK FAILED" in result.text()
        assert "all wrong" in result.text()
        assert out.read_bytes() == b"the old one"
        with pytest.raises(CmranError, match="all wrong"):
            release.run(ReleaseParameters(checkpoint=str(trained.fit.run_dir)))
        assert tracking.registered_versions("cmran-full") == []

    def test_release(self, trained, quick_export):
        # Such a tiny network predicts background everywhere. That only equals the baseline: no champion.
        path = trained.fit.run_dir / "metrics.json"
        metrics = json.loads(path.read_text())
        metrics["val"]["baselines"] |= {"always_background": 0.0, "most_frequent_label": 0.0}
        path.write_text(json.dumps(metrics))
        result = release.run(ReleaseParameters(checkpoint=str(trained.fit.run_dir), study="s"))
        (version,) = tracking.registered_versions("cmran-full")
        assert version.aliases == ("champion",)
        assert version.run_id == trained.run_id == result.run_id
        assert float(version.tags["val_accuracy"]) == pytest.approx(trained.fit.val["accuracy"])
        assert float(version.tags["test_accuracy"]) == pytest.approx(trained.fit.test["accuracy"])
        assert float(version.tags["parity_max_abs_difference"]) == result.export.parity.max_abs_difference
        assert version.tags["fingerprint"] == trained.fit.fingerprint
        assert version.tags["study"] == "s"
        assert version.tags["git_commit"]
        assert {"release/parity.json", "release/release.md"} <= artifacts(trained.run_id)
        assert "champion" in result.text()

    def test_all_val_videos_are_compared(self, training, tracking_db, tmp_path):
        """70 videos: several batches, the last one partial."""
        from tests.helpers import make_folder, read

        data = make_folder(tmp_path / "many", 280)
        trained = train.run(training(data=data, epochs=1))
        exported = export.run(ExportParameters(checkpoint=str(trained.fit.run_dir), out=tmp_path / "m.onnx"))
        assert exported.parity.rows == exported.val_videos == len(read(data / "val_order.h5", "order")) == 70
        assert "70 of 70" in exported.text()

    @pytest.mark.parametrize("case", ["zero", "nan", "background", "frequent", "above", "unfinished", "unknown"])
    def test_at_or_below_the_trivial_baselines_is_never_champion(
        self, training, data, tracking_db, quick_export, tmp_path, case
    ):
        moved = shutil.copytree(data, tmp_path / "moved")
        trained = train.run(training(epochs=1, data=moved))
        folder = trained.fit.run_dir
        path = folder / "metrics.json"
        metrics = json.loads(path.read_text())
        metrics["val"]["baselines"] |= {"always_background": 40.0, "most_frequent_label": 45.0}
        values = {"zero": 0.0, "nan": float("nan"), "background": 40.0, "frequent": 45.0, "above": 45.1}
        metrics["val"]["accuracy"] = values.get(case, 99.0)
        path.write_text(json.dumps(metrics))
        if case in ("unfinished", "unknown"):
            path.unlink()
            state = load(trained.fit.best_checkpoint)
            torch.save(state | {"val_accuracy": 100.0}, trained.fit.best_checkpoint)
        if case == "unknown":
            shutil.rmtree(moved)
        result = release.run(ReleaseParameters(checkpoint=str(folder)))
        (version,) = tracking.registered_versions("cmran-full")
        good = case in ("above", "unfinished")
        assert version.aliases == (("champion",) if good else ("challenger",))
        reasons = {
            "nan": "no accuracy on val",
            "unknown": "trivial baselines on val are not known",
            "above": "there was no champion",
            "unfinished": "there was no champion",
        }
        assert reasons.get(case, "is not above 45.000 of the best trivial baseline") in result.registered.reason
        assert result.registered.reason in " ".join(result.text().split())

    def test_selected_on_test_is_never_champion(self, training, tracking_db, quick_export):
        trained = train.run(training(epochs=1, selection_split="test"))
        result = release.run(ReleaseParameters(checkpoint=str(trained.fit.run_dir)))
        (version,) = tracking.registered_versions("cmran-full")
        assert version.aliases == ("challenger",)
        assert "test_accuracy" not in version.tags
        assert "test_accuracy_selected_on_test" in version.tags
        assert "selected on test" in result.text()

    def test_selected_on_test_marks_the_scores_of_predictions(self, training, tracking_db, tmp_path):
        trained = train.run(training(epochs=1, selection_split="test"))
        model = tmp_path / "model.onnx"
        export.run(ExportParameters(checkpoint=trained.run_id, out=model))
        asked = {"model": str(model), "data": training().data, "out": tmp_path / "out", "device": "cpu", "track": True}
        result = predict.run(PredictParameters(**asked))
        assert "selected on test" in result.text()
        (run,) = (run for run in runs("cmran-full") if run.info.run_id != trained.run_id)
        assert run.data.metrics["test_selected_on_test.accuracy"] == trained.fit.test["accuracy"]
        assert "test.accuracy" not in run.data.metrics

    def test_published_checkpoint_needs_data(self, trained, tmp_path, monkeypatch):
        from cmran.model import checkpoints

        model, _ = load_model(trained.fit.run_dir)
        path = tmp_path / "model_epoch_1_top1_50.000_task_full_best_model.pth.tar"
        torch.save({}, path)
        monkeypatch.setattr(checkpoints, "import_published", lambda *_: model)
        with pytest.raises(CmranError, match="`data`"):
            release.run(ReleaseParameters(checkpoint=str(path)))


def test_headings_mark_optimistic_scores():
    from flows.jobs.common import split_heading

    assert [split_heading(split, "val") for split in ("test", "val", "train", "no_split")] == [
        "## test",
        "## val (the epoch was selected on it)",
        "## train (training data: not a measure of new videos)",
        "## Videos in no split",
    ]
    assert split_heading("test", "test") == "## test (the epoch was selected on it)"
    assert split_heading("val", "unknown") == "## val"


def test_validate_is_logged_on_request(data, tracking_db, tmp_path):
    validate.run(ValidateParameters(data=data))
    assert runs("cmran-full") == []
    result = validate.run(ValidateParameters(data=data, track=True, report=tmp_path / "r.json"))
    (run,) = runs("cmran-full")
    assert artifacts(run.info.run_id) == {"validation.json", "validation.md"}
    assert run.data.tags["cmran.fingerprint"] == result.report.fingerprint
    assert run.data.metrics == {"validation.errors": 0.0, "validation.warnings": 0.0}


def test_synth(tmp_path, tracking_db):
    small = {"segments": 4, "grid": 2, "visual_features": 8, "audio_features": 6}
    result = synth.run(SynthParameters(out=tmp_path / "synthetic", videos=20, background_videos=2, **small))
    assert (result.videos, result.background_videos) == (20, 2)
    assert validate.run(ValidateParameters(data=tmp_path / "synthetic", mode="weak")).ok
    with pytest.raises(CmranError):
        synth.run(SynthParameters(out=tmp_path / "synthetic", videos=20, **small))


class TestPipelineChecks:
    def test_settings_of_every_mode_are_checked_first(self, data, tracking_db, tmp_path):
        with pytest.raises(CmranError, match="is for mode 'full'"):
            pipeline.run(PipelineParameters(data=data, recipe="published-full", out=tmp_path / "out"))
        assert not (tmp_path / "out").exists()

    def test_bad_folder_stops_the_pipeline_after_the_report(self, data, tiny, tracking_db, tmp_path):
        bad = shutil.copytree(data, tmp_path / "bad")
        (bad / "audio_feature.h5").unlink()
        with pytest.raises(CmranError, match=r"audio_feature\.h5"):
            pipeline.run(PipelineParameters(data=bad, config=tiny, out=tmp_path / "out"))
        (folder,) = (tmp_path / "out").iterdir()
        assert "missing_file" in (folder / "validation.md").read_text()
        (run,) = runs("cmran-pipeline")
        assert run.info.status == "FAILED"

    def test_resume_needs_the_same_settings(self, data, tiny, tracking_db, tmp_path):
        options = {"data": data, "config": tiny, "out": tmp_path / "out"}
        with pytest.raises(CmranError, match="no unfinished pipeline to resume"):
            pipeline.run(PipelineParameters(**options, resume=True))

        def stop(_parameters):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            pipeline.run(PipelineParameters(**options), steps=Steps(search=stop))
        with pytest.raises(CmranError, match="trials"):
            pipeline.run(PipelineParameters(**options, resume=True, trials=3))
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(PipelineParameters(**options, resume=True), steps=Steps(search=stop))
        assert len(list((tmp_path / "out").iterdir())) == 1
        (run,) = runs("cmran-pipeline")
        assert run.info.status == "KILLED"


def test_export_never_replaces_a_device():
    with pytest.raises(CmranError, match="/dev/null is a device or a pipe, expected the name of an ONNX file"):
        export_with_parity_check(None, Path("/dev/null"), None)
