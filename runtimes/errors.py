"""The one error type that reaches a user as a sentence."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: one sentence that says what was wrong and what to do.

    The command line prints it without a traceback and exits with code 2.
    """
