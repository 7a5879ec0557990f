"""Checks of JSON Schemas before they become grammars."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

from runtimes.errors import UserError
from runtimes.installation import install_command
from runtimes.structured.response_format import ITEM_SEPARATOR, KEY_SEPARATOR, FormatError

MAX_STEPS = 10_000  # of the search for the shortest answer
SHORTEST = {"integer": "0", "number": "0", "boolean": "true", "null": "null"}


def check_schema(schema: Any) -> None:
    """Check that a value is a JSON Schema (draft 2020-12).

    Raises:
        FormatError: it is not, or a ``oneOf`` has branches that may overlap; the message has a JSON
            pointer to the place.
    """
    try:
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import SchemaError
    except ImportError as error:
        raise UserError(f"JSON Schemas need jsonschema; run: {install_command('structured')}.") from error
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        pointer = "".join(f"/{part}" for part in error.absolute_path)
        raise FormatError(
            f"The JSON Schema is wrong at {pointer or 'its root'}: {error.message[:200]}."
        ) from error

    for place, branches in _one_ofs(schema, ""):
        resolved = [_resolved(schema, branch) for branch in branches]
        if not all(_exclude_each_other(*pair) for pair in combinations(resolved, 2)):
            raise FormatError(
                f"The JSON Schema's oneOf at {place or 'its root'} has branches that may overlap; give each a"
                " required field with a constant of its own, or use anyOf."
            )


def _one_ofs(value: Any, path: str) -> Iterator[tuple[str, list[Any]]]:
    """Yield the pointers and branches of all ``oneOf`` in a schema."""
    if isinstance(value, dict):
        if isinstance(value.get("oneOf"), list):
            yield path, value["oneOf"]
        for key, child in value.items():
            yield from _one_ofs(child, f"{path}/{key}")
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _one_ofs(child, f"{path}/{index}")


def _resolved(schema: Any, branch: Any) -> Any:
    """Return what a branch refers to, or the branch itself."""
    if isinstance(branch, dict) and str(branch.get("$ref", "")).startswith("#"):
        return find(schema, branch["$ref"])
    return branch


def _exclude_each_other(one: Any, other: Any) -> bool:
    """Return whether no value is valid under both of two schemas, as far as it is easy to see."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return False
    values = [_values(schema) for schema in (one, other)]
    if None not in values:
        return not values[0] & values[1]  # type: ignore[operator]
    kinds = [schema.get("type") for schema in (one, other)]
    sets = [{kind} if isinstance(kind, str) else set(kind or ()) for kind in kinds]
    if all(sets) and not sets[0] & sets[1] and not {"integer", "number"} <= sets[0] | sets[1]:
        return True
    if kinds != ["object", "object"]:
        return False
    for name in set(one.get("required", [])) & set(other.get("required", [])):
        fields = [_values(schema.get("properties", {}).get(name)) for schema in (one, other)]
        if None not in fields and not fields[0] & fields[1]:  # type: ignore[operator]
            return True
    return False


def _values(schema: Any) -> set[str] | None:
    """Return the constants that a schema allows, as JSON; None if it allows others."""
    if not isinstance(schema, dict) or not schema.keys() & {"const", "enum"}:
        return None
    return {_json(value) for value in ([schema["const"]] if "const" in schema else schema["enum"])}


def find(schema: Any, reference: str) -> Any:
    """Return the part of a schema that a reference ``#/…`` names; None if there is none."""
    for part in filter(None, reference[1:].split("/")):
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, list) and key.isdigit() and int(key) < len(schema):
            schema = schema[int(key)]
        elif isinstance(schema, dict) and key in schema:
            schema = schema[key]
        else:
            return None
    return schema


def pointer_to(schema: Any, keyword: str) -> str:
    """Return a JSON pointer to a keyword in a schema, or an empty string."""

    def search(value: Any, path: str) -> str:
        items: Any = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        )
        for key, child in items:
            if key == keyword and isinstance(value, dict):
                return f"{path}/{key}"
            if found := search(child, f"{path}/{key}"):
                return found
        return ""

    return search(schema, "")


class _Unknown(Exception):
    """The shortest answer is not known, or longer than the limit."""


class ShortestAnswer:
    """Finds the shortest JSON that is valid under a schema, as far as lengths are concerned.

    Patterns and formats of strings and the bounds of numbers are left aside, so that the text may
    be shorter than any valid one.
    """

    def __init__(self, schema: Any, max_characters: int) -> None:
        """Search an answer of a schema.

        Args:
            schema: the JSON Schema.
            max_characters: largest length of the answer.
        """
        self._schema, self._limit, self._steps = schema, max_characters, 0
        self._known: dict[str, str] = {}  # by reference

    def text(self) -> str | None:
        """Return the answer; an empty one if it is not known, None if there is no finite one.

        An answer over the limit is cut.
        """
        try:
            return self._text(self._schema, frozenset())
        except _Unknown:
            return ""

    def _text(self, schema: Any, active: frozenset[str]) -> str | None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise _Unknown
        if not isinstance(schema, Mapping):
            return "0" if schema is not False else None
        if "const" in schema or "enum" in schema:
            values = [schema["const"]] if "const" in schema else schema["enum"]
            return min((_json(value) for value in values), key=len, default=None)
        if "$ref" in schema:
            return self._reference(str(schema["$ref"]), active)
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                texts = [self._text(item, active) for item in schema[keyword]]
                return min((text for text in texts if text is not None), key=len, default=None)
        if "allOf" in schema:
            texts = [self._text(item, active) for item in schema["allOf"]]
            return None if None in texts else max((text for text in texts if text), key=len, default="0")
        kinds = schema.get("type", "integer")  # without a type, any value is valid
        kinds = [kinds] if isinstance(kinds, str) else kinds
        texts = [self._of_type(kind, schema, active) for kind in kinds]
        return min((text for text in texts if text is not None), key=len, default=None)

    def _reference(self, reference: str, active: frozenset[str]) -> str | None:
        if reference in self._known:
            return self._known[reference]
        if reference in active:  # the shortest answer does not repeat itself inside itself
            return None
        target = find(self._schema, reference) if reference.startswith("#") else None
        if target is None:
            raise _Unknown
        text = self._text(target, active | {reference})
        if text is not None:
            self._known[reference] = text
        return text

    def _of_type(self, kind: str, schema: Mapping[str, Any], active: frozenset[str]) -> str | None:
        if kind == "string":
            return '"' + "a" * self._count(schema.get("minLength", 0)) + '"'
        if kind == "array":
            count, first = self._count(schema.get("minItems", 0)), schema.get("prefixItems", [])
            items = [self._text(item, active) for item in first[:count]]
            if count > len(first):
                items += [self._text(schema.get("items", True), active)] * (count - len(first))
            return self._joined("[", items, "]")
        if kind == "object":
            properties = schema.get("properties", {})
            members = []
            for name in schema.get("required", []):
                value = self._text(properties.get(name, True), active)
                members.append(None if value is None else f"{_json(name)}{KEY_SEPARATOR}{value}")
            return self._joined("{", members, "}")
        return SHORTEST.get(kind, "0")

    def _joined(self, start: str, parts: list[str | None], end: str) -> str | None:
        if None in parts:
            return None
        total, known = 0, [part for part in parts if part is not None]
        for index, part in enumerate(known):
            total += len(part) + len(ITEM_SEPARATOR)
            if total > self._limit:
                known = known[: index + 1]
                break
        return start + ITEM_SEPARATOR.join(known) + end

    def _count(self, value: Any) -> int:
        return min(int(value), self._limit + 1)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(ITEM_SEPARATOR, KEY_SEPARATOR))
