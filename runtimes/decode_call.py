"""Calls of ``DecoderSession.decode``: their validation, and their split into the lengths of a program."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from runtimes.bundle.contracts import Contract
from runtimes.cache import KVCache

ANY_NUMBER = sys.maxsize
Cache = TypeVar("Cache", bound=KVCache)


@contextmanager
def validated_call(
    contract: Contract,
    cache_type: type[Cache],
    inputs_embeds: np.ndarray,
    logit_rows: np.ndarray,
    cache: KVCache,
    batched_prefill: bool = False,
) -> Iterator[tuple[Cache, np.ndarray, np.ndarray]]:
    """Validate a decode call and claim its positions; if the block fails, they are free again.

    Args:
        cache_type: of the caches that the session makes.
        inputs_embeds: ``[B, S, D]``; logit_rows: ``[K]``.
        batched_prefill: the session takes several tokens of several sequences.

    Yields:
        the cache, ``logit_rows [K]`` and ``positions [B, S]``, both int64.

    Raises:
        TypeError: the cache is of another type.
        ValueError: a shape, a dtype or a logit row is wrong.
        CapacityError: the cache is too short.
    """
    if not isinstance(cache, cache_type):
        raise TypeError("this cache was made by another backend's session")
    contract.inputs[0].check(inputs_embeds)
    batch, length, _ = inputs_embeds.shape
    if batch > 1 and length > 1 and not batched_prefill:
        raise ValueError("several tokens at once are for one row only; use row()")
    if batch != cache.batch:
        raise ValueError(f"{batch} rows were given for a cache of {cache.batch}")
    rows = np.ascontiguousarray(logit_rows, np.int64)
    listed = rows.tolist()  # of few numbers; numpy's minimum takes ten times as long
    if listed and not 0 <= min(listed) <= max(listed) < length:
        raise ValueError(f"the logit rows {listed} do not lie in {length} tokens")
    positions = cache.append(length)
    try:
        yield cache, rows, positions
    except BaseException:
        cache.rewind(length)
        raise


@dataclass(frozen=True)
class CallLimits:
    """What one run of a program takes.

    Args:
        tokens: the most.
        rows: the most logit rows.
        last_row_only: the program gives the logits of its last token alone.
        padded_to: capacity of a program that takes one token or exactly ``tokens``, for which shorter
            pieces are padded; None takes every number of tokens.
    """

    tokens: int
    rows: int = ANY_NUMBER
    last_row_only: bool = False
    padded_to: int | None = None


@dataclass(frozen=True)
class Piece:
    """Tokens ``start`` to ``stop`` of a call, padded to ``length``, and ``rows`` of the call among them.

    At least one row: the last token's, where no logits are wanted.
    """

    start: int
    stop: int
    length: int
    rows: tuple[int, ...]


def split_call(tokens: int, rows: Sequence[int], position: int, limits: CallLimits) -> list[Piece]:
    """Split a call so that each piece is within the limits.

    Args:
        tokens: of the call.
        rows: those whose logits are wanted, in any order.
        position: of the first token in the cache; padding must fit behind it.

    Returns:
        pieces in order, which cover every token once and every wanted row once, in ascending order.
    """
    wanted, pieces, start = sorted(set(rows)), [], 0
    while start < tokens:
        stop = min(start + limits.tokens, tokens)
        inside = [row for row in wanted if start <= row < stop]
        if limits.last_row_only and inside:
            stop = inside[0] + 1
        elif len(inside) > limits.rows:
            stop = inside[limits.rows]
        length = stop - start
        if limits.padded_to is not None and length > 1:
            if position + start + limits.tokens <= limits.padded_to:
                length = limits.tokens
            else:  # the padding would not fit
                stop, length = start + 1, 1
        pieces.append(Piece(start, stop, length, tuple(row for row in inside if row < stop) or (stop - 1,)))
        start = stop
    return pieces
