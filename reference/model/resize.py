"""Bilinear resizing as products with constant matrices: ``Wh @ image @ Ww^T``.

Resizing between fixed sizes is linear, so two matrix products compute it exactly on every backend,
also on those whose Resize has no antialiasing (TensorRT).
"""

from __future__ import annotations

import torch
from torch import Tensor


def bilinear_matrix(source: int, target: int, antialias: bool) -> Tensor:
    """Build the matrix of 1-D bilinear interpolation with half-pixel centers.

    Args:
        source: pixels of the input.
        target: pixels of the output.
        antialias: widen the triangle filter by the scale when shrinking, as in PIL and in
            ``torch.nn.functional.interpolate(antialias=True)``. Otherwise neighbors beyond the
            border are clamped as in ``interpolate(align_corners=False)``.

    Returns:
        ``[target, source]`` float32.
    """
    scale = source / target
    centers = (torch.arange(target, dtype=torch.float64) + 0.5) * scale  # [target]
    pixels = torch.arange(source, dtype=torch.float64) + 0.5  # [source]
    if antialias:
        support = max(scale, 1.0)
        weights = (1 - (pixels[None, :] - centers[:, None]).abs() / support).clamp(min=0)
        weights = weights / weights.sum(1, keepdim=True)
    else:
        centers = centers.clamp(0.5, source - 0.5)
        weights = (1 - (pixels[None, :] - centers[:, None]).abs()).clamp(min=0)
    return weights.to(torch.float32)


def resize(image: Tensor, matrix: Tensor) -> Tensor:
    """Resize ``[B, C, N, N]`` to ``[B, C, M, M]`` with one matrix ``[M, N]`` for both axes."""
    return torch.matmul(torch.matmul(matrix, image), matrix.t())
