"""From the histogram of an activation to the largest magnitude that its scale shall cover.

``minmax``: the largest seen. ``percentile``: what a share of all values stays below. ``mse``: least mean
squared error. The entropy method (least KL divergence of the quantized histogram; Migacz, GTC 2017) was tried
and dropped: it lost to all three in ``benchmarks/quantization_methods.py``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from calibration.observers import TensorStatistics, bin_edges

METHODS = ("minmax", "percentile", "mse")
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
    centres = (lower + upper) / 2
    thresholds = statistics.amax * np.geomspace(1 / 16, 1, CANDIDATES)
    errors = [_squared_error(centres, counts, float(threshold)) for threshold in thresholds]
    return float(thresholds[int(np.argmin(errors))])


def _squared_error(centres: Array, counts: Array, threshold: float) -> float:
    scale = threshold / LEVELS
    rounded = np.minimum(np.round(centres / scale), LEVELS) * scale
    return float(np.sum(counts * np.square(centres - rounded)))
