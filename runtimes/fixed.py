"""Decoders whose programs have sizes fixed when they were compiled: the capacity, the tokens of a call.

A call is cut into pieces that the program's functions take; what a piece is padded with is written behind
its tokens, where later tokens overwrite it before anything sees it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from runtimes.cache import KVCache
from runtimes.contracts import Contract, TensorSpec
from runtimes.errors import UserError


class FixedCache(KVCache):
    """A cache whose states have the capacity that a program was compiled for; fewer tokens may be used.

    Args:
        compiled: that capacity.
        states: memory to use, ``[batch, Hkv, compiled, Dh]``; None allocates zeros.
    """

    def __init__(
        self,
        specs: tuple[TensorSpec, ...],
        batch: int,
        capacity: int,
        compiled: int,
        states: list[np.ndarray] | None = None,
    ) -> None:
        sizes = {"batch": batch, "capacity": compiled}
        self.states = states if states is not None else [spec.allocate(sizes) for spec in specs]
        self.compiled = compiled
        super().__init__(specs, batch, capacity, [state[:, :, :capacity] for state in self.states])

    def fork(self) -> FixedCache:
        states = [state.copy() for state in self.states]
        copy = FixedCache(self.specs, self.batch, self.capacity, self.compiled, states)
        copy.lengths[:] = self.lengths
        return copy

    def row(self, index: int) -> FixedCache:
        states = [state[index : index + 1] for state in self.states]
        view = FixedCache(self.specs, 1, self.capacity, self.compiled, states)
        view.lengths = self.lengths[index : index + 1]
        return view

    def named_states(self) -> dict[str, np.ndarray]:
        return {spec.name: state for spec, state in zip(self.specs, self.states, strict=True)}


@dataclass(frozen=True)
class Sizes:
    """What a program's functions take.

    Args:
        capacity: of the states.
        chunk: the most tokens of one call.
        flexible: calls of several tokens take as many as there are, and any number of logit rows;
            otherwise always ``chunk`` tokens, and one row.
    """

    capacity: int
    chunk: int
    flexible: bool


@dataclass(frozen=True)
class Piece:
    """Tokens ``begin`` to ``end`` of a call, padded to ``length``, and those whose logits are taken."""

    begin: int
    end: int
    length: int
    rows: tuple[int, ...]


def pieces(tokens: int, rows: Sequence[int], start: int, sizes: Sizes) -> list[Piece]:
    """A call cut for the functions of a program.

    Args:
        tokens: of the call; rows: those whose logits are wanted.
        start: position of the first token.
    """
    wanted = sorted(set(rows))
    if sizes.flexible:
        found = []
        for begin in range(0, tokens, sizes.chunk):
            end = min(begin + sizes.chunk, tokens)
            here = tuple(row for row in wanted if begin <= row < end)
            found.append(Piece(begin, end, end - begin, here or (end - 1,)))
        return found
    found, begin = [], 0
    ends = {row + 1 for row in wanted} | {tokens}  # one row of logits a call: its last token's
    for stop in sorted(ends):
        while begin < stop:
            end = min(begin + sizes.chunk, stop)
            if end - begin > 1 and start + begin + sizes.chunk > sizes.capacity:
                end = begin + 1  # the padding would not fit
            length = 1 if end - begin == 1 else sizes.chunk
            found.append(Piece(begin, end, length, (end - 1,)))
            begin = end
    return found


class Program(Protocol):
    """A compiled decoder: it computes one row of a batch."""

    sizes: Sizes

    def new_cache(self, specs: tuple[TensorSpec, ...], batch: int, capacity: int) -> KVCache: ...

    def run(self, inputs: Mapping[str, np.ndarray], cache: Any) -> Mapping[str, np.ndarray]:
        """Outputs by name; the states of the cache, one row of what ``new_cache`` made, are updated.

        ``inputs`` are the contract's, their sizes those of a piece.
        """
        ...


class FixedDecoder:
    """A decoder session on such a program."""

    def __init__(self, program: Program, contract: Contract) -> None:
        self.contract, self._program = contract, program
        self.tapped: Mapping[str, np.ndarray] = {}

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        most = self._program.sizes.capacity
        if capacity > most:
            raise UserError(
                f"The decoder was compiled for {most} tokens, a KV cache of {capacity} was asked for;"
                f" export it again with --capacity {capacity}."
            )
        return self._program.new_cache(self.contract.states, batch, capacity)

    def decode(self, inputs_embeds: np.ndarray, logit_rows: np.ndarray, cache: KVCache) -> np.ndarray:
        batch, length, _ = inputs_embeds.shape
        if batch > 1 and length > 1:
            raise ValueError("several tokens at once are for one row only; use row()")
        if batch != cache.batch:
            raise ValueError(f"{batch} rows were given for a cache of {cache.batch}")
        self.contract.inputs[0].check(inputs_embeds)
        rows = [int(row) for row in logit_rows]
        if not all(0 <= row < length for row in rows):
            raise ValueError(f"logit rows {rows} of {length} tokens")
        positions = cache.append(length)
        try:
            each = [
                self._row(inputs_embeds[index], positions[index], rows, cache.row(index))
                for index in range(batch)
            ]
        except BaseException:
            cache.rewind(length)  # what was claimed counts as not written
            raise
        outputs = {name: np.stack([row[name] for row in each]) for name in each[0]}
        logits = outputs.pop("logits")
        self.tapped = outputs
        return logits

    def _row(
        self, embeds: np.ndarray, positions: np.ndarray, rows: list[int], cache: KVCache
    ) -> dict[str, np.ndarray]:
        """One sequence: outputs ``[S or K, ...]`` by name."""
        by_token: dict[str, list[np.ndarray]] = {}
        by_row: dict[str, dict[int, np.ndarray]] = {}
        for piece in pieces(len(embeds), rows, int(positions[0]), self._program.sizes):
            count = piece.end - piece.begin
            padded = np.zeros((1, piece.length, embeds.shape[1]), embeds.dtype)
            padded[0, :count] = embeds[piece.begin : piece.end]
            first = int(positions[piece.begin])
            wanted = np.array(piece.rows, np.int64) - piece.begin
            inputs = (padded, np.arange(first, first + piece.length)[None], wanted)
            named = {spec.name: array for spec, array in zip(self.contract.inputs, inputs, strict=True)}
            found = self._program.run(named, cache)
            for spec in self.contract.outputs:
                value = found[spec.name][0].astype(spec.dtype, copy=False)
                if spec.shape[1] == "sequence":
                    by_token.setdefault(spec.name, []).append(value[:count])
                else:
                    by_row.setdefault(spec.name, {}).update(zip(piece.rows, value, strict=True))
        outputs = {name: np.concatenate(parts) for name, parts in by_token.items()}
        return outputs | {name: np.stack([found[row] for row in rows]) for name, found in by_row.items()}
