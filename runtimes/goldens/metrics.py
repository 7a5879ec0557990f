"""Measures of logits that calibration and the parity check share."""

from __future__ import annotations

import numpy as np


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Compute the log probabilities ``[K, V]`` of logits ``[K, V]``, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def kl_divergence(expected: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """Compute the Kullback-Leibler divergences ``[K]`` of logits ``[K, V]``, in nats."""
    with np.errstate(invalid="ignore", over="ignore"):
        p, q = log_softmax(expected), log_softmax(actual)
        return np.asarray(np.sum(np.exp(p) * (p - q), axis=-1))
