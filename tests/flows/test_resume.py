"""Resume needs the folder alone; what differs from it is refused by name; nothing is changed silently."""

import json
import shutil

import pytest
import torch

from cmran.config import load_config
from cmran.errors import UserError
from cmran.training import Learner, fit
from flows import jobs
from flows import parameters as p
from flows.pipeline_job import Steps, pipeline_job
from tests.flows.test_jobs import runs

EPOCHS = 4


@pytest.fixture(scope="module")
def settings(tiny):
    """Settings that neither a recipe nor the file alone gives."""
    return load_config("full", config_file=tiny, overrides={"train": {"epochs": EPOCHS, "lr": 0.02}})


@pytest.fixture(scope="module")
def whole(data, settings, tmp_path_factory):
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    fit(data, settings, out, device="cpu")
    return out


@pytest.fixture(scope="module")
def killed_once(data, settings, tmp_path_factory):
    def stop(record):
        if record.epoch == 2:
            raise KeyboardInterrupt

    out = tmp_path_factory.mktemp("killed") / "run"
    with pytest.raises(KeyboardInterrupt):
        fit(data, settings, out, device="cpu", on_epoch=stop)
    return out


@pytest.fixture
def killed(killed_once, tmp_path):
    """The same run, stopped after its second epoch."""
    return shutil.copytree(killed_once, tmp_path / "run")


def same_weights(first, second):
    a, b = (torch.load(out / "last.pt", weights_only=True) for out in (first, second))
    assert a["epoch"] == b["epoch"] == EPOCHS
    assert a["model"].keys() == b["model"].keys()
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])


def resume(out, **given):
    return jobs.train_job(p.TrainParameters(out=out, resume=True, **given))


