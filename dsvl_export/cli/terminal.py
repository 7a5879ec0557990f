"""Safe output of texts from outside: file names, manifests, tokenizers and answers."""

from __future__ import annotations

import json
import re
import sys
from typing import Any, TextIO

# Control characters, and those that change the writing direction; not the tab and the line feed.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def without_controls(text: str) -> str:
    r"""Return the text with control characters escaped, such as ``\x1b``."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def say(text: str, end: str = "\n", stream: TextIO | None = None) -> None:
    """Print a message without control characters.

    Args:
        text: the message.
        end: printed after it.
        stream: None is stdout.
    """
    print(without_controls(text), end=end, file=stream or sys.stdout, flush=True)


def say_error(text: str) -> None:
    """Print ``Error: …`` on stderr, in one line."""
    say(f"Error: {' '.join(text.splitlines())}", stream=sys.stderr)


def answer_text(piece: str) -> str:
    """Return a piece of an answer for stdout: without control characters on a terminal."""
    return without_controls(piece) if sys.stdout.isatty() else piece


def json_text(value: Any, indent: int | None = None) -> str:
    """Return a JSON document in stdout's encoding, with control characters escaped."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    text = _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # cp1252, ASCII, or half a surrogate pair
        return json.dumps(value, indent=indent)
    return text
