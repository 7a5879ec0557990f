"""Checks of JSON Schemas before they become grammars, and the length of their shortest answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import combinations
from math import inf
from typing import Any

from runtimes.errors import UserError
from runtimes.installation import install_command
from runtimes.structured.response_format import ITEM_SEPARATOR, KEY_SEPARATOR, FormatError

MAX_SCHEMAS = 5_000  # in a schema
MAX_DEPTH = 200  # of schemas in schemas, references included
MAX_PAIRS = 20_000  # of branches of ``oneOf`` that are compared
MAX_MULTIPLE = 1_000  # the time to compile a ``multipleOf`` grows with it
MAX_ROUNDS = 50  # of the search for the shortest answer
# Keywords whose values are a schema, a list of schemas, or schemas by name (draft 2020-12).
SINGLE = (
    "additionalProperties", "contains", "contentSchema", "else", "if", "items", "not", "propertyNames",
    "then", "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
MAPPINGS = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")
Count = Callable[[str], int]  # the tokens of a text
LengthOf = Callable[[Any], float]  # the tokens of the shortest answer of a schema
CHARACTERS_PER_TOKEN = 8  # of strings without meaning, about


def check_schema(schema: Any) -> None:
    """Check that a value is a JSON Schema (draft 2020-12) of a reasonable size.

    Raises:
        FormatError: it is not, or a ``oneOf`` has branches that may overlap; the message has a JSON
            pointer to the place.
        UserError: jsonschema is not installed.
    """
    try:
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import SchemaError
    except ImportError as error:
        raise UserError(f"JSON Schemas need jsonschema; run: {install_command('jsonschema')}.") from error
    found = list(_subschemas(schema))
    if len(found) > MAX_SCHEMAS:
        raise FormatError(f"The JSON Schema consists of more than {MAX_SCHEMAS} schemas.")
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        pointer = "".join(f"/{_escaped(str(part))}" for part in error.absolute_path)
        raise FormatError(
            f"The JSON Schema is wrong at {pointer or 'its root'}: {error.message[:200]}."
        ) from error
    _check_depth(schema, found)
    pairs = 0
    for place, part in found:
        _check_numbers(place, part)
        branches = part.get("oneOf", []) if isinstance(part, dict) else []
        pairs += len(branches) ** 2 // 2
        if pairs > MAX_PAIRS:
            raise FormatError("The JSON Schema has too many branches of oneOf; use anyOf.")
        resolved = [_target(schema, branch) for branch in branches]
        if not all(_exclude_each_other(*pair) for pair in combinations(resolved, 2)):
            raise FormatError(
                f"The JSON Schema's oneOf at {place or 'its root'} has branches that may overlap; give each a"
                " required field with a constant of its own, or use anyOf."
            )


def _check_numbers(place: str, part: Any) -> None:
    """Refuse what a grammar cannot count, or only in a time that grows with the number.

    Raises:
        FormatError: names the keyword and its place.
    """
    if not isinstance(part, dict):
        return
    if part.get("multipleOf", 0) > MAX_MULTIPLE:
        raise FormatError(f"The JSON Schema's multipleOf at {place}/multipleOf is above {MAX_MULTIPLE}.")
    if part.get("minProperties", 0) > len(part.get("required", [])):
        raise FormatError(
            f"The JSON Schema's minProperties at {place}/minProperties is above the number of required"
            " fields, which is not supported."
        )


def keyword_place(schema: Any, keyword: str) -> str:
    """Return a JSON pointer to a keyword in a schema, or its name if it is not found."""
    places = (place for place, part in _subschemas(schema) if isinstance(part, dict) and keyword in part)
    place = next(places, None)
    return keyword if place is None else f"{place}/{keyword}"


def _children(schema: Any) -> Iterator[tuple[str, Any]]:
    """Yield the pointers and values of the schemas that are directly in a schema."""
    if not isinstance(schema, dict):
        return
    for keyword in SINGLE:
        if keyword in schema:
            yield f"/{keyword}", schema[keyword]
    for keyword in LISTS:
        if isinstance(schema.get(keyword), list):
            for index, item in enumerate(schema[keyword]):
                yield f"/{keyword}/{index}", item
    for keyword in MAPPINGS:
        if isinstance(schema.get(keyword), dict):
            for name, item in schema[keyword].items():
                yield f"/{keyword}/{_escaped(name)}", item


def _subschemas(schema: Any) -> Iterator[tuple[str, Any]]:
    """Yield the pointers and values of a schema and of all schemas in it."""
    waiting = [("", schema)]
    while waiting:
        place, part = waiting.pop()
        yield place, part
        waiting += [(place + step, child) for step, child in _children(part)]


def _check_depth(schema: Any, found: list[tuple[str, Any]]) -> None:
    """Refuse schemas that lead through too many others; compilers follow them by recursion.

    Raises:
        FormatError: there are more than ``MAX_DEPTH`` on a path.
    """
    depth: dict[int, int] = {}  # of what has been visited, by identity
    active: set[int] = set()
    for _, start in found:
        path = [(start, iter(_next(schema, start)))]
        while path:
            part, rest = path[-1]
            active.add(id(part))
            child = next(rest, None)
            if child is None:
                path.pop()
                active.discard(id(part))
                depth[id(part)] = 1 + max((depth.get(id(each), 0) for each in _next(schema, part)), default=0)
            elif id(child) not in depth and id(child) not in active:
                path.append((child, iter(_next(schema, child))))
            if len(path) > MAX_DEPTH or depth.get(id(part), 0) > MAX_DEPTH:
                raise FormatError(
                    f"The JSON Schema leads through more than {MAX_DEPTH} schemas in schemas; simplify it."
                )


def _next(schema: Any, part: Any) -> list[Any]:
    """Return the schemas in a schema, and the one that it refers to."""
    children = [child for _, child in _children(part) if isinstance(child, dict)]
    target = _target(schema, part)
    return [*children, target] if target is not part and isinstance(target, dict) else children


def _target(schema: Any, part: Any) -> Any:
    """Return what a schema with ``$ref`` refers to, or the schema itself; None if it is missing."""
    reference = part.get("$ref") if isinstance(part, dict) else None
    if not isinstance(reference, str):
        return part
    if reference != "#" and not reference.startswith("#/"):
        return None
    found = schema
    for step in filter(None, reference[1:].split("/")):
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and key.isdigit() and int(key) < len(found):
            found = found[int(key)]
        elif isinstance(found, dict) and key in found:
            found = found[key]
        else:
            return None
    return found


def _exclude_each_other(one: Any, other: Any) -> bool:
    """Return whether no value is valid under both of two schemas, as far as it is easy to see."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return False
    values = [_values(schema) for schema in (one, other)]
    if values[0] is not None and values[1] is not None:
        return not values[0] & values[1]
    kinds = [schema.get("type") for schema in (one, other)]
    sets = [{kind} if isinstance(kind, str) else set(kind or ()) for kind in kinds]
    if all(sets) and not sets[0] & sets[1] and not {"integer", "number"} <= sets[0] | sets[1]:
        return True
    if kinds != ["object", "object"]:
        return False
    for name in set(one.get("required", [])) & set(other.get("required", [])):
        fields = [_values(schema.get("properties", {}).get(name)) for schema in (one, other)]
        if fields[0] is not None and fields[1] is not None and not fields[0] & fields[1]:
            return True
    return False


