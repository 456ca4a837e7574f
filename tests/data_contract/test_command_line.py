"""`cmran validate` on corrupted folders: exit code, printed errors, JSON report, and never a traceback."""

import json
from pathlib import Path

import pytest

from flows.cli import main
from tests.data_contract.corruptions import CORRUPTIONS, Corruption
from tests.helpers import make_folder


@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda corruption: corruption.name)
def test_validate_reports_each_fault(
    corruption: Corruption, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, report = make_folder(tmp_path / "data"), tmp_path / "report.json"
    corruption.change(folder)
    try:
        code = main(["validate", str(folder), "--mode", corruption.mode, "--json", str(report)])
    except SystemExit as stopped:
        code = stopped.code
    assert code == (1 if corruption.errors else 0)
    output = "".join(capsys.readouterr())
    assert "Traceback" not in output
    content = json.loads(report.read_text())
    for kind, expected in (("errors", corruption.errors), ("warnings", corruption.warnings)):
        for fault in expected:
            assert (fault[0], fault[1]) in {(each["code"], each["file"]) for each in content[kind]}
            assert fault[0] in output
            assert fault[1] in output


@pytest.mark.parametrize("kind", ["absent", "file"])
def test_a_missing_folder_is_reported(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "data"
    if kind == "file":
        path.write_text("")
    try:
        code = main(["validate", str(path)])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 1
    output = "".join(capsys.readouterr())
    assert "Traceback" not in output
    assert "missing_folder" in output
    assert str(path) in output
