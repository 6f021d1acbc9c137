"""The one exception a user is meant to read."""

from __future__ import annotations


class AlignkitError(Exception):
    """Bad input that the user can mend.

    The message is one line: what is wrong, where (``file:line`` or the argument's name) and
    what to do. The command line prints it after ``alignkit: error:`` and exits with status 2,
    without a stack trace. Not a `ValueError`: argument parsers catch those and bury the line
    under the types they tried.
    """


def find_user_error(error: BaseException | None) -> AlignkitError | None:
    """Return the `AlignkitError` behind what others made of it, if there is one."""
    while error is not None and not isinstance(error, AlignkitError):
        error = error.__cause__
    return error