def _values(schema: Any) -> set[str] | None:
    """Return the constants that a schema allows, as JSON; None if it allows others."""
    if not isinstance(schema, dict) or not schema.keys() & {"const", "enum"}:
        return None
    values = [schema["const"]] if "const" in schema else schema["enum"]
    return {as_json(int(value) if _is_whole(value) else value) for value in values}


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def _escaped(name: str) -> str:
    """Return a name as a step of a JSON pointer (RFC 6901)."""
    return name.replace("~", "~0").replace("/", "~1")


def as_json(value: Any) -> str:
    """Return a value as the JSON that answers have."""
    return json.dumps(value, ensure_ascii=False, separators=(ITEM_SEPARATOR, KEY_SEPARATOR))


def shortest_answer(schema: Any, count: Count) -> float:
    """Estimate the tokens of the shortest JSON that is valid under a schema.

    Patterns and formats of strings and the bounds of numbers are left aside, so that it may be less
    than any valid answer has. The lengths of all schemas in it are computed together, again and
    again until none gets shorter, since references may form cycles.

    Args:
        schema: a checked JSON Schema.
        count: returns the tokens of a text.

    Returns:
        infinity if there is no finite answer; 0 if it is not known.
    """
    parts = [part for _, part in _subschemas(schema)][::-1]  # most schemas come after what is in them
    lengths: dict[int, float] = {id(part): inf for part in parts if isinstance(part, dict)}
    names: dict[str, int] = {}

    def tokens(text: str) -> int:
        if text not in names:
            names[text] = count(text)
        return names[text]

    def of(part: Any) -> float:
        return lengths.get(id(part), inf) if isinstance(part, dict) else inf if part is False else 1

    for _ in range(MAX_ROUNDS):
        changed = False
        for part in parts:
            if isinstance(part, dict):
                length = _length(schema, part, of, tokens)
                changed |= length < lengths[id(part)]
                lengths[id(part)] = min(length, lengths[id(part)])
        if not changed:
            return of(schema)
    return 0


def _length(schema: Any, part: dict[str, Any], of: LengthOf, tokens: Count) -> float:
    """Estimate the tokens of a schema's shortest answer from those of the schemas in it."""
    if "const" in part or "enum" in part:
        values = [part["const"]] if "const" in part else part["enum"]
        return min((tokens(as_json(value)) for value in values), default=inf)
    if "$ref" in part:
        target = _target(schema, part)
        return 0 if target is None else of(target)
    for keyword in ("anyOf", "oneOf"):
        if keyword in part:
            return min(map(of, part[keyword]), default=inf)
    if "allOf" in part:
        return max(map(of, part["allOf"]), default=1)
    kinds = part.get("type", "integer")  # without a type, any value is valid
    kinds = [kinds] if isinstance(kinds, str) else kinds
    return min((_length_of(kind, part, of, tokens) for kind in kinds), default=inf)


def _length_of(kind: str, part: dict[str, Any], of: LengthOf, tokens: Count) -> float:
    """Estimate the tokens of a schema's shortest answer of a type."""
    if kind == "string":
        return float(1 + part.get("minLength", 0) // CHARACTERS_PER_TOKEN)
    if kind == "array":
        count, first = int(part.get("minItems", 0)), part.get("prefixItems", [])
        items = sum(map(of, first[:count]))
        if count > len(first):
            items += (count - len(first)) * of(part.get("items", True))
        return float(1 + items + max(count - 1, 0))
    if kind == "object":
        fields, required = part.get("properties", {}), part.get("required", [])
        return 1 + sum(tokens(as_json(name)) + of(fields.get(name, True)) for name in required)
    return 1
