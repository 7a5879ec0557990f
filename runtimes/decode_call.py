"""Validation of ``DecoderSession.decode`` calls, and their split into runs of a program."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from runtimes.bundle.contracts import Contract
from runtimes.cache import KVCache

UNLIMITED = sys.maxsize
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
    """Validate a decode call and claim its positions in the cache.

    If the block raises, the positions are released.

    Args:
        contract: the contract of the decoder.
        cache_type: the type of cache that the session creates.
        inputs_embeds: ``[B, S, D]``.
        logit_rows: rows ``[K]`` of S whose logits are requested.
        cache: the cache of the call.
        batched_prefill: whether the session accepts S > 1 together with B > 1.

    Yields:
        the cache, ``logit_rows [K]`` and ``positions [B, S]``, both int64.

    Raises:
        TypeError: the cache is of another type.
        ValueError: a shape, a dtype or a logit row is wrong.
        CapacityError: the cache is too short.
    """
    if not isinstance(cache, cache_type):
        raise TypeError(
            f"the session needs a {cache_type.__name__} from its own new_cache, got a {type(cache).__name__}"
        )
    contract.inputs[0].check(inputs_embeds)
    batch, length, _ = inputs_embeds.shape
    if batch > 1 and length > 1 and not batched_prefill:
        raise ValueError("several tokens per call need a cache of one row; use cache.row()")
    if batch != cache.batch:
        raise ValueError(f"inputs_embeds has {batch} rows, but the cache has {cache.batch}")
    rows = np.ascontiguousarray(logit_rows, np.int64)
    row_list = rows.tolist()  # Python's min is ten times as fast as numpy's for a few numbers
    if row_list and not 0 <= min(row_list) <= max(row_list) < length:
        raise ValueError(f"the logit rows {row_list} are out of range for {length} tokens")
    positions = cache.append(length)
    try:
        yield cache, rows, positions
    except BaseException:
        cache.rewind(length)
        raise


@dataclass(frozen=True)
class CallLimits:
    """Limits of one run of a program.

    Args:
        max_tokens: largest number of tokens.
        max_rows: largest number of logit rows.
        last_row_only: whether the program returns only the logits of its last token.
        padded_capacity: for a program that accepts one token or exactly ``max_tokens``, to which
            shorter pieces are padded: its cache capacity. None if it accepts any number of tokens.
    """

    max_tokens: int
    max_rows: int = UNLIMITED
    last_row_only: bool = False
    padded_capacity: int | None = None


@dataclass(frozen=True)
class Piece:
    """Tokens ``start`` to ``stop`` of a call, padded to ``length``, and the logit ``rows`` in them.

    Rows are numbered within the call. There is at least one: the last token's if none is requested.
    """

    start: int
    stop: int
    length: int
    rows: tuple[int, ...]


def split_call(tokens: int, rows: Sequence[int], position: int, limits: CallLimits) -> list[Piece]:
    """Split a call into pieces that are within the limits.

    Args:
        tokens: number of tokens of the call.
        rows: logit rows that are requested, in any order.
        position: position of the first token in the cache; padding must fit after it.
        limits: limits of one piece.

    Returns:
        pieces in order; they cover every token once and every requested row once, in ascending
        order.
    """
    requested, pieces, start = sorted(set(rows)), [], 0
    while start < tokens:
        stop = min(start + limits.max_tokens, tokens)
        inside = [row for row in requested if start <= row < stop]
        if limits.last_row_only and inside:
            stop = inside[0] + 1
        elif len(inside) > limits.max_rows:
            stop = inside[limits.max_rows]
        length = stop - start
        if limits.padded_capacity is not None and length > 1:
            if position + start + limits.max_tokens <= limits.padded_capacity:
                length = limits.max_tokens
            else:  # the padding would not fit
                stop, length = start + 1, 1
        pieces.append(Piece(start, stop, length, tuple(row for row in inside if row < stop) or (stop - 1,)))
        start = stop
    return pieces
