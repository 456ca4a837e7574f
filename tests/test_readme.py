"""What the README says of files and commands is what the code says."""

import re

import pytest

from cmran.data.layout import markdown_table
from flows.cli import COMMANDS as CODE
from flows.cli import parse
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_files_is_the_codes():
    assert markdown_table() in README


COMMANDS = re.findall(r"^cmran (.+?)(?:\s+#.*)?$", README, flags=re.MULTILINE)


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_of_the_readme_parses(line):
    command, _ = parse(line.split())
    assert command.parameters.__name__.lower().startswith(("seeds", line.split()[0]))


def test_every_command_stands_in_the_readme():
    assert {line.split()[0] for line in COMMANDS} == set(CODE)
