"""Rule for study names, in a module without Optuna, because the command line imports it at start."""

import re

STUDY_NAME = r"^[A-Za-z0-9_]([A-Za-z0-9._ -]{0,198}[A-Za-z0-9_])?$"
"""Pattern of a study name. A name is also a directory name on every file system and fits one line of a table."""

STUDY_NAME_RULE = (
    "expected at most 200 letters (A-Z, a-z), digits, spaces and . _ -, starting and ending with a letter, a digit or _"
)


def is_study_name(name: str) -> bool:
    """Whether `name` matches `STUDY_NAME`."""
    # `re.match` with `$` would also accept a name that ends with a newline.
    return re.fullmatch(STUDY_NAME.strip("^$"), name) is not None
