"""The decoder's attention as one custom operator, which a traced program does not decompose.

A compiler lowers ``dsvl::cached_attention`` to its backend's own form (GroupQueryAttention,
TensorScatter + Attention, a custom SDPA). If a backend has none, ``cached_attention`` below is ATen
and can be traced instead.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor
from torch.nn import functional as F

FLOAT8_MAX = 448.0  # of E4M3, arXiv 2209.05433


def rope_tables(head_dim: int, theta: float, positions: int) -> tuple[Tensor, Tensor]:
    """Compute RoPE's cosines and sines (arXiv 2104.09864), ``[positions, head_dim / 2]`` fp32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    # The same expression as in transformers: theta**-x differs by 5e-4 at position 16,000.
    frequencies = 1.0 / theta**exponents
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE in LLaMA's half-split form.

    Args:
        x: ``[B, S, H, Dh]``.
        cos: ``[B, S, 1, Dh / 2]``.
        sin: ``[B, S, 1, Dh / 2]``.

    Returns:
        ``[B, S, H, Dh]``.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scale: Optional[Tensor] = None,
    value_scale: Optional[Tensor] = None,
) -> Tensor:
    """Apply RoPE, write the new keys and values into the cache, and attend causally over it.

    Args:
        query: ``[B, S, H * Dh]``.
        key: ``[B, S, Hkv * Dh]``.
        value: ``[B, S, Hkv * Dh]``.
        positions: ``[B, S]`` int64; consecutive in each row, below the capacity C.
        cos: table ``[P, Dh / 2]``.
        sin: table ``[P, Dh / 2]``.
        key_cache: ``[B, Hkv, C, Dh]``, updated in place. A quantized cache is int8, or uint8 with
            the bits of float8 (E4M3).
        value_cache: as ``key_cache``.
        key_scale: ``[Hkv]`` of a quantized cache.
        value_scale: ``[Hkv]`` of a quantized cache.

    Returns:
        ``[B, S, H * Dh]``.
    """
    capacity, head_dim = key_cache.shape[2:]
    rows_cos = F.embedding(positions, cos).unsqueeze(2).to(query.dtype)  # [B, S, 1, Dh / 2]
    rows_sin = F.embedding(positions, sin).unsqueeze(2).to(query.dtype)
    q = apply_rope(query.unflatten(-1, (-1, head_dim)), rows_cos, rows_sin).transpose(1, 2)
    k = apply_rope(key.unflatten(-1, (-1, head_dim)), rows_cos, rows_sin).transpose(1, 2)
    v = value.unflatten(-1, (-1, head_dim)).transpose(1, 2)  # [B, Hkv, S, Dh]
    slots = positions[:, None, :, None].expand(k.shape)
    key_cache.scatter_(2, slots, _quantize_for_cache(k, key_scale, key_cache.dtype))
    value_cache.scatter_(2, slots, _quantize_for_cache(v, value_scale, value_cache.dtype))
    visible = torch.arange(capacity, device=query.device) <= positions[:, None, :, None]
    out = F.scaled_dot_product_attention(
        q,
        _dequantize_cache(key_cache, key_scale, q.dtype),
        _dequantize_cache(value_cache, value_scale, q.dtype),
        attn_mask=visible,  # [B, 1, S, C]
        enable_gqa=q.shape[1] != key_cache.shape[1],
    )
    return out.transpose(1, 2).flatten(2)


def _quantize_for_cache(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Convert keys or values ``[B, Hkv, S, Dh]`` to the dtype of the cache."""
    if scale is None:
        return x.to(dtype)
    scaled = x.float() / scale.float()[:, None, None]
    if dtype == torch.int8:
        return scaled.round().clamp(-128, 127).to(torch.int8)
    return scaled.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def _dequantize_cache(cache: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Convert a cache to the dtype that attention computes in."""
    if scale is None:
        return cache.to(dtype)
    codes = cache if cache.dtype == torch.int8 else cache.view(torch.float8_e4m3fn)
    return (codes.float() * scale.float()[:, None, None]).to(dtype)


cached_attention_op = torch.library.custom_op(
    "dsvl::cached_attention", cached_attention, mutates_args=("key_cache", "value_cache")
)


@cached_attention_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scale: Optional[Tensor] = None,
    value_scale: Optional[Tensor] = None,
) -> Tensor:
    return torch.empty_like(query)
