"""Measures of logits that calibration and the parity check share."""

from __future__ import annotations

import numpy as np


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """``[K, V]`` logarithms of probabilities, float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def kl_divergence(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """``[K]`` Kullback-Leibler divergences of ``found`` from ``expected`` logits ``[K, V]``, in nats."""
    with np.errstate(invalid="ignore", over="ignore"):
        p, q = log_softmax(expected), log_softmax(found)
        return np.asarray(np.sum(np.exp(p) * (p - q), axis=-1))
