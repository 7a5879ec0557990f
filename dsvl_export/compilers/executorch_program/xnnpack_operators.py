"""The model's operators in the forms that XNNPACK takes, as PyTorch functions that are traced into a method.

XNNPACK takes no norm: its means are products with a constant here, which it does take, so that a norm makes
no border between two of its partitions. A decoder layer is cut in two only where its attention is.
"""

from __future__ import annotations

import math

import torch
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401 -- registers torch.ops.llama
from torch import Tensor
from torch.nn import functional as F

llama = torch.ops.llama


def first_position(cache_position: Tensor, capacity: int) -> int:
    """The first of ``[S]`` consecutive cache positions."""
    start: int = cache_position[0].item()  # type: ignore[assignment]
    torch._check(start >= 0)
    torch._check(start + cache_position.shape[0] <= capacity)
    torch._check(start < capacity)
    return start


def table_rows(table: Tensor, start: int, cache_position: Tensor) -> Tensor:
    """Rows of a RoPE table ``[P, Dh / 2]`` for consecutive positions, ``[1, S, 1, Dh / 2]``."""
    return table.narrow(0, start, cache_position.shape[0])[None, :, None]


def last_row(x: Tensor) -> Tensor:
    """``[1, S, C]`` → ``[1, 1, C]``"""
    return x[:, -1:]


def rms_norm(x: Tensor, weight: Tensor, mean: Tensor, eps: Tensor) -> Tensor:
    """RMSNorm (arXiv 1910.07467), in float32 inside.

    Args:
        mean: ``[1, C]``, each ``1 / C``.
        eps: ``[1]``
    """
    wide = x.float()
    return (wide * torch.rsqrt(F.linear(wide * wide, mean, eps))).to(x.dtype) * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, eps: Tensor) -> Tensor:
    """LayerNorm (arXiv 1607.06450), in float32 inside; ``mean`` and ``eps`` as in ``rms_norm``."""
    wide = x.float()
    centred = wide - F.linear(wide, mean)
    return (centred * torch.rsqrt(F.linear(centred * centred, mean, eps))).to(x.dtype) * weight + bias


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU's approximation by a hyperbolic tangent (arXiv 1606.08415), which XNNPACK's own GELU is not."""
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Softmax attention of ``[B, H, T, Dh]``, heads as a batch of products."""
    batch, heads, queries, _ = q.shape
    q, k, v = (part.flatten(0, 1) for part in (q, k, v))
    scores = torch.bmm(q * scale, k.transpose(1, 2))
    return torch.bmm(torch.softmax(scores, -1), v).view(batch, heads, queries, v.shape[-1])


def relative_scores(q: Tensor, table: Tensor) -> Tensor:
    """Queries of a grid times the relative embeddings of its rows (or columns).

    Args:
        q: ``[B, H, n, m, Dh]``; table: ``[n, Dh, n]``.

    Returns:
        ``[B, H, n, m, n]``
    """
    batch, heads, rows, columns, width = q.shape
    by_row = q.permute(2, 0, 1, 3, 4).reshape(rows, batch * heads * columns, width)
    found = torch.bmm(by_row, table)
    return found.view(rows, batch, heads, columns, rows).permute(1, 2, 0, 3, 4)


def grid_one_hot(grid: int) -> Tensor:
    """``[1, T, 2n]``: for each cell of an ``n × n`` grid, ones at its row and, behind them, at its column."""
    one = torch.eye(grid)
    return torch.cat([one.repeat_interleave(grid, 0), one.repeat(grid, 1)], -1)[None]


def relative_attention(
    q: Tensor, k: Tensor, v: Tensor, by_row: Tensor, by_column: Tensor, cells: Tensor, scale: float
) -> Tensor:
    """Attention over an ``n × n`` grid whose scores are shifted by ``by_row + by_column``.

    The shift of a pair is a product as well, of the query's shifts with the key's cell; put behind the head's
    own dimensions, both come out of one product, and nothing of the size of the scores is added. One head at
    a time: a global layer's scores take 64 MB for each.

    Args:
        q, k, v: ``[B, H, T, Dh]``, T the cells of the grid.
        by_row, by_column: ``[B, H, n, n, n]``: query's row, query's column, key's row (or column).
        cells: ``grid_one_hot`` for B images.
    """
    shifts = torch.cat([by_row.flatten(2, 3), by_column.flatten(2, 3)], -1)  # [B, H, T, 2n]
    heads = []
    for head in range(q.shape[1]):
        query, shift, key, value = (
            part[:, head : head + 1].flatten(0, 1) for part in (q * scale, shifts, k, v)
        )
        key = torch.cat([key, cells], -1)
        weights = torch.softmax(torch.bmm(torch.cat([query, shift], -1), key.transpose(1, 2)), -1)
        images, cells_of_image, width = value.shape
        heads.append(torch.bmm(weights, value).view(images, 1, cells_of_image, width))
    return torch.cat(heads, 1)


def rotate_halves(first: Tensor, second: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in LLaMA's half-split form (arXiv 2104.09864), the halves computed apart.

    XNNPACK cannot slice where a length is open, so that the projections give the halves of all heads.

    Args:
        first, second: ``[1, S, H * Dh / 2]``.
        cos, sin: ``[1, S, 1, Dh / 2]``.

    Returns:
        ``[1, S, H, Dh]``
    """
    half = cos.shape[-1]
    heads = first.shape[-1] // half
    first, second = first.view(1, -1, heads, half), second.view(1, -1, heads, half)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def cached_attention(
    query: Tensor, key: Tensor, value: Tensor, start: int, key_cache: Tensor, value_cache: Tensor
) -> Tensor:
    """Write the new keys and values, attend causally.

    Args:
        query: ``[1, S, H, Dh]``, rotated; key: ``[1, S, Hkv, Dh]``, rotated; value: ``[1, S, Hkv * Dh]``.
        key_cache, value_cache: ``[1, C, Hkv, Dh]``, updated in place.

    Returns:
        ``[1, S, H * Dh]``
    """
    _, _, kv_heads, head_dim = key_cache.shape
    llama.update_cache(key, key_cache, start)
    llama.update_cache(value.view(1, -1, kv_heads, head_dim), value_cache, start)
    out = llama.custom_sdpa(query, key_cache, value_cache, start, None, 0.0, True)
    return out.view(1, -1, query.shape[2] * head_dim)
