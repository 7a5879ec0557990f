"""Errors that reach a user as a message without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """An error that the user can fix; its message says what is wrong and what to do.

    The command line prints it without a traceback and exits with ``exit_code``.
    """

    exit_code = 2


class PrecisionOverflowError(UserError):
    """A precision cannot represent a checkpoint's numbers; exits with 1, like a failed check."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error for use in a message; its type if it is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
