"""Measures of the difference between what a backend and what the reference computes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from runtimes.goldens.golden import relative_rms
from runtimes.goldens.metrics import kl_divergence

# A single channel may be off by so many times the bound of the tensor; a lost row of the head
# exceeds that 14 times in fp16.
CHANNEL_FACTOR = 10
TIE_DEVIATIONS = 2


@dataclass
class Errors:
    """Errors of a stage over all its tensors.

    ``max_abs``, ``cosine`` and ``channel`` (see ``channel_error``) are the worst of all tensors.
    The cosine similarity decides nothing: one zeroed weight row leaves it at 0.99998. The other
    fields describe the tensor that is nearest to its bound, or farthest beyond it: its relative RMS
    error, its ``bound``, the reference's ``quantization_error`` there, and the ``index`` of its
    largest absolute difference (or first NaN). The long golden has the number -1.
    """

    relative_rms: float = 0.0
    bound: float = 0.0
    quantization_error: float | None = None
    golden: int = 0
    tensor: str = ""
    index: tuple[int, ...] = ()
    max_abs: float = 0.0
    cosine: float = 1.0
    channel: float = 0.0

    @property
    def where(self) -> str:
        """Name of the golden that the tensor belongs to."""
        return f"golden {self.golden}" if self.golden >= 0 else "the long golden"

    @property
    def snr_db(self) -> float:
        """Signal-to-noise ratio in dB, ``-20 log10(relative RMS)``.

        Infinite if there is no error.
        """
        return -20 * math.log10(self.relative_rms) if self.relative_rms else math.inf

    def add(
        self,
        golden: int,
        tensor: str,
        actual: np.ndarray,
        expected: np.ndarray,
        bound: float,
        quantization_error: float | None = None,
        channel_bound: float | None = None,
    ) -> bool:
        """Compare two arrays of one shape; return whether the error lies within the bounds.

        Args:
            golden: number of the golden.
            tensor: name of the tensor.
            actual: what the artifact computes.
            expected: what the reference computes.
            bound: largest relative RMS error of the tensor.
            quantization_error: error of the reference at this precision, which is only recorded.
            channel_bound: largest ``channel_error``; None is ``CHANNEL_FACTOR`` times ``bound``.
        """
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.abs(actual.astype(np.float64) - expected)
            error = relative_rms(actual, expected)
            self.max_abs = float(np.maximum(self.max_abs, difference.max()))
            self.cosine = float(np.minimum(self.cosine, _cosine(actual, expected)))
            channel = channel_error(actual, expected)
            self.channel = float(np.maximum(self.channel, channel))
        if not self.tensor or _bound_usage(error, bound) > _bound_usage(self.relative_rms, self.bound):
            self.relative_rms, self.bound, self.quantization_error = error, bound, quantization_error
            self.golden, self.tensor = golden, tensor
            place = np.unravel_index(int(difference.argmax()), difference.shape)  # NaN is largest
            self.index = tuple(int(axis) for axis in place)
        return error <= bound and channel <= (channel_bound or CHANNEL_FACTOR * bound)


def _bound_usage(error: float, bound: float) -> float:
    """Return the error as a share of its bound; NaN is infinite."""
    if math.isnan(error):
        return math.inf
    return error / bound if bound else (math.inf if error else 0.0)


def _cosine(actual: np.ndarray, expected: np.ndarray) -> float:
    a, b = actual.reshape(-1).astype(np.float64), expected.reshape(-1).astype(np.float64)
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / length if length else 1.0


def channel_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest of ``channel_errors``."""
    return float(np.max(channel_errors(actual, expected)))


def channel_errors(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Return the RMS error of each channel (index of the last axis), relative to the tensor's RMS.

    A lost weight row makes one channel wrong, which the error of the whole tensor divides by the
    root of the number of channels. The error of a channel that is larger than the tensor's RMS is
    relative to the channel's own RMS.
    """
    exact = expected.astype(np.float64)
    difference = actual.astype(np.float64) - exact
    axes = tuple(range(expected.ndim - 1))
    error = np.sqrt(np.mean(np.square(difference), axis=axes))
    channel_rms = np.sqrt(np.mean(np.square(exact), axis=axes))
    tensor_rms = np.sqrt(np.mean(np.square(exact)))
    return np.asarray(error / np.maximum(np.maximum(channel_rms, tensor_rms), 1e-30))


def tie_margin(logits: np.ndarray, error: float) -> float:
    """Return the difference of two logits ``[V]`` below which a precision cannot tell them apart.

    The error is relative to the RMS of the row, and is taken as a standard deviation. A difference
    of two logits has root two times it, and ``TIE_DEVIATIONS`` of those are not rare in hundreds of
    rows.
    """
    rms = float(np.sqrt(np.mean(np.square(logits.astype(np.float64)))))
    return TIE_DEVIATIONS * math.sqrt(2) * error * rms


def top1_tie_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the error from which on all changed top-1 tokens of ``[K, V]`` logits are near ties.

    The unit is that of ``tie_margin``; 0 if no top-1 token changed.
    """
    needed = 0.0
    for row, token, wanted in zip(expected, actual.argmax(-1), expected.argmax(-1), strict=True):
        if token != wanted:
            needed = max(needed, float(row[wanted] - row[token]) / max(tie_margin(row, 1.0), 1e-30))
    return needed


@dataclass
class LogitAgreement:
    """Agreement of rows of logits: KL divergence from the reference in nats, and the top-1 token.

    A ``near_tie`` is a changed top-1 token where the reference's own margin between the two tokens
    lies below ``tie_margin``; any other change is a ``flip``.
    """

    rows: int = 0
    kl_mean: float = 0.0
    kl_max: float = 0.0
    top1_equal: int = 0
    near_ties: int = 0
    flips: int = 0

    def add(self, actual: np.ndarray, expected: np.ndarray, tie_error: float) -> int:
        """Compare ``[K, V]`` logits; return the number of flips among them."""
        divergence = kl_divergence(expected, actual)
        total = self.kl_mean * self.rows + float(divergence.sum())
        self.rows += len(expected)
        self.kl_mean = total / self.rows
        self.kl_max = float(np.maximum(self.kl_max, divergence.max()))
        flips = self.flips
        for row, token, wanted in zip(expected, actual.argmax(-1), expected.argmax(-1), strict=True):
            if token == wanted:
                self.top1_equal += 1
            elif float(row[wanted] - row[token]) <= tie_margin(row, tie_error):
                self.near_ties += 1
            else:
                self.flips += 1
        return self.flips - flips
