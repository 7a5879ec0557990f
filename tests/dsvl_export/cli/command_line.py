"""Running the command line, and what a refusal looks like."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


class Done(NamedTuple):
    code: int
    out: str
    err: str


def optimum(*arguments: str) -> Done:
    """``optimum-cli export dsvl`` in a process of its own."""
    command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "dsvl", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    return Done(done.returncode, done.stdout, done.stderr)


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
