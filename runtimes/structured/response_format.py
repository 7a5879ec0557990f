"""The form that an answer must have: a JSON Schema, a regular expression, a grammar or choices."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

from runtimes.bundle.files import parse_json
from runtimes.errors import UserError

JSON_SCHEMA, TEXT_OR_JSON = "json_schema", "text_or_json_schema"
REGEX, LARK, CHOICES = "regex", "lark", "choices"
MAX_CHARACTERS = 100_000  # of a format
MAX_CHOICES = 10_000
# Between the items and after the keys of JSON answers; with fixed separators, most tokens of keys
# are forced.
ITEM_SEPARATOR, KEY_SEPARATOR = ", ", ": "
JSON_OPTIONS = {  # of llguidance's JSON compiler
    "whitespace_flexible": False,
    "item_separator": ITEM_SEPARATOR,
    "key_separator": KEY_SEPARATOR,
    "coerce_one_of": True,  # ``check_schema`` makes sure that no two branches overlap
}


class FormatError(UserError):
    """A response format cannot be used."""


@dataclass(frozen=True)
class ResponseFormat:
    """The form that an answer must have.

    Use the class methods to make one. ``GenerationOptions(response_format=…)`` also takes a JSON
    Schema itself: a dictionary, a pydantic model or the path of a file.

    Args:
        kind: ``json_schema``, ``text_or_json_schema``, ``regex``, ``lark`` or ``choices``.
        text: the schema or the choices as JSON, the expression, or the grammar.

    Raises:
        FormatError: the format is too long, or not valid Unicode.
    """

    kind: str
    text: str

    def __post_init__(self) -> None:
        """Check the length and the characters."""
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            raise FormatError("The response format has half a surrogate pair, which is no text.") from error
        if len(self.text) > MAX_CHARACTERS:
            raise FormatError(
                f"The response format has {len(self.text)} characters, but at most {MAX_CHARACTERS} are"
                " allowed."
            )

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | type | Path) -> ResponseFormat:
        """Answers are JSON that is valid under a schema.

        Args:
            schema: the schema, a pydantic model, or a file with a schema.

        Raises:
            FormatError: the file cannot be read, or is not JSON.
        """
        if isinstance(schema, Path):
            try:
                schema = parse_json(schema.read_bytes(), str(schema))
            except OSError as error:
                raise FormatError(f"{schema} cannot be read: {error.strerror}.") from error
        elif hasattr(schema, "model_json_schema"):
            schema = schema.model_json_schema()
        try:
            return cls(JSON_SCHEMA, json.dumps(schema, ensure_ascii=False, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise FormatError(f"The JSON Schema is not JSON: {error}.") from error

    @classmethod
    def text_or_json(cls, schema: Mapping[str, Any]) -> ResponseFormat:
        """Answers are text that does not begin with a brace, or JSON under a schema."""
        return cls(TEXT_OR_JSON, cls.json_schema(schema).text)

    @classmethod
    def json_object(cls) -> ResponseFormat:
        """Answers are JSON objects."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, expression: str) -> ResponseFormat:
        """Answers match a regular expression as a whole, in the syntax of Rust's ``regex``."""
        return cls(REGEX, expression)

    @classmethod
    def lark(cls, grammar: str) -> ResponseFormat:
        """Answers follow a grammar in llguidance's variant of Lark; its first rule is ``start``."""
        return cls(LARK, grammar)

    @classmethod
    def choices(cls, texts: Sequence[str]) -> ResponseFormat:
        """Answers are one of some texts.

        Raises:
            FormatError: there are none, too many, or an empty one.
        """
        if not texts or len(texts) > MAX_CHOICES or not all(texts):
            raise FormatError(f"Choices must be 1 to {MAX_CHOICES} texts that are not empty.")
        return cls(CHOICES, json.dumps(list(texts), ensure_ascii=False))


AnyFormat = Union[ResponseFormat, Mapping[str, Any], type, Path, None]


def to_response_format(value: AnyFormat) -> ResponseFormat | None:
    """Return the format that ``GenerationOptions(response_format=…)`` describes.

    Raises:
        FormatError: it is none.
    """
    if value is None or isinstance(value, ResponseFormat):
        return value
    if isinstance(value, (Mapping, Path)) or hasattr(value, "model_json_schema"):
        return ResponseFormat.json_schema(value)
    raise FormatError(
        "response_format must be a ResponseFormat, a JSON Schema as a dictionary, a pydantic model, or"
        f" the Path of a schema, not {type(value).__name__}."
    )
