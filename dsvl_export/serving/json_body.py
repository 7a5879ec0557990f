"""The JSON of a request, read strictly and within bounds."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, NoReturn

from dsvl_export.serving.errors import RequestError, quoted

MOST_VALUES = 500_000  # of a body, counted by its brackets and commas, also those in texts
MOST_DIGITS = 300  # of a number
DEEPEST = 64  # lists and objects in one another


def read_json(body: bytes) -> Any:
    """The value that a body holds.

    Raises:
        RequestError: it is not JSON in UTF-8; it has a name twice in one object, a number that is not finite
            or has too many digits, half of a surrogate pair, or more or deeper values than any request needs.
    """
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _invalid("The body is not valid JSON: it is not UTF-8 text.") from error
    if sum(map(text.count, ",[{")) > MOST_VALUES:
        raise RequestError(400, f"The body has more than {MOST_VALUES} values.", code="invalid_json")
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_int=_integer, parse_constant=_not_a_number)
    except (ValueError, RecursionError) as error:
        raise _invalid("The body is not valid JSON.") from error
    _check_values(value)
    return value


def _invalid(sentence: str) -> RequestError:
    return RequestError(400, sentence, code="invalid_json")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise _invalid(f"The body has the name {quoted(twice)} twice in one object.")
    return found


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise _invalid(f"The body has a number of {len(digits)} digits.")
    return int(digits)


def _not_a_number(name: str) -> NoReturn:
    raise _invalid(f"The body is not valid JSON: {name} is not a JSON number.")


def _check_values(value: Any) -> None:
    """Check depth, strings and numbers, level by level."""
    level, depth = [value], 0
    while level:
        if depth > DEEPEST:
            raise _invalid(f"The body has more than {DEEPEST} lists and objects in one another.")
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str) and not item.isascii():
                _check_text(item)
            elif isinstance(item, float) and item in (float("inf"), float("-inf")):
                raise _invalid("The body has a number that is too large.")
        level, depth = below, depth + 1


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _invalid(
            "The body has a string that is not valid UTF-8 text: half of a surrogate pair."
        ) from error
