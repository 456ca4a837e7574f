"""The one exception for what a user can mend."""

from cmran.utils.uris import redact


class UserError(Exception):
    """Something the user can mend, told in one line: what was found, where, what was expected, what to do.

    The command line prints it without a traceback and exits with 1. Passwords in its text are hidden when it is made:
    it is shown, logged and stored in many places.
    """

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(redact(value) if isinstance(value, str) else value for value in arguments))


class BusyError(UserError):
    """Another process holds the lock of what was asked for."""
