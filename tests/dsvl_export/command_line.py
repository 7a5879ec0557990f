"""Running the command line inside the tests' process."""

from __future__ import annotations

from typing import NamedTuple


class Done(NamedTuple):
    code: int
    out: str
    err: str


def refused(done: Done, sentence: str) -> bool:
    """Exit code 2 and exactly one sentence on stderr, nothing on stdout, no traceback."""
    lines = [line for line in done.err.splitlines() if line.strip()]
    assert done.code == 2, done
    assert len(lines) == 1, done.err
    assert lines[0].startswith("Error: ")
    assert lines[0].endswith(".")
    assert sentence in lines[0], lines[0]
    assert done.out == ""
    return True
