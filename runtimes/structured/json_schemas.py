"""Checks of JSON Schemas before they become grammars."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from runtimes.errors import UserError
from runtimes.installation import install_command
from runtimes.structured.response_format import ITEM_SEPARATOR, KEY_SEPARATOR, FormatError

MAX_STEPS = 10_000  # of the search for the shortest answer
SHORTEST = {"integer": "0", "number": "0", "boolean": "true", "null": "null"}


def check_schema(schema: Any) -> None:
    """Check that a value is a JSON Schema (draft 2020-12).

    Raises:
        FormatError: it is not; the message has a JSON pointer to the place.
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
        target = self._schema
        if not reference.startswith("#"):
            raise _Unknown
        for part in filter(None, reference[1:].split("/")):
            key = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(target, Mapping) or key not in target:
                raise _Unknown
            target = target[key]
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
