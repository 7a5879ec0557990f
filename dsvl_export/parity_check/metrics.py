"""How far what a backend computes lies from what the reference computed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from runtimes.goldens.golden import relative_rms
from runtimes.goldens.metrics import kl_divergence

# Room of a single channel above the bound of the whole; a lost row of the head exceeds it 14 times in fp16.
CHANNEL_FACTOR = 10
TIE_DEVIATIONS = 2


@dataclass
class Errors:
    """Errors of a rung over all its tensors.

    ``max_abs``, ``cosine`` and ``channel`` (see ``channel_error``) are the worst of all; the cosine gates
    nothing (one zeroed weight row leaves it at 0.99998). The rest describes the tensor that came nearest
    to its bound or went farthest beyond it: its relative RMS error, its ``bound``, the ``noise`` measured
    there, and the place of its largest absolute difference (or its first NaN). The long golden is number -1.
    """

    relative_rms: float = 0.0
    bound: float = 0.0
    noise: float | None = None
    golden: int = 0
    tensor: str = ""
    index: tuple[int, ...] = ()
    max_abs: float = 0.0
    cosine: float = 1.0
    channel: float = 0.0

    @property
    def where(self) -> str:
        """The golden that the tensor belongs to, in words."""
        return f"golden {self.golden}" if self.golden >= 0 else "the long golden"

    @property
    def snr_db(self) -> float:
        """Signal to noise in decibels, ``-20 log10(relative RMS)``; infinite where there is no error."""
        return -20 * math.log10(self.relative_rms) if self.relative_rms else math.inf

    def add(
        self,
        golden: int,
        tensor: str,
        found: np.ndarray,
        expected: np.ndarray,
        bound: float,
        noise: float | None = None,
        channel_bound: float | None = None,
    ) -> bool:
        """Whether two arrays of one shape lie within the bound: as a whole, and in every channel within
        ``channel_bound``, which is ``CHANNEL_FACTOR`` times the bound where it is not given."""
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.abs(found.astype(np.float64) - expected)
            error = relative_rms(found, expected)
            self.max_abs = float(np.maximum(self.max_abs, difference.max()))
            self.cosine = float(np.minimum(self.cosine, _cosine(found, expected)))
            channel = channel_error(found, expected)
            self.channel = float(np.maximum(self.channel, channel))
        if not self.tensor or _strain(error, bound) > _strain(self.relative_rms, self.bound):
            self.relative_rms, self.bound, self.noise = error, bound, noise
            self.golden, self.tensor = golden, tensor
            place = np.unravel_index(int(difference.argmax()), difference.shape)  # NaN counts as largest
            self.index = tuple(int(axis) for axis in place)
        return error <= bound and channel <= (channel_bound or CHANNEL_FACTOR * bound)


def _strain(error: float, bound: float) -> float:
    """How much of its bound an error uses; what is not a number uses more than all of it."""
    if math.isnan(error):
        return math.inf
    return error / bound if bound else (math.inf if error else 0.0)


def _cosine(found: np.ndarray, expected: np.ndarray) -> float:
    a, b = found.reshape(-1).astype(np.float64), expected.reshape(-1).astype(np.float64)
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / length if length else 1.0


def channel_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest of ``channel_errors``."""
    return float(np.max(channel_errors(found, expected)))


def channel_errors(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """RMS error of each channel (place in the last axis), relative to the tensor's RMS.

    A lost weight row spoils one channel alone, which the whole tensor's error dilutes by the root of
    their number. A channel that is larger than the tensor's RMS counts relative to its own.
    """
    exact = expected.astype(np.float64)
    difference = found.astype(np.float64) - exact
    axes = tuple(range(expected.ndim - 1))
    error = np.sqrt(np.mean(np.square(difference), axis=axes))
    size = np.sqrt(np.mean(np.square(exact), axis=axes))
    whole = np.sqrt(np.mean(np.square(exact)))
    return np.asarray(error / np.maximum(np.maximum(size, whole), 1e-30))


def tie_margin(logits: np.ndarray, noise: float) -> float:
    """Differences between two of the reference's logits ``[V]`` that a precision cannot tell from none.

    The noise is relative to the row's root mean square, and a standard deviation; a difference of two logits
    has root two of it, and ``TIE_DEVIATIONS`` of those are no rarity in hundreds of rows.
    """
    return (
        TIE_DEVIATIONS * math.sqrt(2) * noise * float(np.sqrt(np.mean(np.square(logits.astype(np.float64)))))
    )


def changed_choices(found: np.ndarray, expected: np.ndarray) -> float:
    """The noise, as ``tie_margin`` takes it, from which on all changed first choices of ``[K, V]`` logits
    are ties; 0 where none changed."""
    needed = 0.0
    for row, chosen, wanted in zip(expected, found.argmax(-1), expected.argmax(-1), strict=True):
        if chosen != wanted:
            needed = max(needed, float(row[wanted] - row[chosen]) / max(tie_margin(row, 1.0), 1e-30))
    return needed


@dataclass
class LogitAgreement:
    """Rows of logits: Kullback-Leibler divergence from the reference in nats, and the first choice.

    A ``near_tie`` is a changed first choice where the reference's own margin between the two lies below
    ``tie_margin``, the noise of the precision; any other change is a ``flip``.
    """

    rows: int = 0
    kl_mean: float = 0.0
    kl_max: float = 0.0
    top1_equal: int = 0
    near_ties: int = 0
    flips: int = 0

    def add(self, found: np.ndarray, expected: np.ndarray, noise: float) -> int:
        """Flips among these ``[K, V]`` logits."""
        divergence = kl_divergence(expected, found)
        total = self.kl_mean * self.rows + float(divergence.sum())
        self.rows += len(expected)
        self.kl_mean = total / self.rows
        self.kl_max = float(np.maximum(self.kl_max, divergence.max()))
        flips = self.flips
        for row, chosen, wanted in zip(expected, found.argmax(-1), expected.argmax(-1), strict=True):
            if chosen == wanted:
                self.top1_equal += 1
            elif float(row[wanted] - row[chosen]) <= tie_margin(row, noise):
                self.near_ties += 1
            else:
                self.flips += 1
        return self.flips - flips
