"""README and docs agree with the code: the table of files, and every command line in them."""

import re

import pytest

from cmran.data.layout import markdown_table
from flows.cli import COMMANDS, parse
from tests.conftest import ROOT

PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))}
LINES = [
    (path.name, line)
    for path, text in PAGES.items()
    for line in re.findall(r"^ *cmran (.+?)(?:\s+#.*)?$", text, flags=re.MULTILINE)
]


def test_table_of_files_is_documented():
    assert any(markdown_table() in text for text in PAGES.values())


@pytest.mark.parametrize(("page", "line"), LINES)
def test_documented_command_parses(page, line):
    command, _ = parse(line.split())
    assert command is COMMANDS[line.split()[0]]


def test_every_command_is_documented():
    assert {line.split()[0] for _, line in LINES} == set(COMMANDS)
