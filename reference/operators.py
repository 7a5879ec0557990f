"""The decoder's attention as one operator, so that a traced program keeps it whole.

A compiler lowers ``dsvl::cached_attention`` to its backend's own form (GroupQueryAttention,
TensorScatter + Attention, a custom SDPA); where there is none, ``cached_attention`` below is
plain ATen and can be traced in its place.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


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
) -> Tensor:
    """Rotate, write the new keys and values into the cache, attend causally over it.

    Args:
        query: ``[B, S, H * Dh]``; key, value: ``[B, S, Hkv * Dh]``.
        positions: ``[B, S]`` int64; consecutive in each row, below the capacity C.
        cos, sin: ``[P, Dh / 2]`` tables.
        key_cache, value_cache: ``[B, Hkv, C, Dh]``, updated in place.

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
    key_cache.scatter_(2, slots, k.to(key_cache.dtype))
    value_cache.scatter_(2, slots, v.to(value_cache.dtype))
    visible = torch.arange(capacity, device=query.device) <= positions[:, None, :, None]
    out = F.scaled_dot_product_attention(
        q,
        key_cache.to(q.dtype),
        value_cache.to(q.dtype),
        attn_mask=visible,  # [B, 1, S, C]
        enable_gqa=q.shape[1] != key_cache.shape[1],
    )
    return out.transpose(1, 2).flatten(2)


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
) -> Tensor:
    return torch.empty_like(query)
