"""Reader of untrusted YAML files: plain values only, of a bounded size."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from runtimes.bundle.files import MAX_NESTING, read_bytes
from runtimes.errors import UserError

MAX_YAML_BYTES = 200_000  # PyYAML needs about 3 s for this size


class _PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which also refuses aliases, tags, duplicate keys and deep nesting.

    Aliases of aliases grow exponentially: ten lines can stand for 10^10 values.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._levels = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        parser: Any = self
        event = parser.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _refusal("anchors and aliases (& and *) are not supported", event)
        if getattr(event, "tag", None):
            raise _refusal(f"the tag {event.tag!r} is not supported", event)
        self._levels += 1
        if self._levels > MAX_NESTING:
            raise _refusal(f"it has more than {MAX_NESTING} levels", event)
        node = super().compose_node(parent, index)
        self._levels -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) != len(node.value):
            raise _refusal("a key occurs twice", node)
        return mapping

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        value = super().construct_yaml_float(node)
        if not math.isfinite(value):
            raise _refusal(f"{node.value} is not a finite number", node)
        return value

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > 20:
            raise _refusal(f"the number {node.value[:20]}… has more than 64 bits", node)
        return super().construct_yaml_int(node)


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_yaml_int)
_PlainLoader.add_constructor("tag:yaml.org,2002:float", _PlainLoader.construct_yaml_float)


def _refusal(reason: str, place: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(problem=reason, problem_mark=place.start_mark)


def read_yaml(file: Path, what: str) -> Any:
    """Return the value of a YAML file.

    Args:
        file: the file.
        what: the file's purpose, for errors, as in ``precision plan``.

    Raises:
        UserError: the file cannot be read, is too large, or is not YAML of plain values. Aliases,
            tags, infinity, NaN, duplicate keys and more than ``MAX_NESTING`` levels are refused.
    """
    content = read_bytes(file, MAX_YAML_BYTES)
    try:
        return yaml.load(content.decode("utf-8-sig"), _PlainLoader)
    except UnicodeDecodeError as error:
        raise UserError(f"The {what} {file} is not UTF-8 text.") from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        # PyYAML's own constructors raise other errors, as ValueError for the date 2001-99-99.
        raise UserError(f"{file} is not valid YAML: {_describe(error)}.") from error


# What the parser calls the problem, as patterns, and what the user has to change.
_PROBLEMS = (
    (
        "mapping values are not allowed",
        "there is a second ':' in the value; put the value in quotes, or correct the indentation",
    ),
    ("could not find expected ':'", "the key has no ':' after it"),
    (r"found character '\\t'", "the indentation has a tab; use spaces"),
    ("found character '(.)' that cannot start", r"text that starts with \1 must be in quotes"),
    ("expected ',' or ('.'), but got", r"a ',' or the closing \1 is missing"),
    ("found unexpected end of stream", "a quote is not closed"),
    ("expected <block end>", "the indentation differs from that of the lines before"),
    ("expected the node content|did not find expected", "a value or a closing bracket is missing"),
    ("expected '?<document start>|but found another document", "there is more than one document or value"),
    ("unacceptable character", "it has a control character; remove it"),
)


def _describe(error: Exception) -> str:
    """Describe in a clause what a user has to change, with the line if it is known."""
    problem = " ".join(str(getattr(error, "problem", None) or error).split())
    for pattern, description in _PROBLEMS:
        if match := re.search(pattern, problem):
            problem = match.expand(description)
            break
    mark = getattr(error, "problem_mark", None)
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})" if mark else problem
