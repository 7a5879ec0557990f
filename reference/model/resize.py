"""Bilinear resizing written as constant matrices: ``Wh @ image @ Ww^T``.

A fixed resize is linear, so two matrix products compute it exactly on every backend,
also where Resize has no antialias (TensorRT).
"""

from __future__ import annotations

import torch
from torch import Tensor


def bilinear_matrix(source: int, target: int, antialias: bool) -> Tensor:
    """Matrix ``[target, source]`` of 1-D bilinear interpolation, half-pixel centres, float32.

    With ``antialias`` the triangle filter is widened by the scale when shrinking, as in PIL and
    in ``torch.nn.functional.interpolate(antialias=True)``; without it, neighbours beyond the
    border are clamped as in ``interpolate(align_corners=False)``.
    """
    scale = source / target
    centres = (torch.arange(target, dtype=torch.float64) + 0.5) * scale  # [target]
    pixels = torch.arange(source, dtype=torch.float64) + 0.5  # [source]
    if antialias:
        support = max(scale, 1.0)
        weights = (1 - (pixels[None, :] - centres[:, None]).abs() / support).clamp(min=0)
        weights = weights / weights.sum(1, keepdim=True)
    else:
        centres = centres.clamp(0.5, source - 0.5)
        weights = (1 - (pixels[None, :] - centres[:, None]).abs()).clamp(min=0)
    return weights.to(torch.float32)


def resize(image: Tensor, matrix: Tensor) -> Tensor:
    """``[B, C, N, N]`` → ``[B, C, M, M]`` with one ``[M, N]`` matrix for both axes."""
    return torch.matmul(torch.matmul(matrix, image), matrix.t())
