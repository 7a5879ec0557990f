"""Observers: statistics of activations, in a form that can be merged exactly.

Counts, extremes and histograms with fixed bins give the same result in any order and on any number
of machines. Rows of activations are kept for ``smoothing`` and ``gptq``: those with the smallest
hashes, so that the rows kept of a union are those of the merged parts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Bins of |x|: 256 per power of two from 2^-24 to 2^24, the upper bits of a float32.
MANTISSA_BITS = 8
MIN_EXPONENT, MAX_EXPONENT = -24, 24
BIN_COUNT = (MAX_EXPONENT - MIN_EXPONENT) << MANTISSA_BITS
_SHIFT = 23 - MANTISSA_BITS
_OFFSET = (127 + MIN_EXPONENT) << MANTISSA_BITS

Floats = NDArray[np.float32]


def bin_edges() -> NDArray[np.float64]:
    """Return the edges of the bins of |x|, ``[BIN_COUNT + 1]``; the first bin starts at 0."""
    index = np.arange(BIN_COUNT + 1)
    powers = 2.0 ** (MIN_EXPONENT + (index >> MANTISSA_BITS))
    edges = powers * (1 + (index & ((1 << MANTISSA_BITS) - 1)) / (1 << MANTISSA_BITS))
    edges[0] = 0.0
    return edges


def histogram(values: np.ndarray) -> NDArray[np.int64]:
    """Count |values| by bin; returns ``[BIN_COUNT]``."""
    bits = np.abs(values, dtype=np.float32).reshape(-1).view(np.int32) >> _SHIFT
    return np.bincount(np.clip(bits - _OFFSET, 0, BIN_COUNT - 1), minlength=BIN_COUNT)


def hash_rows(sample: str, count: int) -> NDArray[np.uint64]:
    """Hash the rows of a sample (splitmix64, Steele et al. 2014); returns ``[count]``."""
    start = np.uint64(int(hashlib.sha256(sample.encode()).hexdigest()[:16], 16))
    with np.errstate(over="ignore"):
        mixed = start + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


@dataclass
class TensorStatistics:
    """Statistics of one activation over many samples.

    ``channel_max [C]`` is the largest |x| of every channel. ``rows [K, C]`` with their hashes
    ``keys [K]`` are a subset of its rows; both are empty if no rows are kept.
    """

    count: int
    minimum: float
    maximum: float
    counts: NDArray[np.int64]
    channel_max: Floats
    keys: NDArray[np.uint64]
    rows: Floats

    @classmethod
    def from_values(cls, values: Floats, sample: str, keep: int) -> TensorStatistics:
        """Compute the statistics of one sample's activation ``[R, C]``; keeps ``keep`` rows."""
        keys = hash_rows(sample, len(values)) if keep else np.empty(0, np.uint64)
        chosen = np.sort(np.argsort(keys, kind="stable")[:keep])
        return cls(
            count=values.size,
            minimum=float(values.min()),
            maximum=float(values.max()),
            counts=histogram(values),
            channel_max=np.abs(values).max(axis=0),
            keys=keys[chosen],
            rows=values[chosen].astype(np.float32),
        )._sorted(keep)

    def _sorted(self, keep: int) -> TensorStatistics:
        order = np.argsort(self.keys, kind="stable")[:keep]
        self.keys, self.rows = self.keys[order], self.rows[order]
        return self

    def merged(self, other: TensorStatistics, keep: int) -> TensorStatistics:
        """Merge with other statistics; commutative and associative, bit for bit."""
        return TensorStatistics(
            self.count + other.count,
            min(self.minimum, other.minimum),
            max(self.maximum, other.maximum),
            self.counts + other.counts,
            np.maximum(self.channel_max, other.channel_max),
            np.concatenate([self.keys, other.keys]),
            np.concatenate([self.rows, other.rows]),
        )._sorted(keep)

    def divided(self, factors: Floats) -> TensorStatistics:
        """Return the statistics of the activation divided by ``factors [C]``.

        Extremes are exact; the histogram is that of the kept rows.
        """
        rows, channel_max = self.rows / factors, self.channel_max / factors
        largest = float(channel_max.max())
        return TensorStatistics(
            self.count,
            -largest if self.minimum < 0 else 0.0,
            largest,
            histogram(rows),
            channel_max,
            self.keys,
            rows,
        )

    @property
    def amax(self) -> float:
        """The largest |x|."""
        return max(-self.minimum, self.maximum)

    @property
    def digest(self) -> str:
        """SHA-256 of the histogram."""
        return hashlib.sha256(self.counts.astype("<i8").tobytes()).hexdigest()

    def to_tensors(self) -> dict[str, np.ndarray]:
        """Return arrays for a file; of the histogram, the non-empty bins."""
        filled = np.flatnonzero(self.counts)
        return {
            "summary": np.array([self.count, self.minimum, self.maximum]),
            "bins": filled.astype(np.int32),
            "counts": self.counts[filled],
            "channel_max": self.channel_max,
            "keys": self.keys.view(np.int64),
            "rows": self.rows,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray]) -> TensorStatistics:
        """Rebuild statistics from ``to_tensors``'s result.

        Raises:
            KeyError: an array is missing.
            ValueError: an array has another size.
            IndexError: a bin is out of range.
        """
        count, minimum, maximum = tensors["summary"].tolist()
        counts = np.zeros(BIN_COUNT, np.int64)
        counts[tensors["bins"]] = tensors["counts"]
        keys = tensors["keys"].view(np.uint64)
        return cls(int(count), minimum, maximum, counts, tensors["channel_max"], keys, tensors["rows"])