def test_the_folder_alone_is_enough(killed, whole, data, tracking_db, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = resume(killed)
    assert len(result.fit.epochs) == EPOCHS
    assert result.fit.config.train.lr == 0.02
    same_weights(killed, whole)
    assert [run.info.run_id for run in runs("cmran-full")] == [result.run_id]


def test_a_run_that_ended_within_its_first_epoch(data, settings, whole, tracking_db, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(data, settings, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run" / "last.pt").exists()
    with pytest.raises(UserError, match=r"train\.lr 0\.02, now it is 0\.5"):
        resume(tmp_path / "run", lr=0.5)
    resume(tmp_path / "run")
    same_weights(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mode": "weak"}, "mode full, now it is weak"),
        ({"recipe": "demo"}, "recipe published-full, now it is demo"),
        ({"lr": 0.5}, r"train\.lr 0\.02, now it is 0\.5"),
        ({"seed": 9}, r"train\.seed 456, now it is 9"),
        ({"batch_size": 2}, r"train\.batch_size 4, now it is 2"),
        ({"precision": "float64"}, r"train\.precision float32, now it is float64"),
        ({"selection_split": "test"}, r"train\.selection_split val, now it is test"),
        ({"settings": "model.width=16"}, r"model\.width 8, now it is 16"),
        ({"settings": "model.mode=weak"}, r"model\.mode is 'weak'"),
        ({"epochs": 1}, "more epochs than the 1 asked for"),
        ({"device": "cuda"}, "began on the cpu"),
        ({"data": "no-such"}, "no-such"),
    ],
    ids=str,
)
def test_what_differs_is_refused_by_name(killed, tracking_db, monkeypatch, given, message):
    monkeypatch.setattr(Learner, "step", lambda *_: pytest.fail("it trains"))
    before = {path.name: path.read_bytes() for path in killed.iterdir() if path.is_file()}
    with pytest.raises(UserError, match=message) as error:
        resume(killed, **given)
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in killed.iterdir() if path.is_file()} == before
    assert runs("cmran-full") == []


def test_what_is_the_same_may_be_given(killed, whole, data, tiny, tracking_db):
    """As a flow's second try does, which repeats every parameter."""
    given = {"data": data, "mode": "full", "config": tiny, "epochs": EPOCHS, "lr": 0.02, "device": "auto"}
    resume(killed, **given)
    same_weights(killed, whole)


def test_a_file_does_not_change_the_number_of_epochs(killed, whole, tiny, tmp_path, tracking_db):
    """The file says 3, the option that started the run said 4."""
    file = tmp_path / "epochs.yaml"
    file.write_text("train: {epochs: 3}\n")
    with pytest.raises(UserError, match=r"train\.epochs 4, .*epochs\.yaml says 3: .*give the number of epochs"):
        resume(killed, config=file)
    file.write_text("train: {lr: 0.02, epochs: 3}\n")
    resume(killed, config=file, epochs=4)
    same_weights(killed, whole)


def test_a_number_of_epochs_that_is_given_counts(killed, data, settings, tracking_db, tmp_path):
    more = settings.model_copy(update={"train": settings.train.model_copy(update={"epochs": 5})})
    fit(data, more, tmp_path / "more", device="cpu")
    assert len(resume(killed, settings="train.epochs=5").fit.epochs) == 5
    a, b = (torch.load(out / "last.pt", weights_only=True)["model"] for out in (killed, tmp_path / "more"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    # It is recorded: the next one knows it.
    assert json.loads((killed / "config.json").read_text())["config"]["train"]["epochs"] == 5


def test_a_finished_run(whole, tracking_db, tmp_path, caplog, monkeypatch):
    out = shutil.copytree(whole, tmp_path / "run")
    monkeypatch.setattr(Learner, "step", lambda *_: pytest.fail("it trains"))
    caplog.set_level("INFO")
    result = resume(out)
    assert "the run is finished" in caplog.text
    assert result.fit.val == json.loads((out / "metrics.json").read_text())["val"]
    resume(out, epochs=EPOCHS)
    with pytest.raises(UserError, match="finished with 4 epochs"):
        resume(out, epochs=6)


def test_data_that_were_moved(killed, whole, data, tracking_db, tmp_path):
    config = json.loads((killed / "config.json").read_text())
    (killed / "config.json").write_text(json.dumps(config | {"data": str(tmp_path / "old")}))
    with pytest.raises(UserError, match=r"its data folder .*old is not there any more: give the folder"):
        resume(killed)
    moved = shutil.copytree(data, tmp_path / "moved")
    resume(killed, data=moved)
    same_weights(killed, whole)
    assert json.loads((killed / "config.json").read_text())["data"] == str(moved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"config\.json is missing"),
        ("", r"config\.json is damaged"),
        ('{"config": ', r"config\.json is damaged"),
        ("[]", r"config\.json is damaged"),
        ('{"config": 3, "data": "d", "fingerprint": "f"}', r"config\.json: "),
        ("data", r"config\.json: data"),
        ("device", r"config\.json: device"),
        ("init", r"config\.json: init"),
    ],
)
def test_a_damaged_record_is_one_line(killed, tracking_db, text, message):
    path = killed / "config.json"
    if text is None:
        path.unlink()
    else:
        found = json.loads(path.read_text())
        path.write_text(json.dumps(found | {text: 7}) if text in found else text)
    with pytest.raises(UserError, match=message) as error:
        resume(killed)
    assert "\n" not in str(error.value)


def test_nothing_to_resume(tmp_path, tracking_db, data, tiny):
    with pytest.raises(UserError, match="holds no run to resume: give data and mode"):
        resume(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(UserError, match="give data and mode"):
        resume(tmp_path / "none", data=data)
    assert len(resume(tmp_path / "none", data=data, mode="full", config=tiny, epochs=1).fit.epochs) == 1


def test_seeds(data, tiny, tracking_db, tmp_path, monkeypatch):
    file, out = shutil.copy(tiny, tmp_path / "mine.yaml"), tmp_path / "seeds"
    given = {"data": data, "mode": "full", "config": file, "epochs": 1, "device": "cpu"}
    trained, real = [], jobs._train

    def second_stops(parameters, config, run_id, known_init=None):
        if len(trained) == 1:
            trained.clear()
            raise KeyboardInterrupt
        trained.append(config.train.seed)
        return real(parameters, config, run_id, known_init)

    monkeypatch.setattr(jobs, "_train", second_stops)
    with pytest.raises(KeyboardInterrupt):
        jobs.seeds_job(p.SeedsParameters(out=out, seeds="4,5", **given))
    monkeypatch.setattr(jobs, "_train", real)
    # What the file says now does not matter: the seeds would not be comparable.
    file.unlink()
    for different, message in (
        ({"lr": 0.5}, r"train\.lr 0\.01, now it is 0\.5"),
        ({"epochs": 2}, r"train\.epochs 1, now it is 2"),
        ({"mode": "weak"}, "mode full"),
        ({"seeds": "5"}, "started with seed 4"),
    ):
        with pytest.raises(UserError, match=message):
            jobs.seeds_job(p.SeedsParameters(out=out, resume=True, **different))
    result = jobs.seeds_job(p.SeedsParameters(out=out, resume=True))
    assert result.by_seed.keys() == {"4", "5"}
    made = [json.loads((out / f"seed-{seed}" / "config.json").read_text())["config"]["train"] for seed in (4, 5)]
    assert made[0] | {"seed": 5} == made[1]
    with pytest.raises(UserError, match="already holds trainings"):
        jobs.seeds_job(p.SeedsParameters(out=out, seeds="4,5", data=data, mode="full"))
    with pytest.raises(UserError, match="holds no trainings to resume"):
        jobs.seeds_job(p.SeedsParameters(out=tmp_path / "none", resume=True))


def test_a_study_keeps_its_settings(data, tiny, tracking_db, tmp_path, monkeypatch):
    seen = []

    def searched(_data, **given):
        from search.study import open_study

        base = given["base"]
        settings = {"mode": given["mode"], "recipe": base.recipe, "base": base.model_dump(mode="json")}
        open_study(given["study"], settings, {}, seed=0, epochs=base.train.epochs)
        seen.append(base)
        raise UserError("stop")

    monkeypatch.setattr("search.worker.search", searched)
    monkeypatch.setenv("CMRAN_STUDY_STORAGE", f"sqlite:///{tmp_path}/studies.db")
    given = {"data": data, "mode": "full", "study": "s"}
    for more, message in (
        ({"config": tiny, "epochs": 2, "lr": 0.02}, "stop"),
        ({}, "stop"),
        ({"epochs": 2}, "stop"),
        ({"epochs": 3}, "epochs 2, not 3"),
        ({"recipe": "debug"}, "recipe published-full, not debug"),
        ({"mode": "weak"}, "mode full, not weak"),
    ):
        with pytest.raises(UserError, match=message):
            jobs.search_job(p.SearchParameters(**(given | more)))
    assert len(seen) == 3
    assert seen[0] == seen[1] == seen[2]
    assert (seen[1].train.epochs, seen[1].train.lr, seen[1].model.width) == (2, 0.02, 8)


def test_a_pipeline(data, tiny, tracking_db, tmp_path, monkeypatch):
    monkeypatch.chdir(data.parent)
    seen = []

    def stop(parameters):
        seen.append(parameters)
        raise KeyboardInterrupt

    steps = Steps(search=stop)
    out = tmp_path / "out"
    given = {"data": data.name, "config": tiny, "trials": 3, "modes": "weak", "settings": {"train.lr": 0.02}}
    with pytest.raises(KeyboardInterrupt):
        pipeline_job(p.PipelineParameters(out=out, device="cpu", batch_size=8, **given), steps=steps)
    monkeypatch.chdir(tmp_path)
    for different, message in (
        ({"trials": 20}, "trials 3, now it is 20"),
        ({"modes": "full,weak"}, "modes"),
        ({"settings": "train.lr=0.5"}, "settings"),
        ({"batch_size": 32}, "batch_size 8, now it is 32"),
    ):
        with pytest.raises(UserError, match=message):
            pipeline_job(p.PipelineParameters(out=out, resume=True, **different), steps=steps)
    with pytest.raises(KeyboardInterrupt):
        pipeline_job(p.PipelineParameters(out=out, resume=True), steps=steps)
    assert (seen[1].mode, seen[1].trials, seen[1].device, seen[1].settings) == ("weak", 3, "cpu", {"train.lr": 0.02})
    assert seen[1].data == data
    moved = shutil.copytree(data, tmp_path / "moved")
    with pytest.raises(KeyboardInterrupt):
        pipeline_job(p.PipelineParameters(out=out, data=moved, resume=True), steps=steps)
    (moved / "Annotations.txt").unlink()
    with pytest.raises(UserError, match="begun on data with fingerprint"):
        pipeline_job(p.PipelineParameters(out=out, data=moved, resume=True), steps=steps)


def test_a_prediction_keeps_what_is_not_given(tmp_path):
    from serving.batch import Job

    job = {"format": 1, "model_digest": "a", "fingerprint": "b", "split": "val", "rows": 3, "batch_size": 8}
    job |= {"block_batches": 4, "variant": "int8", "provider": "c", "onnxruntime": "d"}
    (tmp_path / "job.json").write_text(Job(**job).model_dump_json())
    given = {"model": "models:/m/1", "data": "d", "out": tmp_path}
    kept = jobs._as_before(p.PredictParameters(**given, resume=True))
    assert (kept.split, kept.batch_size, kept.variant) == ("val", 8, "int8")
    kept = jobs._as_before(p.PredictParameters(**given, resume=True, split="test", batch_size=32))
    assert (kept.split, kept.batch_size, kept.variant) == ("test", 32, "int8")
    assert jobs._as_before(p.PredictParameters(**given)).split == "test"


def test_the_command(cmran, killed, whole, tmp_path):
    """The real command: the folder alone; and what must be given otherwise."""
    other = shutil.copytree(killed, tmp_path / "other")
    # Sums are rounded in another order with another number of threads.
    threads = torch.get_num_threads()
    done = cmran("train", "--out", killed, "--resume", OMP_NUM_THREADS=str(threads))
    assert done.returncode == 0, done.stderr
    assert "threads" not in done.stderr
    same_weights(killed, whole)
    if threads > 1:
        done = cmran("train", "--out", other, "--resume", OMP_NUM_THREADS="1")
        assert f"resumed with 1 threads, the run used {threads}" in done.stderr
    done = cmran("train", "--out", tmp_path / "new", "--mode", "full")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "DATA is needed" in done.stderr
