"""Ranges of activations: the largest magnitude that a scale covers, found from the histogram.

``minmax`` covers the largest observed magnitude, ``percentile`` a share of all values; ``mse``
minimizes the mean squared error. The entropy method (smallest KL divergence of the quantized
histogram; Migacz, GTC 2017) is not offered, because it was worse than all three in
``benchmarks/quantization_methods.py``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from calibration.observers import TensorStatistics, bin_edges

METHODS = ("minmax", "percentile", "mse")
PERCENTILE = 99.99
INT8_LEVELS = 127  # on either side of zero
MSE_THRESHOLDS = 96  # clipping thresholds that ``mse`` tries, down to 1/16 of the largest magnitude
Array = NDArray[np.float64]


def find_amax(statistics: TensorStatistics, method: str, percentile: float = PERCENTILE) -> float:
    """Find the magnitude that INT8's 127 levels cover; 0 for a tensor that is always zero.

    Args:
        statistics: of the activation.
        method: one of ``METHODS``.
        percentile: share of the values in percent, for that method.
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
    centers = (lower + upper) / 2
    thresholds = statistics.amax * np.geomspace(1 / 16, 1, MSE_THRESHOLDS)
    errors = [_squared_error(centers, counts, float(threshold)) for threshold in thresholds]
    return float(thresholds[int(np.argmin(errors))])


def _squared_error(centers: Array, counts: Array, threshold: float) -> float:
    scale = threshold / INT8_LEVELS
    rounded = np.minimum(np.round(centers / scale), INT8_LEVELS) * scale
    return float(np.sum(counts * np.square(centers - rounded)))
