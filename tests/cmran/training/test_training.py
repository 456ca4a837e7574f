"""Training: one step, whole runs, reproducibility, resume after interruptions and kills, and errors."""

import csv
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cmran.config import Device, RunConfig
from cmran.data import feature_cache
from cmran.data.dataset import open_folder
from cmran.data.device_cache import DeviceCacheSlot
from cmran.data.fingerprint import folder_fingerprint
from cmran.errors import CheckpointError, CmranError
from cmran.model.checkpoints import import_published, load_model
from cmran.model.losses import compute_loss
from cmran.model.network import CMRAN
from cmran.training.inference import evaluate_split, predict
from cmran.training.run_dir import read_result
from cmran.training.step import INPUTS, TrainStep
from cmran.training.trainer import fit
from cmran.utils import progress
from cmran.utils.device import has_bfloat16
from cmran.utils.files import log_once
from tests.cmran.tiny import tiny_config, tiny_model
from tests.conftest import ROOT
from tests.devices import on_cuda, without_cuda
from tests.filesystems import lacking
from tests.golden import published
from tests.helpers import make_folder, read, write

BFLOAT16 = pytest.param(
    "bfloat16",
    marks=pytest.mark.skipif(not has_bfloat16(torch.device("cpu")), reason="this CPU has no native bfloat16"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data") / "ave", 24)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def same_state(first: Path, second: Path) -> None:
    """Assert that two checkpoints are equal, except for the duration of the epochs."""
    a, b = (torch.load(path, weights_only=True) for path in (first, second))
    for state in (a, b):
        for epoch in state.get("history", []):
            del epoch["seconds"]
    assert a.keys() == b.keys()
    for key in a:
        assert_same(a[key], b[key], key)


def assert_same(a, b, where):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    else:
        assert a == b, where


def lines_of(run: Path) -> list[dict[str, str]]:
    """Read the lines of epochs.csv."""
    with (run / "epochs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def cut_and_resumed(data: Path, config: RunConfig, out: Path, device: Device) -> None:
    """Interrupt a run after its second epoch, and resume it."""

    def stop(record):
        if record.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(data, config, out, device=device, on_epoch=stop)
    fit(data, config, out, device=device, resume=True)


@pytest.mark.parametrize("mode", ["full", "weak"])
def test_run_directory_is_complete(data, tmp_path, mode):
    seen = []
    result = fit(data, tiny_config(mode), tmp_path / "run", device="cpu", on_epoch=seen.append)

    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert [epoch["epoch"] for epoch in metrics["epochs"]] == [1, 2, 3] == [record.epoch for record in seen]
    assert [epoch["lr"] for epoch in metrics["epochs"]] == [0.01, 0.01, 0.005]
    assert metrics["val"]["accuracy"] == max(epoch["val"]["accuracy"] for epoch in metrics["epochs"])
    assert metrics["test"]["videos"] == len(read(data / "test_order.h5", "order"))
    assert result.best_epoch == metrics["best_epoch"]
    for name in ("last.pt", "best.pt"):
        assert torch.load(tmp_path / "run" / name, weights_only=True)["fingerprint"] == result.fingerprint

    best = metrics["val"]["accuracy"]
    named = tmp_path / "run" / f"model_epoch_{result.best_epoch}_top1_{best:.3f}_task_Supervised_best_model.pth.tar"
    assert [named] == list((tmp_path / "run").glob("model_epoch_*"))
    stored = torch.load(named, weights_only=True)
    assert all(key.startswith("module.") for key in stored)
    # One layer instead of the two published ones.
    missing = {f"module.{key}" for key in published.KEYS[mode] if ".encoder.layers.1." not in key} ^ set(stored)
    assert not missing

    model, _ = load_model(tmp_path / "run")
    with open_folder(data, mode=mode) as folder:
        again, _ = evaluate_split(model, folder, "val")
    assert again.accuracy == metrics["val"]["accuracy"]
    assert read_result(tmp_path / "run") == result


def test_runs_repeat_and_depend_on_the_seed(data, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        fit(data, tiny_config(seed=seed), tmp_path / name, device="cpu")
    same_state(tmp_path / "a" / "last.pt", tmp_path / "b" / "last.pt")
    a, c = weights(tmp_path / "a" / "last.pt"), weights(tmp_path / "c" / "last.pt")
    assert any(not torch.equal(a[key], c[key]) for key in a)


def test_run_does_not_change_the_callers_random_numbers(data, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit(data, tiny_config(epochs=1), tmp_path / "run", device="cpu")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "float32"},
        {"precision": "float64"},
        pytest.param({"precision": "bfloat16"}, marks=BFLOAT16.marks),
        {"lr_schedule": "cosine", "warmup_epochs": 1, "lr_min_factor": 0.1},
        {"eval_every": 2},
        # Killed before the first evaluation: there is no best.pt yet.
        {"eval_every": 3},
        {"patience": 1, "lr": 1e-8},
    ],
)
def test_resume_after_an_interruption_is_bit_identical(data, tmp_path, changes):
    config = tiny_config(epochs=4, **changes)
    fit(data, config, tmp_path / "whole", device="cpu")
    cut_and_resumed(data, config, tmp_path / "cut", "cpu")
    for name in ("last.pt", "best.pt"):
        same_state(tmp_path / "whole" / name, tmp_path / "cut" / name)


def test_resume_with_a_damaged_or_missing_feature_cache_is_bit_identical(data, tmp_path, caplog):
    config = tiny_config("weak", epochs=4)
    fit(data, config, tmp_path / "whole", device="cpu")
    caches = [entry.path for entry in feature_cache.list_caches() if entry.fingerprint == folder_fingerprint(data)]
    assert len(caches) == 2

    def spoil(record):
        if record.epoch == 2:
            # Damage the first rows.
            for cache in caches:
                with cache.open("r+b") as file:
                    # Behind the header.
                    file.seek(128)
                    file.write(b"\1" * 5000)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(data, config, tmp_path / "cut", device="cpu", on_epoch=spoil)
    fit(data, config, tmp_path / "cut", device="cpu", resume=True)
    assert "damaged" in caplog.text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_cache, "LIMIT_BYTES", 1)
        feature_cache.clear_caches()
        fit(data, config, tmp_path / "direct", device="cpu")
        assert feature_cache.list_caches() == []
    for name in ("last.pt", "best.pt"):
        same_state(tmp_path / "whole" / name, tmp_path / "cut" / name)
        same_state(tmp_path / "whole" / name, tmp_path / "direct" / name)


@pytest.mark.parametrize(("precision", "features"), [("float32", "float16"), ("float64", "stored")])
def test_features_follow_the_setting(data, tmp_path, precision, features):
    """The default of the precision equals the setting named here; the other setting gives other weights."""
    feature_cache.clear_caches()
    fit(data, tiny_config(epochs=1, precision=precision), tmp_path / "default", device="cpu")
    assert bool(feature_cache.list_caches()) == (features == "float16")
    fit(data, tiny_config(epochs=1, precision=precision, features=features), tmp_path / "named", device="cpu")
    other = "float16" if features == "stored" else "stored"
    fit(data, tiny_config(epochs=1, precision=precision, features=other), tmp_path / "other", device="cpu")
    default, named, third = (weights(tmp_path / name / "last.pt") for name in ("default", "named", "other"))
    assert_same(default, named, "model")
    assert any(not torch.equal(default[key], third[key]) for key in default)
    assert all(torch.allclose(default[key], third[key], atol=1e-2) for key in default)


CHILD = """
import sys
from pathlib import Path
from cmran.training.trainer import fit
from tests.cmran.tiny import tiny_config
fit(Path(sys.argv[1]), tiny_config("weak", epochs=6), Path(sys.argv[2]), device="cpu", resume=True)
"""


def child(data: Path, out: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", CHILD, str(data), str(out)], cwd=ROOT, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_resume_after_kills_at_any_moment_is_bit_identical(data, tmp_path):
    assert child(data, tmp_path / "whole").wait() == 0
    rng = np.random.default_rng(0)
    kills = 0
    for _ in range(4):
        process = child(data, tmp_path / "cut")
        # Kill it as soon as config.json exists, then at a random moment of the epochs.
        while process.poll() is None and not (tmp_path / "cut" / "config.json").exists():
            time.sleep(0.005)
        time.sleep(float(rng.uniform(0, 0.5)) if kills else 0.0)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills
    assert child(data, tmp_path / "cut").wait() == 0
    for name in ("last.pt", "best.pt"):
        same_state(tmp_path / "whole" / name, tmp_path / "cut" / name)
    a, b = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "cut"))
    assert a["test"] == b["test"]
    assert a["val"] == b["val"]
    assert len(list((tmp_path / "cut").glob("model_epoch_*"))) == 1
    assert [line["epoch"] for line in lines_of(tmp_path / "cut")] == ["1", "2", "3", "4", "5", "6"]


