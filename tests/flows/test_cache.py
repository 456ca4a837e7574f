"""`cmran pack` and `cmran cache`, and evaluation with the features of the training."""

import json
import shutil

import pytest

from cmran.data import feature_cache
from cmran.data.fingerprint import folder_fingerprint
from cmran.training.trainer import fit
from flows.cli import main
from tests.cmran.tiny import tiny_config
from tests.helpers import make_folder


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "data", 24)


def test_pack_list_limit_and_clear(folder, capsys):
    assert main(["pack", str(folder), "--mode", "weak"]) == 0
    fingerprint = folder_fingerprint(folder)
    out = capsys.readouterr().out
    assert out.count(fingerprint) == 2
    assert "visual_feature_noisy.h5" in out
    assert main(["cache", "--limit-gib", "7"]) == 0
    out = capsys.readouterr().out
    assert "Packs: 2, 0.00 GiB; at most 7 GiB" in out
    assert out.count("ready") == 2
    assert main(["cache", "--clear", "0" * 32]) == 0
    assert "Packs: 2" in capsys.readouterr().out
    assert main(["cache", "--clear", fingerprint]) == 0
    out = capsys.readouterr().out
    assert "Removed: 2" in out
    assert "Packs: 0" in out
    assert main(["pack", str(folder)]) == 0
    assert main(["cache", "--clear"]) == 0
    assert "Removed: 1" in capsys.readouterr().out
    assert feature_cache.list_caches() == []


@pytest.mark.parametrize("value", ["some", "1", "0" * 31])
def test_invalid_fingerprint_is_rejected(value, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["cache", "--clear", value])
    assert stopped.value.code == 2
    assert value in capsys.readouterr().err


def test_pack_fails_without_space(folder, monkeypatch, capsys):
    monkeypatch.setattr(feature_cache, "LIMIT_BYTES", 1000)
    assert main(["pack", str(folder)]) == 1
    err = capsys.readouterr().err
    assert "limit" in err
    assert "error: " in err


def test_evaluation_uses_the_features_of_the_training(folder, tmp_path, monkeypatch):
    requested = []
    real = feature_cache.Float16Array.use_cache

    def use_cache(self, fingerprint, *, build, progress=True):
        requested.append(build)
        real(self, fingerprint, build=build, progress=progress)

    monkeypatch.setattr(feature_cache.Float16Array, "use_cache", use_cache)
    result = fit(folder, tiny_config(epochs=1), tmp_path / "run", device="cpu")
    report = tmp_path / "report.json"
    arguments = ["evaluate", str(tmp_path / "run"), str(folder), "--split", "val", "--json", str(report)]
    accuracies = []
    for _ in range(2):
        assert main([*arguments, "--device", "cpu"]) == 0
        accuracies.append(json.loads(report.read_text())["accuracy"])
        # The second time without a feature cache, with the same result.
        shutil.rmtree(feature_cache.cache_folder())
    assert accuracies == [result.val["accuracy"]] * 2
    assert requested == [True, False, False]
    assert feature_cache.list_caches() == []
