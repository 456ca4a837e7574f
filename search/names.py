"""Names of studies: a study's name is also the name of its default folder."""

import re

STUDY_NAME = r"^[A-Za-z0-9_]([A-Za-z0-9._ -]{0,198}[A-Za-z0-9_])?$"
"""Pattern of the names that a study may have: one folder name on every file system, one line in every table."""

STUDY_NAME_RULE = (
    "expected at most 200 letters (A-Z, a-z), digits, spaces and . _ -,"
    " beginning and ending with a letter, a digit or _"
)


def is_study_name(name: str) -> bool:
    """Whether `name` follows `STUDY_NAME`."""
    # Not re.match: there `$` also matches before a final newline.
    return re.fullmatch(STUDY_NAME.strip("^$"), name) is not None