@pytest.mark.parametrize(("native", "chosen"), [(True, "bfloat16"), (False, "float32")])
def test_precision_auto_follows_the_hardware_and_is_kept(data, tmp_path, monkeypatch, caplog, native, chosen):
    monkeypatch.setattr("cmran.utils.device.has_bfloat16", lambda device: native)
    log_once.cache_clear()
    caplog.set_level("INFO")
    result = fit(data, tiny_config(epochs=1, precision="auto"), tmp_path / "run", device="cpu")
    assert f"precision auto: {chosen}" in caplog.text
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["config"]["train"]["precision"] == chosen == result.config.train.precision
    # On this hardware "auto" and the precision that it selects are the same run; on other hardware they are not.
    for precision in ("auto", chosen):
        again = fit(data, tiny_config(epochs=1, precision=precision), tmp_path / "run", device="cpu", resume=True)
        assert again == result
    monkeypatch.setattr("cmran.utils.device.has_bfloat16", lambda device: not native)
    with pytest.raises(CmranError, match="precision"):
        fit(data, tiny_config(epochs=1, precision="auto"), tmp_path / "run", device="cpu", resume=True)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_device_cache_does_not_change_the_training(data, tmp_path, monkeypatch, precision):
    monkeypatch.setattr("cmran.utils.device.has_bfloat16", lambda device: True)
    config = tiny_config("weak", precision=precision)
    caches, load = [], DeviceCacheSlot.load
    monkeypatch.setattr(DeviceCacheSlot, "load", lambda *given: caches.append(load(*given)) or caches[-1])
    fit(data, config, tmp_path / "cached", device="cpu")
    assert caches[-1] is not None
    monkeypatch.setattr(DeviceCacheSlot, "load", lambda *_: None)
    fit(data, config, tmp_path / "read", device="cpu")
    for name in ("last.pt", "best.pt"):
        same_state(tmp_path / "read" / name, tmp_path / "cached" / name)


