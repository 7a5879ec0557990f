"""How far what a backend computes lies from what the reference computed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from runtimes.goldens import relative_rms


@dataclass
class Errors:
    """Errors of a rung over all its tensors.

    ``max_abs`` and ``cosine`` are the worst of all; the cosine gates nothing (one zeroed weight row
    leaves it at 0.99998). The rest describes the tensor that came nearest to its bound or went
    farthest beyond it: its relative RMS error, its ``bound``, the ``noise`` measured there, and the
    place of its largest absolute difference (or its first NaN).
    """

    relative_rms: float = 0.0
    bound: float = 0.0
    noise: float | None = None
    golden: int = 0
    tensor: str = ""
    index: tuple[int, ...] = ()
    max_abs: float = 0.0
    cosine: float = 1.0

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
    ) -> bool:
        """Whether the relative RMS error of two arrays of one shape is within its bound."""
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.abs(found.astype(np.float64) - expected)
            error = relative_rms(found, expected)
            self.max_abs = float(np.maximum(self.max_abs, difference.max()))
            self.cosine = float(np.minimum(self.cosine, _cosine(found, expected)))
        if not self.tensor or _strain(error, bound) > _strain(self.relative_rms, self.bound):
            self.relative_rms, self.bound, self.noise = error, bound, noise
            self.golden, self.tensor = golden, tensor
            place = np.unravel_index(int(difference.argmax()), difference.shape)  # NaN counts as largest
            self.index = tuple(int(axis) for axis in place)
        return error <= bound


def _strain(error: float, bound: float) -> float:
    """How much of its bound an error uses; what is not a number uses more than all of it."""
    if math.isnan(error):
        return math.inf
    return error / bound if bound else (math.inf if error else 0.0)


def _cosine(found: np.ndarray, expected: np.ndarray) -> float:
    a, b = found.reshape(-1).astype(np.float64), expected.reshape(-1).astype(np.float64)
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / length if length else 1.0


def tie_margin(logits: np.ndarray, bound: float) -> float:
    """Differences between two of the reference's logits ``[V]`` that a precision cannot tell from none.

    The bound is relative, so it is scaled by the row's root mean square.
    """
    return bound * float(np.sqrt(np.mean(np.square(logits.astype(np.float64)))))


@dataclass
class LogitAgreement:
    """Rows of logits: Kullback-Leibler divergence from the reference in nats, and the first choice.

    A ``near_tie`` is a changed first choice where the reference's own margin between the two is below
    ``tie_margin``; any other change is a ``flip``.
    """

    rows: int = 0
    kl_mean: float = 0.0
    kl_max: float = 0.0
    top1_equal: int = 0
    near_ties: int = 0
    flips: int = 0

    def add(self, found: np.ndarray, expected: np.ndarray, bound: float) -> int:
        """Flips among these ``[K, V]`` logits."""
        with np.errstate(invalid="ignore", over="ignore"):
            p, q = _log_softmax(expected), _log_softmax(found)
            divergence = np.sum(np.exp(p) * (p - q), axis=-1)
        total = self.kl_mean * self.rows + float(divergence.sum())
        self.rows += len(expected)
        self.kl_mean = total / self.rows
        self.kl_max = float(np.maximum(self.kl_max, divergence.max()))
        flips = self.flips
        for row, chosen, wanted in zip(expected, found.argmax(-1), expected.argmax(-1), strict=True):
            if chosen == wanted:
                self.top1_equal += 1
            elif float(row[wanted] - row[chosen]) <= tie_margin(row, bound):
                self.near_ties += 1
            else:
                self.flips += 1
        return self.flips - flips


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
