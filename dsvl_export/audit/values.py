"""Bitwise comparison of stored values with the expected ones."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes  # noqa: F401 -- registers bfloat16, float8 and int4 with numpy
import numpy as np

from dsvl_export.audit.result import Difference

CHUNK = 1 << 24  # bytes that are compared at a time


def equal_bytes(actual: np.ndarray, expected: np.ndarray) -> bool:
    """Return whether two flat arrays of bytes are equal; compares in chunks, to save memory."""
    return len(actual) == len(expected) and all(
        np.array_equal(actual[start : start + CHUNK], expected[start : start + CHUNK])
        for start in range(0, len(expected), CHUNK)
    )


def byte_difference(name: str, actual: np.ndarray, expected: np.ndarray) -> Difference:
    """Return where two arrays of bytes that are not equal differ."""
    if len(actual) != len(expected):
        return Difference(name, f"has {len(actual)} bytes, expected {len(expected)}")
    first, count = None, 0
    for start in range(0, len(expected), CHUNK):
        changed = actual[start : start + CHUNK] != expected[start : start + CHUNK]
        if first is None and changed.any():
            first = start + int(changed.argmax())
        count += int(changed.sum())
    return Difference(name, f"differs from byte {first} on", (first or 0,), count, len(expected))


def compare_files(name: str, actual: Path, expected: Path) -> Difference | None:
    """Return where two files differ, or None if they are equal."""
    contents = [
        np.memmap(file, np.uint8, "r") if file.stat().st_size else np.empty(0, np.uint8)
        for file in (actual, expected)
    ]
    return None if equal_bytes(*contents) else byte_difference(name, *contents)


def compare_values(
    name: str, actual: np.ndarray, expected: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]
) -> Difference | None:
    """Return where the values of a tensor differ, or None if they are equal bit for bit.

    Args:
        name: of the tensor.
        actual: the stored bytes, flat; 4-bit integers are packed, the first in the lower half.
        expected: the expected bytes, in the same form.
        dtype: of the values.
        shape: of the tensor.
    """
    if equal_bytes(actual, expected):
        return None
    if len(actual) != len(expected):
        return Difference(name, f"holds {len(actual)} bytes, expected {len(expected)}")
    if dtype.name in ("int4", "uint4"):
        unpacked = [_unpack(values, dtype.name) for values in (actual, expected)]
        total = int(np.prod(shape, dtype=np.int64))
        stored, expected_values = (values[:total] for values in unpacked)
        if np.array_equal(stored, expected_values):
            return Difference(name, "has a padding that is not zero")
        changed = stored != expected_values
    else:
        stored, expected_values = actual.view(dtype), expected.view(dtype)
        bits = np.dtype(f"u{dtype.itemsize}")
        changed = actual.view(bits) != expected.view(bits)
    first = int(changed.argmax())
    where = tuple(int(axis) for axis in np.unravel_index(first, shape)) if shape else ()
    detail = f"{_text(stored[first])} at {list(where)}, expected {_text(expected_values[first])}"
    return Difference(name, detail, where, int(changed.sum()), int(changed.size))


def _unpack(values: np.ndarray, kind: str) -> np.ndarray:
    """Return the two 4-bit integers of each byte as int8."""
    halves = np.stack([values & 15, values >> 4], axis=1).reshape(-1)
    return ((halves ^ 8).astype(np.int8) - 8).astype(np.int8) if kind == "int4" else halves.astype(np.int8)


def _text(value: np.generic) -> str:
    return f"{float(value):.6g}"