@on_cuda
@pytest.mark.parametrize("mode", ["full", "weak"])
@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
def test_cuda_graph_step_equals_the_eager_step(mode, precision):
    config = tiny_config(mode, batch_size=3, precision=precision)
    torch.manual_seed(3)
    train_steps = [TrainStep(config, torch.device("cuda")) for _ in range(2)]
    train_steps[1].model.load_state_dict(train_steps[0].model.state_dict())
    steps = [train_steps[0].eager_step, train_steps[1].step]
    generator = torch.Generator().manual_seed(4)
    states = [torch.cuda.get_rng_state()] * 2
    # Full batches, shorter ones between them, and another learning rate, one after the other.
    for number, videos in enumerate([3, 3, 2, 3, 3, 1, 3]):
        batch = [
            torch.rand(videos, 4, 2, 2, 6, generator=generator),
            torch.rand(videos, 4, 5, generator=generator),
            torch.eye(29)[torch.randint(29, (videos, 4) if mode == "full" else (videos,), generator=generator)],
        ]
        batch = [value.to("cuda", INPUTS[precision]) for value in batch]
        results = []
        for which in range(2):
            train_steps[which].optimizer.param_groups[0]["lr"] = 0.01 if number < 4 else 0.001
            torch.cuda.set_rng_state(states[which])
            results.append(steps[which](*batch))
            states[which] = torch.cuda.get_rng_state()
        for eager, replayed in zip(*results, strict=True):
            assert torch.equal(eager, replayed), f"step {number}"
        assert torch.equal(*states), f"step {number}"
    assert_same(train_steps[0].model.state_dict(), train_steps[1].model.state_dict(), "weights")


@on_cuda
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
def test_runs_on_a_gpu_repeat_and_resume_bit_identically(data, tmp_path, monkeypatch, precision, cached):
    if not cached:
        monkeypatch.setattr(DeviceCacheSlot, "load", lambda *_: None)
    config = tiny_config("weak", epochs=4, precision=precision)
    for name in ("whole", "again"):
        fit(data, config, tmp_path / name, device="cuda")
    same_state(tmp_path / "whole" / "last.pt", tmp_path / "again" / "last.pt")
    cut_and_resumed(data, config, tmp_path / "cut", "cuda")
    for name in ("last.pt", "best.pt"):
        same_state(tmp_path / "whole" / name, tmp_path / "cut" / name)
    (tmp_path / "cut" / "metrics.json").unlink()
    with pytest.raises(CmranError, match="began on a GPU"):
        fit(data, config, tmp_path / "cut", device="cpu", resume=True)


