"""Observers: what calibration keeps of an activation, in a form that merges exactly.

Counts, extremes and histograms over bins that do not depend on the data add up to the same numbers in any
order and on any number of machines. Rows are kept for the searches of ``smoothing`` and ``gptq``: those
with the smallest hashes, so that the sample of a union is the union's sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Bins of |x|: 256 to each power of two from 2^-24 to 2^24, which is what the upper bits of a float32 are.
MANTISSA_BITS = 8
LOWEST, HIGHEST = -24, 24
BINS = (HIGHEST - LOWEST) << MANTISSA_BITS
_SHIFT = 23 - MANTISSA_BITS
_OFFSET = (127 + LOWEST) << MANTISSA_BITS

Floats = NDArray[np.float32]


def bin_edges() -> NDArray[np.float64]:
    """``[BINS + 1]`` edges of the bins of |x|; the first bin takes all that is smaller as well."""
    index = np.arange(BINS + 1)
    powers = 2.0 ** (LOWEST + (index >> MANTISSA_BITS))
    edges = powers * (1 + (index & ((1 << MANTISSA_BITS) - 1)) / (1 << MANTISSA_BITS))
    edges[0] = 0.0
    return edges


def histogram(values: np.ndarray) -> NDArray[np.int64]:
    """``[BINS]`` counts of |values|."""
    bits = np.abs(values, dtype=np.float32).reshape(-1).view(np.int32) >> _SHIFT
    return np.bincount(np.clip(bits - _OFFSET, 0, BINS - 1), minlength=BINS)


def row_keys(sample: str, count: int) -> NDArray[np.uint64]:
    """``[count]`` hashes of a sample's rows (splitmix64, Steele et al. 2014)."""
    start = np.uint64(int(hashlib.sha256(sample.encode()).hexdigest()[:16], 16))
    with np.errstate(over="ignore"):
        mixed = start + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


@dataclass
class TensorStatistics:
    """Statistics of one activation over many samples.

    ``channel_max [C]`` is the largest |x| of every channel; ``rows [K, C]`` with their ``keys [K]`` are a
    sample of its rows, empty where none are wanted.
    """

    count: int
    minimum: float
    maximum: float
    counts: NDArray[np.int64]
    channel_max: Floats
    keys: NDArray[np.uint64]
    rows: Floats

    @classmethod
    def of(cls, values: Floats, sample: str, keep: int) -> TensorStatistics:
        """Of one sample's activation ``[R, C]``, keeping at most ``keep`` rows."""
        keys = row_keys(sample, len(values)) if keep else np.empty(0, np.uint64)
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
        """Of both samples together; commutative and associative, bit for bit."""
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
        """Of the activation divided by ``factors [C]``: extremes exactly, the histogram from the rows."""
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
        return max(-self.minimum, self.maximum)

    @property
    def digest(self) -> str:
        """SHA-256 of the histogram."""
        return hashlib.sha256(self.counts.astype("<i8").tobytes()).hexdigest()

    def to_tensors(self) -> dict[str, np.ndarray]:
        """For a file; the histogram as its filled bins."""
        places = np.flatnonzero(self.counts)
        return {
            "summary": np.array([self.count, self.minimum, self.maximum]),
            "bins": places.astype(np.int32),
            "counts": self.counts[places],
            "channel_max": self.channel_max,
            "keys": self.keys.view(np.int64),
            "rows": self.rows,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray]) -> TensorStatistics:
        """Inverse of ``to_tensors``; raises KeyError, ValueError or IndexError on anything else."""
        count, minimum, maximum = tensors["summary"].tolist()
        counts = np.zeros(BINS, np.int64)
        counts[tensors["bins"]] = tensors["counts"]
        keys = tensors["keys"].view(np.uint64)
        return cls(int(count), minimum, maximum, counts, tensors["channel_max"], keys, tensors["rows"])
