"""Precision variants of a release, from training to prediction."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cmran import tracking
from cmran.errors import CmranError
from cmran.training.trainer import fit
from flows.jobs import predict as predict_job
from flows.jobs import release
from flows.jobs.predict import PredictParameters
from flows.jobs.release import ReleaseParameters
from serving import variants
from serving.session import has_int8_products, read_metadata
from tests.cmran.tiny import tiny_config
from tests.helpers import make_folder

pytestmark = pytest.mark.skipif(not has_int8_products(), reason="needs a CPU with 8-bit matrix products")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("variants") / "data", 24)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("variants") / "run"
    fit(data, tiny_config(), out, device="cpu")
    return out


@pytest.fixture
def predict(data: Path, tmp_path: Path) -> Callable[..., dict[str, object]]:
    """Predict, and return the manifest."""

    def run(model: object, name: str, **options: object) -> dict[str, object]:
        out = tmp_path / name
        predict_job.run(
            PredictParameters(**({"model": str(model), "data": data, "out": out, "device": "cpu"} | options))
        )
        return json.loads((out / "manifest.json").read_text())

    return run


def test_release_has_int8_and_predict_uses_it_on_request(
    trained: Path,
    data: Path,
    tmp_path: Path,
    tracking_db: Path,
    predict: Callable[..., dict[str, object]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A few val videos of an untrained network say little about accuracy; this test is about the steps.
    monkeypatch.setattr(variants, "MIN_EQUAL_SEGMENTS", 0.5)
    monkeypatch.setattr("serving.session.cuda_works", lambda _: False)
    kept = tmp_path / "model.onnx"
    with caplog.at_level(logging.INFO):
        released = release.run(ReleaseParameters(checkpoint=str(trained), out=kept))
    int8, float16 = released.variants
    assert (int8.variant, int8.path, int8.reason) == ("int8", tmp_path / "model.int8.onnx", "")
    assert (float16.variant, float16.path, float16.parity) == ("float16", None, None)
    assert "variant float16 is left out of the release: it runs on CUDA only" in caplog.text
    assert sorted(path.name for path in tmp_path.glob("model*")) == ["model.int8.onnx", "model.onnx"]
    assert "left out: it runs on CUDA only" in released.markdown()
    assert "| int8 |" in released.markdown()

    (version,) = tracking.registered_versions("cmran-full")
    assert int8.parity is not None
    assert version.tags["int8_equal_segments"] == str(int8.parity.equal_segments)
    assert version.tags["int8_val_videos"] == "6"
    assert version.tags["float16_left_out"].startswith("it runs on CUDA only")
    assert (
        tracking.resolve_model(released.registered.uri).with_variant("int8").path.read_bytes() == int8.path.read_bytes()
    )

    uri = released.registered.uri
    plain = predict(uri, "plain")
    assert (plain["variant"], plain["job"]["variant"]) == ("float32", "float32")
    asked = predict(uri, "asked", variant="int8")
    assert (asked["variant"], asked["model"]["digest"]) == ("int8", version.tags["int8_sha256"])
    assert (asked["model"]["name"], asked["model"]["version"]) == ("cmran-full", 1)
    with caplog.at_level(logging.INFO):
        auto = predict(uri, "auto", variant="auto")
    assert auto["variant"] == "int8"
    assert "variant auto: took int8" in caplog.text
    assert auto["files"] == asked["files"] != plain["files"]
    with pytest.raises(CmranError, match="has no variant float16: it has float32, int8"):
        predict(uri, "other", variant="float16")
    with pytest.raises(CmranError, match="variant: found 'float32', requested 'int8'"):
        predict(uri, "plain", variant="int8", resume=True)

    # A file is used as is.
    assert predict(kept, "file")["files"] == plain["files"]
    assert predict(int8.path, "file8")["files"] == asked["files"]
    with pytest.raises(CmranError, match="is of variant float32, not int8"):
        predict(kept, "wrong", variant="int8")
    with pytest.raises(CmranError, match="is of variant int8, not float32"):
        predict(int8.path, "wrong", variant="float32")
    # A registered variant whose file is gone is an error.
    stored = tracking.resolve_model(uri).variants["int8"]
    stored.unlink()
    with pytest.raises(CmranError, match="its variant int8 was changed, damaged or removed"):
        predict(uri, "gone", variant="auto")
    labels = [pq.read_table(tmp_path / name / "segments.parquet")["label"] for name in ("plain", "asked")]
    assert len(labels[0]) == len(labels[1]) > 0


def test_variant_below_the_bound_is_left_out(
    trained: Path,
    tmp_path: Path,
    tracking_db: Path,
    predict: Callable[..., dict[str, object]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(variants, "MIN_EQUAL_SEGMENTS", 1.1)
    (tmp_path / "model.int8.onnx").write_bytes(b"of an earlier release")
    released = release.run(
        ReleaseParameters(checkpoint=str(trained), out=tmp_path / "model.onnx", variant="int8"),
    )
    (left_out,) = released.variants
    assert left_out.path is None
    assert "expected 110 % or more" in left_out.reason
    assert "variant int8 is left out of the release" in caplog.text
    assert sorted(path.name for path in tmp_path.glob("model*")) == ["model.onnx"]
    (version,) = tracking.registered_versions("cmran-full")
    assert "expected 110 %" in version.tags["int8_left_out"]
    assert not {"int8_sha256", "int8_equal_segments"} & version.tags.keys()
    with caplog.at_level(logging.INFO):
        assert predict(released.registered.uri, "auto", variant="auto")["variant"] == "float32"
    assert "variant auto: took float32: the model runs on the CPU, and the release has no int8" in caplog.text


def test_float32_only(trained: Path, tracking_db: Path) -> None:
    released = release.run(ReleaseParameters(checkpoint=str(trained), variant="float32"))
    assert released.variants == ()
    assert tracking.resolve_model(released.registered.uri).variants == {}
    assert read_metadata(tracking.resolve_model(released.registered.uri).path).variant == "float32"


def test_unchecked_variant_is_not_registered(trained: Path, data: Path, tmp_path: Path, tracking_db: Path) -> None:
    moved = data.rename(data.with_name("moved"))
    try:
        released = release.run(ReleaseParameters(checkpoint=str(trained), variant="int8"))
    finally:
        moved.rename(data)
    assert "no val video to check it on" in released.variants[0].reason
    assert tracking.resolve_model(released.registered.uri).variants == {}
