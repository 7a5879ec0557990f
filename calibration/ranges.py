"""From the histogram of an activation to the largest magnitude that its scale shall cover.

``minmax``: the largest seen. ``percentile``: what a share of all values stays below. ``entropy``: least
Kullback-Leibler divergence between the histogram and its quantized form (Migacz, GTC 2017). ``mse``: least
mean squared error.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from calibration.observers import TensorStatistics, bin_edges

METHODS = ("minmax", "percentile", "entropy", "mse")
PERCENTILE = 99.99
LEVELS = 127  # of INT8, on one side
CANDIDATES = 96  # clipping thresholds that a search tries, down to 1/16 of the largest magnitude
Array = NDArray[np.float64]


def find_amax(statistics: TensorStatistics, method: str, percentile: float = PERCENTILE) -> float:
    """The magnitude to cover by INT8's 127 levels; 0 for a tensor that is always zero.

    Args:
        method: one of ``METHODS``.
        percentile: share of the values, in percent, for that method.
    """
    if method == "minmax" or statistics.amax == 0:
        return statistics.amax
    edges = bin_edges()
    filled = np.flatnonzero(statistics.counts)
    lower, upper = edges[filled], np.minimum(edges[filled + 1], statistics.amax)
    counts = statistics.counts[filled].astype(np.float64)
    if method == "percentile":
        reached = np.cumsum(counts) >= percentile / 100 * counts.sum()
        return float(upper[np.argmax(reached)])
    error: Callable[[Array, Array, Array, float], float] = (
        _divergence if method == "entropy" else _squared_error
    )
    centres, widths = (lower + upper) / 2, np.maximum(upper - lower, 1e-30)
    thresholds = statistics.amax * np.geomspace(1 / 16, 1, CANDIDATES)
    errors = [error(centres, widths, counts, float(threshold)) for threshold in thresholds]
    return float(thresholds[int(np.argmin(errors))])


def _squared_error(centres: Array, widths: Array, counts: Array, threshold: float) -> float:
    scale = threshold / LEVELS
    rounded = np.minimum(np.round(centres / scale), LEVELS) * scale
    return float(np.sum(counts * np.square(centres - rounded)))


def _divergence(centres: Array, widths: Array, counts: Array, threshold: float) -> float:
    """KL divergence of the clipped histogram from what its levels can tell apart, in nats.

    What lies beyond the threshold counts in its last bin for the histogram, and not at all for the levels.
    """
    inside = centres <= threshold
    if not inside.any():
        return float("inf")
    wanted = counts[inside].copy()
    wanted[-1] += counts[~inside].sum()
    level = np.minimum(np.round(centres[inside] * LEVELS / threshold), LEVELS).astype(int)
    mass = np.bincount(level, counts[inside], LEVELS + 1)
    width = np.bincount(level, widths[inside], LEVELS + 1)
    spread = mass[level] * widths[inside] / width[level]
    p, q = wanted / wanted.sum(), spread / max(spread.sum(), 1e-30)
    return float(np.sum(p * np.log(p / np.maximum(q, 1e-12))))
