"""The model's operators in the forms that XNNPACK runs, as functions that are traced into a method.

XNNPACK has no norm. The means of a norm are products with a constant here, which XNNPACK has, so
that a norm does not end a partition. A decoder layer is split into two partitions only at its
attention.
"""

from __future__ import annotations

import math

import torch
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401 -- torch.ops.llama
from torch import Tensor
from torch.nn import functional as F

llama = torch.ops.llama


def first_position(cache_position: Tensor, capacity: int) -> int:
    """Return the first of ``[S]`` consecutive cache positions."""
    start: int = cache_position[0].item()  # type: ignore[assignment]
    torch._check(start >= 0)
    torch._check(start + cache_position.shape[0] <= capacity)
    torch._check(start < capacity)
    return start


def table_rows(table: Tensor, start: int, cache_position: Tensor) -> Tensor:
    """Select rows of a RoPE table ``[P, Dh / 2]`` for consecutive positions.

    Returns:
        ``[1, S, 1, Dh / 2]``.
    """
    return table.narrow(0, start, cache_position.shape[0])[None, :, None]


def last_row(x: Tensor) -> Tensor:
    """Select the last row: ``[1, S, C]`` → ``[1, 1, C]``."""
    return x[:, -1:]


def rms_norm(x: Tensor, weight: Tensor, mean: Tensor, eps: Tensor) -> Tensor:
    """Compute RMSNorm (arXiv 1910.07467), in float32 inside.

    Args:
        x: ``[..., C]``.
        weight: ``[C]``.
        mean: ``[1, C]``, each ``1 / C``.
        eps: ``[1]``.
    """
    wide = x.float()
    return (wide * torch.rsqrt(F.linear(wide * wide, mean, eps))).to(x.dtype) * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, eps: Tensor) -> Tensor:
    """Compute LayerNorm (arXiv 1607.06450), in float32 inside; arguments as for ``rms_norm``."""
    wide = x.float()
    centered = wide - F.linear(wide, mean)
    return (centered * torch.rsqrt(F.linear(centered * centered, mean, eps))).to(x.dtype) * weight + bias


def gelu_tanh(x: Tensor) -> Tensor:
    """Compute GELU's tanh approximation (arXiv 1606.08415), which XNNPACK's own GELU is not."""
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Compute softmax attention of ``[B, H, T, Dh]``, with the heads as a batch of products."""
    batch, heads, queries, _ = q.shape
    q, k, v = (part.flatten(0, 1) for part in (q, k, v))
    scores = torch.bmm(q * scale, k.transpose(1, 2))
    return torch.bmm(torch.softmax(scores, -1), v).view(batch, heads, queries, v.shape[-1])


def relative_scores(q: Tensor, table: Tensor) -> Tensor:
    """Multiply the queries of a grid with the relative embeddings of its rows (or columns).

    Args:
        q: ``[B, H, n, m, Dh]``.
        table: ``[n, Dh, n]``.

    Returns:
        ``[B, H, n, m, n]``.
    """
    batch, heads, rows, columns, width = q.shape
    by_row = q.permute(2, 0, 1, 3, 4).reshape(rows, batch * heads * columns, width)
    found = torch.bmm(by_row, table)
    return found.view(rows, batch, heads, columns, rows).permute(1, 2, 0, 3, 4)


def grid_one_hot(grid: int) -> Tensor:
    """Encode each cell of an ``n × n`` grid by its row and column, one-hot: ``[1, T, 2n]``."""
    one = torch.eye(grid)
    return torch.cat([one.repeat_interleave(grid, 0), one.repeat(grid, 1)], -1)[None]


def relative_attention(
    q: Tensor, k: Tensor, v: Tensor, by_row: Tensor, by_column: Tensor, cells: Tensor, scale: float
) -> Tensor:
    """Compute attention over an ``n × n`` grid whose scores are shifted by ``by_row + by_column``.

    The shift of a pair is the product of the query's shifts and the one-hot code of the key's cell.
    Appended to the head's dimensions, both come out of one product, and no tensor of the size of
    the scores is added. The heads are computed one at a time: the scores of a global layer take 64
    MB per head.

    Args:
        q: ``[B, H, T, Dh]``, T the cells of the grid.
        k: ``[B, H, T, Dh]``.
        v: ``[B, H, T, Dh]``.
        by_row: ``[B, H, n, n, n]``: query's row, query's column, key's row.
        by_column: ``[B, H, n, n, n]``: query's row, query's column, key's column.
        cells: ``grid_one_hot`` for B images.
        scale: factor of the scores.
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
    """Apply RoPE in LLaMA's half-split form (arXiv 2104.09864) to halves that are separate tensors.

    XNNPACK cannot slice where a length is open, so the projections compute the two halves of all
    heads.

    Args:
        first: ``[1, S, H * Dh / 2]``, the first halves.
        second: ``[1, S, H * Dh / 2]``, the second halves.
        cos: ``[1, S, 1, Dh / 2]``.
        sin: ``[1, S, 1, Dh / 2]``.

    Returns:
        ``[1, S, H, Dh]``.
    """
    half = cos.shape[-1]
    heads = first.shape[-1] // half
    first, second = first.view(1, -1, heads, half), second.view(1, -1, heads, half)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def cached_attention(
    query: Tensor, key: Tensor, value: Tensor, start: int, key_cache: Tensor, value_cache: Tensor
) -> Tensor:
    """Write the new keys and values into the cache and attend causally.

    Args:
        query: ``[1, S, H, Dh]``, rotated.
        key: ``[1, S, Hkv, Dh]``, rotated.
        value: ``[1, S, Hkv * Dh]``.
        start: position of the first token.
        key_cache: ``[1, C, Hkv, Dh]``, updated in place.
        value_cache: ``[1, C, Hkv, Dh]``, updated in place.

    Returns:
        ``[1, S, H * Dh]``.
    """
    _, _, kv_heads, head_dim = key_cache.shape
    llama.update_cache(key, key_cache, start)
    llama.update_cache(value.view(1, -1, kv_heads, head_dim), value_cache, start)
    out = llama.custom_sdpa(query, key_cache, value_cache, start, None, 0.0, True)
    return out.view(1, -1, query.shape[2] * head_dim)