def test_selection_on_test_is_marked(data, tmp_path):
    config = tiny_config(selection_split="test")
    result = fit(data, config, tmp_path / "run", device="cpu")
    assert all(record.test is not None for record in result.epochs)
    assert result.epochs[-1].best_accuracy == max(record.test["accuracy"] for record in result.epochs)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["selection_split"] == "test"


def test_test_split_is_optional(data, tmp_path):
    assert fit(data, tiny_config(epochs=1), tmp_path / "run", device="cpu", evaluate_test=False).test is None


@pytest.mark.parametrize("precision", ["float32", BFLOAT16])
def test_non_finite_features_name_the_rows(data, tmp_path, precision):
    config = tiny_config(precision=precision)
    folder = make_folder(tmp_path / "bad", 24)
    visual = read(folder / "visual_feature.h5")
    bad = int(read(folder / "train_order.h5", "order")[0])
    visual[bad, 0, 0, 0, 0] = np.nan
    write(folder / "visual_feature.h5", visual)
    with pytest.raises(CmranError, match=rf"loss is nan at epoch 1, step \d+, rows .*\b{bad}\b") as error:
        fit(folder, config, tmp_path / "run", device="cpu")
    assert "\n" not in str(error.value)
    # No epoch was finished: with repaired data the same call succeeds.
    write(folder / "visual_feature.h5", np.nan_to_num(visual))
    assert len(fit(folder, config, tmp_path / "run", device="cpu").epochs) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.02}, "train.lr 0.01, now it is 0.02"),
        ({"model": {"width": 16}}, "model.width 8, now it is 16"),
        ({"epochs": 5}, "finished with 3 epochs"),
    ],
)
def test_resume_rejects_other_settings(data, tmp_path, changes, message):
    fit(data, tiny_config(), tmp_path / "run", device="cpu")
    with pytest.raises(CmranError, match=message):
        fit(data, tiny_config(**changes), tmp_path / "run", device="cpu", resume=True)
    with pytest.raises(CmranError, match="already holds a run"):
        fit(data, tiny_config(), tmp_path / "run", device="cpu")


def test_resume_rejects_other_data(data, tmp_path):
    fit(data, tiny_config(), tmp_path / "run", device="cpu")
    other = make_folder(tmp_path / "other", 24, seed=3)
    with pytest.raises(CmranError, match="fingerprint"):
        fit(other, tiny_config(), tmp_path / "run", device="cpu", resume=True)


def test_number_of_epochs_may_be_raised_before_the_end(data, tmp_path):
    def stop(record):
        if record.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(data, tiny_config(epochs=3), tmp_path / "run", device="cpu", on_epoch=stop)
    fit(data, tiny_config(epochs=5), tmp_path / "run", device="cpu", resume=True)
    fit(data, tiny_config(epochs=5), tmp_path / "whole", device="cpu")
    assert_same(weights(tmp_path / "run" / "last.pt"), weights(tmp_path / "whole" / "last.pt"), "model")


def test_damaged_checkpoint_is_reported(data, tmp_path):
    fit(data, tiny_config(), tmp_path / "run", device="cpu", on_epoch=None)
    (tmp_path / "run" / "metrics.json").unlink()
    last = tmp_path / "run" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(CmranError, match=r"last\.pt"):
        fit(data, tiny_config(), tmp_path / "run", device="cpu", resume=True)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", lambda found: found["config"]["train"].update(compile=True), r"train\.compile"),
        ("config.json", lambda found: found.pop("config"), "it lacks config"),
        ("config.json", lambda found: found["config"].pop("model"), r"config\.json: model"),
        ("metrics.json", lambda found: found.pop("val"), "of another version"),
        ("metrics.json", lambda found: found["epochs"][0].update(mood="good"), "of another version"),
    ],
)
def test_files_of_another_version_are_reported(data, tmp_path, name, change, message):
    fit(data, tiny_config(), tmp_path / "run", device="cpu")
    found = json.loads((tmp_path / "run" / name).read_text())
    change(found)
    (tmp_path / "run" / name).write_text(json.dumps(found))
    with pytest.raises(CmranError, match=message):
        fit(data, tiny_config(), tmp_path / "run", device="cpu", resume=True)


