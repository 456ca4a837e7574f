"""A journal that a full disk or a crash has left half an entry in."""

import errno
import os

import optuna
import pytest

from cmran.errors import CmranError
from search.journal import open_journal


def study_in(path):
    return optuna.create_study(storage=open_journal(path), study_name="s", load_if_exists=True)


@pytest.fixture
def path(tmp_path):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = tmp_path / "studies.journal"
    study_in(path).optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
    return path


@pytest.mark.parametrize("cut", [1, 7, 50])
def test_half_an_entry_at_the_end_is_removed_and_told(path, caplog, cut):
    os.truncate(path, path.stat().st_size - cut)
    study = study_in(path)
    assert "its last entry is cut off" in caplog.text
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    caplog.clear()
    assert len(study_in(path).trials) == 4
    assert caplog.text == ""


def test_a_full_disk_leaves_whole_lines(path, monkeypatch):
    study, whole = study_in(path), path.read_bytes()

    def fsync(descriptor):
        os.ftruncate(descriptor, os.fstat(descriptor).st_size - 3)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left"):
            study.set_user_attr("note", "x" * 100)
    assert path.read_bytes() == whole
    study.set_user_attr("note", "y")
    assert study_in(path).user_attrs == {"note": "y"}


@pytest.mark.parametrize("line", [b"[]", b"{", b"\xff\xfe", b"1" * 5000, b"[" * 100_000])
def test_damage_in_the_middle_is_told_with_its_line(path, line):
    lines = path.read_bytes().splitlines()
    lines[2] = line
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(CmranError, match=r"studies\.journal: line 3 is no entry") as error:
        open_journal(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [b"my notes", b"SQLite format 3\x00 and so on", b"{}\n", b"notes\nof mine", b'{"a": 1}']
)
def test_a_file_of_something_else_is_left_as_it_is(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(CmranError, match=r"notes\.txt: line 1 is no entry"):
        open_journal(path)
    assert path.read_bytes() == content


def test_a_first_entry_that_is_cut_off_is_removed(path):
    path.write_bytes(path.read_bytes()[:20])
    assert study_in(path).trials == []
