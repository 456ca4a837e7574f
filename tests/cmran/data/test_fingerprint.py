"""The fingerprint: what changes it, and the cache of file digests."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cmran.data import fingerprint
from cmran.data.fingerprint import folder_fingerprint
from cmran.errors import DataError
from tests.helpers import make_folder, read, write


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def _settled(monkeypatch: pytest.MonkeyPatch) -> None:
    # The files of a test are too young to be cached.
    monkeypatch.setattr(fingerprint, "SETTLED_NS", -1)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read."""
    names: list[str] = []
    real = fingerprint._file_digest

    def digest(path: Path, size: int, bar: fingerprint.Progress) -> str:
        names.append(path.name)
        return real(path, size, bar)

    monkeypatch.setattr(fingerprint, "_file_digest", digest)
    return names


def cache_file(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "cmran" / "fingerprints.json"


def test_the_same_content_has_the_same_fingerprint_at_any_path(tmp_path: Path) -> None:
    first = folder_fingerprint(make_folder(tmp_path / "a"))
    assert len(first) == 32
    assert set(first) <= set("0123456789abcdef")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "notes.txt").write_text("not one of the files")
    assert folder_fingerprint(tmp_path / "b") == first
    assert folder_fingerprint(make_folder(tmp_path / "c", seed=1)) != first


def test_every_change_of_content_changes_the_fingerprint(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a")
    seen = {folder_fingerprint(folder)}
    for name in sorted(path.name for path in folder.iterdir()):
        data = bytearray((folder / name).read_bytes())
        data[-2] ^= 1
        (folder / name).write_bytes(data)
        seen.add(folder_fingerprint(folder))
    (folder / "labels.h5").rename(folder / "mil_labels.h5")
    seen.add(folder_fingerprint(folder))
    (folder / "Annotations.txt").unlink()
    seen.add(folder_fingerprint(folder))
    assert len(seen) == 1 + 11 + 2


def test_files_of_several_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "BLOCK_BYTES", 100)
    path = tmp_path / "labels.h5"
    seen = set()
    content = bytes(range(256)) * 2
    variants = [content, content[:400], content[:399], content[100:200] + content[:100] + content[200:], b"", b"x"]
    for variant in variants:
        path.write_bytes(variant)
        seen.add(folder_fingerprint(tmp_path))
    assert len(seen) == len(variants)


def test_a_selection_of_files(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a")
    two = folder_fingerprint(folder, files=["visual_feature.h5", "audio_feature.h5"])
    (folder / "labels.h5").unlink()
    assert folder_fingerprint(folder, files=["audio_feature.h5", "visual_feature.h5"]) == two
    assert folder_fingerprint(folder) != two


@pytest.mark.usefixtures("_settled")
def test_an_unchanged_file_is_read_once(tmp_path: Path, hashed: list[str]) -> None:
    folder = make_folder(tmp_path / "a")
    first = folder_fingerprint(folder)
    assert len(hashed) == 11
    assert folder_fingerprint(folder) == first
    assert len(hashed) == 11
    write(folder / "val_order.h5", read(folder / "val_order.h5", "order")[::-1], "order")
    assert folder_fingerprint(folder) != first
    assert hashed[11:] == ["val_order.h5"]


@pytest.mark.usefixtures("_settled")
def test_a_change_with_an_old_time_stamp_is_detected(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a")
    first = folder_fingerprint(folder)
    path = folder / "labels.h5"
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert folder_fingerprint(folder) != first


def test_a_recently_written_file_is_not_cached(tmp_path: Path, hashed: list[str]) -> None:
    folder = make_folder(tmp_path / "a")
    folder_fingerprint(folder)
    assert not cache_file(tmp_path).exists()
    folder_fingerprint(folder)
    assert len(hashed) == 22


@pytest.mark.usefixtures("_settled")
@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 3}', "null", "\x00"])
def test_a_damaged_cache_is_rebuilt(tmp_path: Path, content: str, hashed: list[str]) -> None:
    folder = make_folder(tmp_path / "a")
    first = folder_fingerprint(folder)
    cache_file(tmp_path).write_text(content)
    assert folder_fingerprint(folder) == first
    assert len(hashed) == 22
    assert len(json.loads(cache_file(tmp_path).read_text())) >= 11


@pytest.mark.usefixtures("_settled")
def test_a_cache_that_cannot_be_written_only_logs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_folder(tmp_path / "a")
    first = folder_fingerprint(folder)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert folder_fingerprint(folder) == first
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "cannot create the cache folder" in record.getMessage()


def test_concurrent_processes_lose_no_entry(tmp_path: Path) -> None:
    folders = [make_folder(tmp_path / name, seed=seed) for seed, name in enumerate("abcd")]
    code = (
        "import sys; from pathlib import Path; from cmran.data import fingerprint as f; f.SETTLED_NS = -1;"
        " print(f.folder_fingerprint(Path(sys.argv[1])))"
    )
    root = Path(fingerprint.__file__).parents[2]
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True, cwd=root)
        for folder in folders
    ]
    printed = [process.communicate(timeout=60)[0].strip() for process in running]
    assert [process.returncode for process in running] == [0] * 4
    assert printed == [folder_fingerprint(folder) for folder in folders]
    assert len(json.loads(cache_file(tmp_path).read_text())) == 44


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found nothing"):
        folder_fingerprint(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="found a file"):
        folder_fingerprint(tmp_path / "file")