def interrupt_after(data, out, epoch, **changes):
    """Interrupt a run when the files of `epoch` are on disk."""

    def stop(record):
        if record.epoch == epoch:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(data, tiny_config(**changes), out, device="cpu", on_epoch=stop)


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
@pytest.mark.parametrize("damage", ["bit", "gone", "other run", "cut"])
def test_unusable_checkpoints_are_reported_before_training(data, tmp_path, monkeypatch, name, damage):
    interrupt_after(data, tmp_path / "run", 2)
    file = tmp_path / "run" / name
    content = bytearray(file.read_bytes())
    if damage == "bit":
        # One of the values of the first tensor.
        content[content.find(b"data/0") + 128] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-100])
    elif damage == "gone":
        if name == "last.pt":
            pytest.skip("a run without last.pt starts from the beginning")
        file.unlink()
    else:
        interrupt_after(data, tmp_path / "other", 2, seed=7)
        file.write_bytes((tmp_path / "other" / name).read_bytes())
    monkeypatch.setattr(TrainStep, "step", lambda *_: pytest.fail("it must not train"))
    with pytest.raises(CmranError, match=name.replace(".", r"\.")) as error:
        fit(data, tiny_config(), tmp_path / "run", device="cpu", resume=True)
    assert "\n" not in str(error.value)


def test_best_epoch_beyond_the_last_is_rejected(data, tmp_path):
    """Killed between the writes of best.pt and last.pt, then resumed with fewer epochs."""
    run = tmp_path / "run"
    interrupt_after(data, run, 2)
    last = (run / "last.pt").read_bytes()
    shutil.rmtree(run)
    interrupt_after(data, run, 3, epochs=5)
    state = torch.load(run / "last.pt", weights_only=True)
    best = {key: value for key, value in state.items() if key not in ("optimizer", "random", "history")}
    torch.save(best, run / "best.pt")
    (run / "last.pt").write_bytes(last)
    with pytest.raises(CmranError, match="more epochs than the 2 asked for"):
        fit(data, tiny_config(epochs=2), run, device="cpu", resume=True)
    # Repeated, the epoch is not the best, as on a machine with other rounding: its old weights must not be evaluated.
    with pytest.raises(CmranError, match=r"best\.pt is of epoch 3, expected 1: numerics differ"):
        fit(data, tiny_config(epochs=5), run, device="cpu", resume=True)
    assert not (run / "metrics.json").exists()


