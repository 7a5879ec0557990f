"""Comparing stored values with those that they must have, bit for bit."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes  # noqa: F401 -- registers bfloat16, float8 and int4 with numpy
import numpy as np

from dsvl_export.audit.result import Difference

AT_ONCE = 1 << 24  # bytes that are compared at a time


def equal_bytes(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether two flat arrays of bytes hold the same; in parts, so that little memory is taken."""
    return len(found) == len(expected) and all(
        np.array_equal(found[start : start + AT_ONCE], expected[start : start + AT_ONCE])
        for start in range(0, len(expected), AT_ONCE)
    )


def first_byte(name: str, found: np.ndarray, expected: np.ndarray) -> Difference:
    """Where two arrays of bytes that are not equal differ."""
    if len(found) != len(expected):
        return Difference(name, f"has {len(found)} bytes, expected {len(expected)}")
    first, count = None, 0
    for start in range(0, len(expected), AT_ONCE):
        changed = found[start : start + AT_ONCE] != expected[start : start + AT_ONCE]
        if first is None and changed.any():
            first = start + int(changed.argmax())
        count += int(changed.sum())
    return Difference(name, f"differs from byte {first} on", (first or 0,), count, len(expected))


def compare_files(name: str, found: Path, expected: Path) -> Difference | None:
    """Where two files differ; None where they are equal."""
    one, other = (
        np.memmap(file, np.uint8, "r") if file.stat().st_size else np.empty(0, np.uint8)
        for file in (found, expected)
    )
    return None if equal_bytes(one, other) else first_byte(name, one, other)


def compare_values(
    name: str, found: np.ndarray, expected: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]
) -> Difference | None:
    """Where the values of a tensor differ; None where they are equal bit for bit.

    Args:
        found, expected: bytes, flat; 4-bit integers are packed, the first in the lower half.
    """
    if equal_bytes(found, expected):
        return None
    if len(found) != len(expected):
        return Difference(name, f"holds {len(found)} bytes, expected {len(expected)}")
    if dtype.name in ("int4", "uint4"):
        one, other = (_unpacked(values, dtype.name) for values in (found, expected))
        total = int(np.prod(shape, dtype=np.int64))
        one, other = one[:total], other[:total]
        if np.array_equal(one, other):
            return Difference(name, "has a padding that is not zero")
        changed = one != other
    else:
        one, other = found.view(dtype), expected.view(dtype)
        bits = np.dtype(f"u{dtype.itemsize}")
        changed = found.view(bits) != expected.view(bits)
    first = int(changed.argmax())
    where = tuple(int(axis) for axis in np.unravel_index(first, shape)) if shape else ()
    detail = f"{_text(one[first])} at {list(where)}, expected {_text(other[first])}"
    return Difference(name, detail, where, int(changed.sum()), int(changed.size))


def _unpacked(values: np.ndarray, kind: str) -> np.ndarray:
    """Two numbers of each byte, as int8."""
    halves = np.stack([values & 15, values >> 4], axis=1).reshape(-1)
    return ((halves ^ 8).astype(np.int8) - 8).astype(np.int8) if kind == "int4" else halves.astype(np.int8)


def _text(value: np.generic) -> str:
    return f"{float(value):.6g}"
