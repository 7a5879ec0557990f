"""The one error type that reaches a user as a sentence."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: one sentence that says what was wrong and what to do.

    The command line prints it without a traceback and exits with ``exit_code``.
    """

    exit_code = 2


class OverflowVerdict(UserError):
    """A precision cannot hold a checkpoint's numbers: a verdict on it, like a failed parity check."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    """What a library's error says first, to be put into a sentence; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
