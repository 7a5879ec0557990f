"""The one error type that reaches a user as a sentence."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: one sentence that says what was wrong and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


def first_line(error: BaseException) -> str:
    """What a library's error says first, to be put into a sentence; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
