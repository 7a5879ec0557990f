"""What is printed where texts of strangers are part of it: file names, manifests, tokenizers, answers."""

from __future__ import annotations

import json
import re
import sys
from typing import Any, TextIO

# Control characters, which terminals obey, and those that change the direction of a line; not the tab and
# the line feed.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def without_controls(text: str) -> str:
    r"""The text with what a terminal would obey written out, as ``\x1b`` for an escape."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def say(text: str, end: str = "\n", stream: TextIO | None = None) -> None:
    """Print a sentence without control characters.

    Args:
        stream: None is stdout.
    """
    print(without_controls(text), end=end, file=stream or sys.stdout, flush=True)


def say_error(text: str) -> None:
    """``Error: …`` on stderr, in one line."""
    say(f"Error: {' '.join(text.splitlines())}", stream=sys.stderr)


def answer_text(piece: str) -> str:
    """A piece of a model's answer for stdout: as it is for files and programs, harmless for a terminal."""
    return without_controls(piece) if sys.stdout.isatty() else piece


def json_text(value: Any, indent: int | None = None) -> str:
    """A JSON document that stdout's encoding can write and a terminal does not obey."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    text = _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # cp1252, ASCII, or half a surrogate pair
        return json.dumps(value, indent=indent)
    return text
