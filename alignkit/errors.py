"""Define the exception whose message is written for the user."""

from __future__ import annotations


class AlignkitError(Exception):
    """Report bad input that the user can correct.

    The message is one line: what is wrong, where (``file:line`` or the argument's name) and
    what to do. The command line prints it after ``alignkit: error:`` and exits with status 2,
    without a stack trace. The class does not derive from `ValueError`, because argument parsers
    catch those and print the types that they tried instead.

    Example:
        >>> raise AlignkitError("prompts: none was given; pass --prompts TEXT")
        Traceback (most recent call last):
        alignkit.errors.AlignkitError: prompts: none was given; pass --prompts TEXT
    """


def find_user_error(error: BaseException | None) -> AlignkitError | None:
    """Return the first `AlignkitError` among an exception and its causes, ``None`` without one.

    Argument parsers and Lightning raise exceptions of their own ``from`` ours.

    Args:
        error: Any exception, or ``None``.
    """
    while error is not None and not isinstance(error, AlignkitError):
        error = error.__cause__
    return error
