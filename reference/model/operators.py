"""The decoder's attention as one operator, so that a traced program keeps it whole.

A compiler lowers ``dsvl::cached_attention`` to its backend's own form (GroupQueryAttention,
TensorScatter + Attention, a custom SDPA); where there is none, ``cached_attention`` below is
plain ATen and can be traced in its place.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor
from torch.nn import functional as F

FLOAT8_MAX = 448.0  # of E4M3, arXiv 2209.05433


def rope_tables(head_dim: int, theta: float, positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[positions, head_dim / 2]`` of RoPE (arXiv 2104.09864), float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    # Written as transformers does: theta**-x rounds differently, by 5e-4 at position 16,000.
    frequencies = 1.0 / theta**exponents
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in LLaMA's half-split form.

    Args:
        x: ``[B, S, H, Dh]``; cos, sin: ``[B, S, 1, Dh / 2]``.
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
    """Rotate, write the new keys and values into the cache, attend causally over it.

    Args:
        query: ``[B, S, H * Dh]``; key, value: ``[B, S, Hkv * Dh]``.
        positions: ``[B, S]`` int64; consecutive in each row, below the capacity C.
        cos, sin: ``[P, Dh / 2]`` tables.
        key_cache, value_cache: ``[B, Hkv, C, Dh]``, updated in place; int8 or, as uint8, the bits of
            float8 (E4M3) where there are scales.
        key_scale, value_scale: ``[Hkv]`` of a quantized cache.

    Returns:
        ``[B, S, H * Dh]``
    """
    capacity, head_dim = key_cache.shape[2:]
    rows_cos = F.embedding(positions, cos).unsqueeze(2).to(query.dtype)  # [B, S, 1, Dh / 2]
    rows_sin = F.embedding(positions, sin).unsqueeze(2).to(query.dtype)
    q = rotate(query.unflatten(-1, (-1, head_dim)), rows_cos, rows_sin).transpose(1, 2)
    k = rotate(key.unflatten(-1, (-1, head_dim)), rows_cos, rows_sin).transpose(1, 2)
    v = value.unflatten(-1, (-1, head_dim)).transpose(1, 2)  # [B, Hkv, S, Dh]
    slots = positions[:, None, :, None].expand(k.shape)
    key_cache.scatter_(2, slots, _stored(k, key_scale, key_cache.dtype))
    value_cache.scatter_(2, slots, _stored(v, value_scale, value_cache.dtype))
    visible = torch.arange(capacity, device=query.device) <= positions[:, None, :, None]
    out = F.scaled_dot_product_attention(
        q,
        _restored(key_cache, key_scale, q.dtype),
        _restored(value_cache, value_scale, q.dtype),
        attn_mask=visible,  # [B, 1, S, C]
        enable_gqa=q.shape[1] != key_cache.shape[1],
    )
    return out.transpose(1, 2).flatten(2)


def _stored(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Keys or values ``[B, Hkv, S, Dh]`` as the cache keeps them."""
    if scale is None:
        return x.to(dtype)
    scaled = x.float() / scale.float()[:, None, None]
    if dtype == torch.int8:
        return scaled.round().clamp(-128, 127).to(torch.int8)
    return scaled.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def _restored(cache: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What a cache stands for."""
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