@pytest.mark.parametrize("split", ["val", "test", "train"])
@pytest.mark.parametrize("name", ["audio_feature.h5", "visual_feature.h5"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_features_that_are_not_finite_are_named(tmp_path, split, name, value):
    folder = make_folder(tmp_path / "data", 24)
    row = int(read(folder / f"{split}_order.h5", "order")[0])
    values = read(folder / name)
    values[row].reshape(-1)[1] = value
    write(folder / name, values)
    message = rf"not_finite: {name} \[avadataset\], row {row}:"
    seen = []
    with pytest.raises(CmranError, match=message):
        fit(folder, tiny_config(), tmp_path / "run", device="cpu", on_epoch=seen.append)
    if split == "val":
        assert seen == []


def test_weights_that_are_not_finite_are_reported(data):
    model = CMRAN(tiny_model())
    torch.nn.init.constant_(model.event_head.bias, float("inf"))
    with open_folder(data) as folder, pytest.raises(CmranError, match=r"outputs are not finite for rows .* weights"):
        predict(model, folder, folder.order("val"))


def test_splits_that_share_videos_are_rejected(tmp_path):
    folder = make_folder(tmp_path / "data", 24)
    train, val = (read(folder / f"{split}_order.h5", "order") for split in ("train", "val"))
    val[0] = train[3]
    write(folder / "val_order.h5", val, "order")
    with pytest.raises(CmranError, match=rf"order_overlap: val_order\.h5 \[order\], row {train[3]}:.*train_order\.h5"):
        fit(folder, tiny_config(epochs=1), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_temporary_files_of_a_killed_run_are_removed(data, tmp_path):
    for name in (".last.pt.abc.tmp", ".best.pt.abc.tmp", ".model_epoch_1_x.pth.tar.abc.tmp", ".mine.tmp"):
        (tmp_path / name).write_bytes(b"half")
    fit(data, tiny_config(), tmp_path, device="cpu")
    assert [path.name for path in tmp_path.glob(".*.tmp")] == [".mine.tmp"]


def test_feature_widths_that_do_not_fit_are_reported(data, tmp_path):
    with pytest.raises(CmranError, match="6 visual_features, the settings say 7"):
        fit(data, tiny_config(model={"visual_features": 7}), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run" / "config.json").exists()


def out_of_memory(*_, **__):
    raise MemoryError


def allocation_refused(*_, **__):
    # On a CPU torch raises a plain RuntimeError.
    torch.empty(1 << 50)


@pytest.mark.parametrize("where", ["DeviceCacheSlot", "TrainStep", "predict"])
@pytest.mark.parametrize("fails", [out_of_memory, allocation_refused])
def test_out_of_memory_is_reported(data, tmp_path, monkeypatch, where, fails):
    monkeypatch.setattr(f"cmran.training.trainer.{where}", fails)
    with pytest.raises(CmranError, match=r"out of memory on cpu: lower train\.batch_size \(4\)"):
        fit(data, tiny_config(), tmp_path / "run", device="cpu")


def test_other_errors_are_not_wrapped(data, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr("cmran.training.trainer.DeviceCacheSlot", broken)
    with pytest.raises(RuntimeError, match="something else"):
        fit(data, tiny_config(), tmp_path / "run", device="cpu")


def test_prefetching_stops_when_prediction_fails(data, monkeypatch):
    def broken(*_):
        raise RuntimeError("a broken network")

    monkeypatch.setattr("cmran.training.inference.compute_outputs", broken)
    with open_folder(data) as folder, pytest.raises(RuntimeError, match="a broken network") as error:
        predict(_model()[0], folder, folder.order("train"), batch_size=1)
    # The test keeps the error, and thereby the frames with the generator.
    assert error.tb is not None
    assert not [thread for thread in threading.enumerate() if thread.name == "cmran-read-ahead"]


FULL_DISK = """
import resource, sys
from pathlib import Path
from cmran.errors import CheckpointError, CmranError
from cmran.training.trainer import fit
from tests.cmran.tiny import tiny_config
data, out = Path(sys.argv[1]), Path(sys.argv[2])
def no_more_room(record):
    if record.epoch == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
try:
    fit(data, tiny_config(epochs=4), out, device="cpu", on_epoch=no_more_room)
except CmranError as error:
    print(error)
    sys.exit(1)
"""


LACKING = """
import logging, sys
from pathlib import Path
from cmran.training.trainer import fit
from tests.cmran.tiny import tiny_config
logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
for resume in (False, True):
    result = fit(Path(sys.argv[1]), tiny_config(epochs=2), Path(sys.argv[2]), device="cpu", resume=resume)
print(repr(result.val["accuracy"]))
"""


def test_training_on_a_limited_file_system(data, tmp_path):
    """Data, output and cache are on a file system without locks, syncs and other optional operations."""
    root = tmp_path / "lacking"
    shutil.copytree(data, root / "data")
    calls = "flock,sync,syncfolder,chmod,utime,fadvise,preadv2,link,statvfs"
    done = lacking(
        "-c", LACKING, root / "data", root / "run",
        calls=calls, number=errno.EINVAL, XDG_CACHE_HOME=root / "cache", HDF5_USE_FILE_LOCKING=None,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plain = fit(data, tiny_config(epochs=2), tmp_path / "run", device="cpu")
    assert float(done.stdout) == plain.val["accuracy"]
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 1, done.stderr
    assert f"{root / 'run'}: its file system has no locks (Invalid argument)" in warnings[0]
    assert list((root / "cache").rglob("*.npy"))


def test_out_of_disk_keeps_the_finished_epochs(data, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(data), str(tmp_path / "run")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "cannot write" in done.stdout
    assert "File too large" in done.stdout
    assert len(torch.load(tmp_path / "run" / "last.pt", weights_only=True)["history"]) == 2
    assert not list((tmp_path / "run").glob("*.tmp"))
    fit(data, tiny_config(epochs=4), tmp_path / "run", device="cpu", resume=True)


@without_cuda
def test_cuda_is_never_replaced_silently(data, tmp_path):
    with pytest.raises(CmranError, match="no CUDA device works"):
        fit(data, tiny_config(), tmp_path / "run", device="cuda")
    assert not (tmp_path / "run").exists()


def test_predictions_do_not_depend_on_the_batch(data):
    model, _ = _model()
    with open_folder(data) as folder:
        rows = folder.order("train")
        one = predict(model, folder, rows, batch_size=1)
        many = predict(model, folder, rows, batch_size=5)
    np.testing.assert_allclose(one.event_logits, many.event_logits, atol=1e-5)
    np.testing.assert_array_equal(one.segments, many.segments)
    np.testing.assert_allclose(one.event_probability, 1 / (1 + np.exp(-one.event_logits)))


def test_published_export_reads_back(tmp_path):
    from cmran.config import ModelConfig
    from cmran.model.checkpoints import export_published
    from cmran.model.network import CMRAN

    torch.manual_seed(0)
    model = CMRAN(ModelConfig(mode="weak"))
    again = import_published(export_published(model), "weak")
    assert_same(dict(model.state_dict()), dict(again.state_dict()), "model")


def _model():
    from cmran.model.network import CMRAN

    torch.manual_seed(0)
    config = tiny_config()
    return CMRAN(config.model), config


@pytest.mark.parametrize("mode", ["full", "weak"])
@pytest.mark.parametrize("split", ["val", "test"])
def test_loss_of_an_epoch_is_the_training_loss_without_dropout(data, tmp_path, mode, split):
    result = fit(data, tiny_config(mode, epochs=2, selection_split=split), tmp_path / "run", device="cpu")
    model, state = load_model(tmp_path / "run" / "last.pt")
    with open_folder(data, mode=mode, features="float16") as folder:
        rows = folder.order(split)
        vectors = folder.segment_label_vectors if mode == "full" else folder.video_label_vectors
        visual, audio = (torch.from_numpy(read(rows)) for read in (folder.read_visual, folder.read_audio))
        with torch.no_grad():
            outputs = model(visual.half().float(), audio.float())
            expected = float(compute_loss(outputs, torch.from_numpy(vectors(rows)), mode))
        assert predict(model, folder, rows).loss is None
        # The mean over the videos, for any batch size, with a shorter last batch.
        losses = [predict(model, folder, rows, batch_size=size, with_loss=True).loss for size in (1, 2, len(rows))]
    assert state["epoch"] == 2
    assert getattr(result.epochs[-1], split)["loss"] == pytest.approx(expected, rel=1e-5)
    assert losses == [pytest.approx(expected, rel=1e-5)] * 3
    assert (result.epochs[0].test is None) == (split == "val")


def test_epochs_without_evaluation_have_no_scores_and_are_never_the_best(data, tmp_path, caplog):
    caplog.set_level("INFO")
    config = tiny_config(epochs=5, eval_every=2)
    result = fit(data, config, tmp_path / "run", device="cpu")
    every = fit(data, tiny_config(epochs=5), tmp_path / "every", device="cpu")
    # Evaluation does not change the training.
    assert_same(weights(tmp_path / "run" / "last.pt"), weights(tmp_path / "every" / "last.pt"), "model")
    assert [record.val is None for record in result.epochs] == [True, False, True, False, False]
    for record, full in zip(result.epochs, every.epochs, strict=True):
        assert record.train_loss == full.train_loss
        assert record.val in (None, full.val)
    assert (result.epochs[0].best_epoch, result.epochs[0].best_accuracy) == (None, None)
    scores = {record.epoch: record.val["accuracy"] for record in result.epochs if record.val}
    assert result.best_epoch == max(scores, key=scores.get)
    assert read_result(tmp_path / "run") == result
    assert [line["val_accuracy"] != "" for line in lines_of(tmp_path / "run")] == [False, True, False, True, True]
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("epoch ")][:2]
    assert f"loss {result.epochs[0].train_loss:.4f}, lr 0.01, " in lines[0]
    assert "val" not in lines[0]
    assert f"val {scores[2]:.2f} % (loss {result.epochs[1].val['loss']:.4f}), best on val" in lines[1]


def test_epochs_csv_has_every_epoch_once_with_all_digits(data, tmp_path):
    result = fit(data, tiny_config("weak"), tmp_path / "run", device="cpu")
    lines = lines_of(tmp_path / "run")
    assert len(lines) == 3
    for line, record in zip(lines, result.epochs, strict=True):
        assert int(line["epoch"]) == record.epoch
        assert float(line["lr"]) == record.lr
        assert float(line["train_loss"]) == record.train_loss
        assert line["train_accuracy"] == ""
        assert float(line["val_loss"]) == record.val["loss"]
        assert float(line["val_accuracy"]) == record.val["accuracy"]
        assert int(line["best_epoch"]) == record.best_epoch
        assert float(line["seconds"]) == record.seconds
    assert not any("test" in key for key in lines[0])
    fit(data, tiny_config(epochs=1, selection_split="test"), tmp_path / "test", device="cpu")
    assert float(lines_of(tmp_path / "test")[0]["test_selected_on_test_accuracy"]) >= 0


@pytest.mark.parametrize("at", [1, 3])
def test_epochs_csv_is_rebuilt_after_a_kill_before_it_was_written(data, tmp_path, monkeypatch, at):
    """Killed between last.pt and epochs.csv of epoch `at`: the resumed run writes the whole file."""
    from cmran.utils.files import write_text

    def killed(path, text):
        if text.count("\n") == at + 1:
            raise KeyboardInterrupt
        write_text(path, text)

    monkeypatch.setattr("cmran.training.run_dir.write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(data, tiny_config(), tmp_path / "run", device="cpu")
    monkeypatch.undo()
    assert len(torch.load(tmp_path / "run" / "last.pt", weights_only=True)["history"]) == at
    assert len(lines_of(tmp_path / "run")) == at - 1
    (tmp_path / "run" / "epochs.csv").write_text("epoch,lr\n1,0")
    (tmp_path / "run" / ".epochs.csv.abc.tmp").write_text("half")
    fit(data, tiny_config(), tmp_path / "run", device="cpu", resume=True)
    assert [line["epoch"] for line in lines_of(tmp_path / "run")] == ["1", "2", "3"]
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_early_stopping_ends_the_run_with_a_reason(data, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    # The steps are so small that no label changes: the first evaluation stays the best.
    config = tiny_config(epochs=50, lr=1e-8, patience=2, eval_every=3)
    result = fit(data, config, tmp_path / "run", device="cpu")
    assert result.best_epoch == 3
    assert len(result.epochs) == 9
    assert [record.evaluations_since_best for record in result.epochs] == [0, 0, 0, 0, 0, 1, 1, 1, 2]
    assert result.stopped_early
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["stopped_early"] is True
    reason = "early stopping after epoch 9 of 50: no better accuracy on val since epoch 3 (train.patience 2)"
    assert reason in metrics["stop_reason"]
    assert reason in caplog.text
    # Resuming returns the finished run; without metrics.json only the scores are computed again.
    monkeypatch.setattr(TrainStep, "step", lambda *_: pytest.fail("it must not train"))
    assert fit(data, config, tmp_path / "run", device="cpu", resume=True) == result
    (tmp_path / "run" / "metrics.json").unlink()
    again = fit(data, config, tmp_path / "run", device="cpu", resume=True)
    assert (again.epochs, again.val, again.test) == (result.epochs, result.val, result.test)


def test_run_without_early_stop_has_a_reason(data, tmp_path):
    result = fit(data, tiny_config(epochs=2, patience=2), tmp_path / "run", device="cpu")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["stopped_early"], metrics["stop_reason"]) == (False, "all 2 epochs are trained")
    assert not result.stopped_early


def test_cosine_schedule_is_used_in_training(data, tmp_path):
    config = tiny_config(epochs=4, lr_schedule="cosine", warmup_epochs=1)
    result = fit(data, config, tmp_path / "run", device="cpu")
    assert [record.lr for record in result.epochs] == [config.train.learning_rate(epoch) for epoch in range(1, 5)]
    assert result.epochs[0].lr == 0.005
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert state["optimizer"]["param_groups"][0]["lr"] == result.epochs[-1].lr


def test_other_epochs_are_rejected_if_the_learning_rate_depends_on_them(data, tmp_path):
    cosine = {"lr_schedule": "cosine"}
    interrupt_after(data, tmp_path / "run", 2, epochs=4, **cosine)
    with pytest.raises(
        CmranError, match=r"epoch 2 was trained at learning rate 0\.00853553.*resume with 4 epochs"
    ) as error:
        fit(data, tiny_config(epochs=6, **cosine), tmp_path / "run", device="cpu", resume=True)
    assert "\n" not in str(error.value)
    assert len(fit(data, tiny_config(epochs=4, **cosine), tmp_path / "run", device="cpu", resume=True).epochs) == 4


def test_checkpoint_of_an_older_format_is_rejected(data, tmp_path):
    interrupt_after(data, tmp_path / "run", 2)
    last = tmp_path / "run" / "last.pt"
    state = torch.load(last, weights_only=True)
    state["optimiser"] = state.pop("optimizer")
    torch.save(state | {"format": 1}, last)
    with pytest.raises(
        CheckpointError, match=r"last\.pt: found checkpoint format 1, expected 2: .*train again"
    ) as error:
        fit(data, tiny_config(), tmp_path / "run", device="cpu", resume=True)
    assert "\n" not in str(error.value)


def test_progress_of_an_epoch_shows_loss_and_learning_rate(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    fit(data, tiny_config(epochs=1, max_batches=2), tmp_path / "run", device="cpu")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch 1: ")]
    assert len(lines) == 2
    assert all(
        re.fullmatch(r"epoch 1: [48]/8 videos, .*, \d+ s left, loss \d+\.\d{4}, lr 0\.01", line) for line in lines
    )
