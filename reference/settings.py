"""Typed access to a settings file; an error message names the file, the key and the value."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtimes.errors import UserError

MAX_INTEGER = 1 << 18
MAX_NUMBER = 1e15


@dataclass(frozen=True)
class Settings:
    """One JSON object of a settings file; an absent key has its default.

    Attributes:
        values: the object.
        file: its file, for error messages.
        path: prefix of its keys within the file, such as ``vision_config.params.``; empty at the
            top level.
    """

    values: Mapping[str, Any]
    file: str
    path: str = ""

    @classmethod
    def from_json(cls, value: Any, file: str, path: str = "") -> Settings:
        """Wrap a parsed JSON value.

        Raises:
            UserError: the value is not an object.
        """
        if not isinstance(value, Mapping):
            raise UserError(f"{file}: {path.rstrip('.')} is {format_value(value)}, expected an object.")
        return cls(value, file, path)

    def __contains__(self, key: str) -> bool:
        """Return whether the object has a key."""
        return key in self.values

    def error(self, key: str, problem: str) -> UserError:
        """Build the error for a key's value; ``problem`` follows the value in the message."""
        return UserError(f"{self.file}: {self.path}{key} is {format_value(self.values.get(key))}, {problem}.")

    def section(self, key: str, *, optional: bool = False) -> Settings:
        """Return the object under a key; an optional one that is absent or null is empty."""
        if optional and self.values.get(key) is None:
            return Settings({}, self.file, f"{self.path}{key}.")
        return Settings.from_json(self._required(key), self.file, f"{self.path}{key}.")

    def integer(self, key: str, default: int | None = None, low: int = 1, high: int = MAX_INTEGER) -> int:
        """Return an integer from ``low`` to ``high``; without a default the key is required."""
        value = self._required(key) if default is None else self.values.get(key, default)
        if not _is_integer(value) or not low <= value <= high:
            raise self.error(key, f"expected an integer from {low} to {high}")
        return int(value)

    def optional_integer(self, key: str, default: int, low: int = 1, high: int = MAX_INTEGER) -> int:
        """Return an integer as ``integer`` does; null counts as absent."""
        return default if self.values.get(key) is None else self.integer(key, low=low, high=high)

    def number(
        self, key: str, default: float | None = None, above: float = 0.0, high: float = MAX_NUMBER
    ) -> float:
        """Return a finite number greater than ``above`` and at most ``high``."""
        value = self._required(key) if default is None else self.values.get(key, default)
        if not _is_number(value) or not above < value <= high:
            raise self.error(key, f"expected a number greater than {above:g}, at most {high:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return a boolean."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "expected true or false")
        return value

    def nullable_flag(self, key: str, default: bool) -> bool:
        """Return a boolean; null counts as false, as in transformers' image processors."""
        return False if self.values.get(key, default) is None else self.flag(key, default)

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string."""
        value = self._required(key) if default is None else self.values.get(key, default)
        if not isinstance(value, str):
            raise self.error(key, "expected a string")
        return value

    def choice(self, key: str, choices: Sequence[str], default: str | None = None) -> str:
        """Return one of ``choices``; any other value is not supported."""
        value = self._required(key) if default is None else self.values.get(key, default)
        if value not in choices:
            raise self.error(key, f"which is not supported; expected {' or '.join(map(repr, choices))}")
        return str(value)

    def integers(
        self, key: str, default: Sequence[int], low: int = 1, high: int = MAX_INTEGER
    ) -> tuple[int, ...]:
        """Return a list of integers, each from ``low`` to ``high``."""
        values = self.values.get(key, default)
        if not isinstance(values, (list, tuple)) or not all(
            _is_integer(value) and low <= value <= high for value in values
        ):
            raise self.error(key, f"expected a list of integers from {low} to {high}")
        return tuple(values)

    def triple(
        self, key: str, default: Sequence[float] | None = None, low: float = 0.0, high: float = 1.0
    ) -> tuple[float, float, float]:
        """Return three numbers from ``low`` to ``high``, one per channel."""
        values = self._required(key) if default is None else self.values.get(key, default)
        if (
            not isinstance(values, (list, tuple))
            or len(values) != 3
            or not all(_is_number(value) and low <= value <= high for value in values)
        ):
            raise self.error(key, f"expected three numbers from {low:g} to {high:g}")
        red, green, blue = (float(value) for value in values)
        return red, green, blue

    def refuse_unsupported(self, neutral: Mapping[str, tuple[Any, ...]]) -> None:
        """Refuse keys that change the computation in a way that is not supported.

        Args:
            neutral: key → values that do not change the computation; null never does.

        Raises:
            UserError: a key has another value.
        """
        for key, allowed in neutral.items():
            value = self.values.get(key)
            if value is not None and not any(type(value) is type(same) and value == same for same in allowed):
                expected = f"expected {' or '.join(map(format_value, allowed))}" if allowed else "remove it"
                raise self.error(key, f"which is not supported; {expected}")

    def _required(self, key: str) -> Any:
        if key not in self.values:
            within = f" in {self.path.rstrip('.')}" if self.path else ""
            raise UserError(f"{self.file} is missing the key {key!r}{within}.")
        return self.values[key]


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """Return whether a value is a finite number; comparisons with bounds would not reject NaN."""
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def format_value(value: Any, length: int = 60) -> str:
    """Format a value for an error message, in about ``length`` characters at most."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of about {int(value.bit_length() * math.log10(2)) + 1} digits"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, (list, tuple)):
        if len(value) > 8 or any(isinstance(part, (list, tuple)) for part in value):
            return f"a list of {len(value)}"
        text = f"[{', '.join(format_value(part, length) for part in value)}]"
    else:
        text = repr(value)
    return text if len(text) <= length else f"{text[: length - 1]}…"
