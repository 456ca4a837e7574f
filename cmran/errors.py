"""The one exception for what a user can mend."""


class UserError(Exception):
    """Something the user can mend, told in one line: what was found, where, what was expected, what to do.

    The command line prints it without a traceback and exits with 1.
    """


class BusyError(UserError):
    """Another process holds the lock of what was asked for."""
