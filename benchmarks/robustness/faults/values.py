"""Random changes of an array's values."""

from __future__ import annotations

from random import Random

import numpy as np


def change_values(values: np.ndarray, random: Random) -> tuple[str, np.ndarray] | None:
    """Another array of the same shape and dtype; None where the change drawn is none."""
    axis = random.randrange(max(values.ndim, 1))
    rows = values.shape[axis] if values.ndim else 1
    first, second = random.randrange(rows), random.randrange(rows)
    if values.dtype.kind not in "iu":
        values = values.astype(np.float32)
    changed = values.copy()
    moved = np.moveaxis(changed, axis, 0) if values.ndim else changed.reshape(1)
    kind = random.choice(
        ["zeroed", "swapped", "scaled", "one scaled", "rolled", "negated", "all zero", "noise"]
    )
    factor = random.choice([0.5, 0.9, 1.05, 1.3, 2.0])
    if kind == "zeroed":
        moved[first] = 0
    elif kind == "swapped":
        moved[[first, second]] = moved[[second, first]]
    elif kind == "rolled":
        moved[...] = np.roll(moved, 1, axis=0)
    elif kind == "all zero":
        moved[...] = 0
    elif values.dtype.kind in "iu":
        moved[first] = moved[second]
        kind = "copied"
    elif kind == "scaled":
        moved *= factor
    elif kind == "one scaled":
        moved[first] *= factor
    elif kind == "negated":
        moved[first] *= -1
    else:
        spread = np.random.default_rng(random.randrange(1 << 30)).standard_normal(moved.shape)
        moved += 0.05 * values.std() * spread.astype(np.float32)
    if np.array_equal(changed, values):
        return None
    places = {"zeroed": first, "swapped": (first, second), "scaled": factor, "one scaled": (first, factor)}
    return f"{kind} {places.get(kind, '')} on axis {axis}", changed
