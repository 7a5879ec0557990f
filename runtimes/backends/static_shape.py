"""Sessions on compiled assets whose sizes were fixed: the capacity, the tokens of a call.

A decoder's call is cut into pieces that the asset's functions take. What a piece is padded with is written
behind its tokens, where later tokens overwrite it before anything sees it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from runtimes.bundle.contracts import Contract, TensorSpec
from runtimes.cache import KVCache
from runtimes.decode_call import UNLIMITED, CallLimits, Piece, split_call, validated_call
from runtimes.errors import UserError

# Functions of an asset: of a component without states, and of a decoder (one token, multi_token_function).
MAIN, DECODE = "main", "decode"


class Asset(Protocol):
    """A compiled component that can be called; states of a decoder hold one sequence and stay here."""

    def call(
        self, function: str, inputs: Mapping[str, np.ndarray], state: Any = None
    ) -> Mapping[str, np.ndarray]:
        """Outputs by name, batch 1; the state is updated in place."""
        ...

    def new_state(self) -> Any:
        """Zeroed states of one sequence."""
        ...

    def read_state(self, state: Any, name: str) -> np.ndarray:
        """``[1, Hkv, C, Dh]``"""
        ...

    def write_state(self, state: Any, name: str, array: np.ndarray) -> None: ...


class AssetCache(KVCache):
    """A cache whose states stay with the asset, in the capacity that it was compiled for.

    ``arrays`` are copies, of the ``capacity`` tokens that may be used.

    Args:
        states: one for each row.
    """

    def __init__(
        self, specs: tuple[TensorSpec, ...], batch: int, capacity: int, asset: Asset, states: list[Any]
    ) -> None:
        super().__init__(specs, batch, capacity)
        self.states, self._asset = states, asset

    @property
    def arrays(self) -> list[np.ndarray]:
        return [
            np.concatenate([self._asset.read_state(state, spec.name) for state in self.states])[
                :, :, : self.capacity
            ]
            for spec in self.specs
        ]

    @property
    def addresses(self) -> list[int]:
        """What names the states; they lie where their runtime keeps them."""
        return [id(state) for state in self.states]

    def _view(self, start: int, stop: int) -> AssetCache:
        states = self.states[start:stop]
        return AssetCache(self.specs, len(states), self.capacity, self._asset, states)

    def _write(self, states: Sequence[np.ndarray]) -> None:
        for spec, part in zip(self.specs, states, strict=True):
            for row, state in enumerate(self.states):
                whole = self._asset.read_state(state, spec.name).copy()
                whole[0, :, : part.shape[2]] = part[row]
                self._asset.write_state(state, spec.name, whole)


@dataclass(frozen=True)
class DecoderSizes:
    """What a decoder's functions take.

    Args:
        capacity: of the states.
        multi_token_function: the function for multi_token_function tokens.
        chunk: the most tokens of one call.
        flexible: that function takes as many tokens as there are; otherwise always ``chunk``.
        any_rows: it gives any number of logit rows; otherwise the last token's.
    """

    capacity: int
    multi_token_function: str
    chunk: int
    flexible: bool
    any_rows: bool

    @property
    def limits(self) -> CallLimits:
        """What one call takes."""
        padded_capacity = None if self.flexible else self.capacity
        return CallLimits(self.chunk, last_row_only=not self.any_rows, padded_capacity=padded_capacity)


class StaticShapeComponent:
    """A stateless component; one image after the other, since assets take one."""

    def __init__(self, asset: Asset, contract: Contract) -> None:
        self.contract, self.asset = contract, asset

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        for spec in self.contract.inputs:
            spec.check(inputs[spec.name])
        batch = len(inputs[self.contract.inputs[0].name])
        each = [
            self.asset.call(MAIN, {name: array[index : index + 1] for name, array in inputs.items()})
            for index in range(batch)
        ]
        return {
            spec.name: np.concatenate([found[spec.name] for found in each]).astype(spec.dtype)
            for spec in self.contract.outputs
        }


class StaticShapeDecoder:
    """A decoder on an asset, which takes the sequences of a batch one after the other."""

    max_batch = UNLIMITED

    def __init__(self, asset: Asset, contract: Contract, sizes: DecoderSizes) -> None:
        self.contract, self.asset, self.sizes = contract, asset, sizes
        self.max_logit_rows = sizes.chunk if sizes.any_rows else 1
        self.tapped: Mapping[str, np.ndarray] = {}

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        if capacity > self.sizes.capacity:
            raise UserError(
                f"The decoder was compiled for {self.sizes.capacity} tokens, a KV cache of {capacity} was"
                f" asked for; export it again with --capacity {capacity}."
            )
        states = [self.asset.new_state() for _ in range(batch)]
        return AssetCache(self.contract.states, batch, capacity, self.asset, states)

    def decode(self, inputs_embeds: np.ndarray, logit_rows: np.ndarray, cache: KVCache) -> np.ndarray:
        call = validated_call(self.contract, AssetCache, inputs_embeds, logit_rows, cache)
        with call as (own, rows, positions):
            each = [
                self._row(embeds, int(places[0]), rows.tolist(), state)
                for embeds, places, state in zip(inputs_embeds, positions, own.states, strict=True)
            ]
        outputs = {name: np.stack([row[name] for row in each]) for name in each[0]}
        logits = outputs.pop("logits")
        self.tapped = outputs
        return logits

    def _row(self, embeds: np.ndarray, start: int, rows: list[int], state: Any) -> dict[str, np.ndarray]:
        """One sequence: outputs ``[S or K, ...]`` by name."""
        by_token: dict[str, list[np.ndarray]] = {}
        by_row: dict[str, dict[int, np.ndarray]] = {}
        for piece in split_call(len(embeds), rows, start, self.sizes.limits):
            found = self._piece(piece, embeds, start, state)
            for spec in self.contract.outputs:
                value = found[spec.name][0].astype(spec.dtype, copy=False)
                if spec.shape[1] == "sequence":
                    by_token.setdefault(spec.name, []).append(value[: piece.stop - piece.start])
                else:
                    by_row.setdefault(spec.name, {}).update(zip(piece.rows, value, strict=True))
        outputs = {name: np.concatenate(parts) for name, parts in by_token.items()}
        return outputs | {name: np.stack([found[row] for row in rows]) for name, found in by_row.items()}

    def _piece(self, piece: Piece, embeds: np.ndarray, start: int, state: Any) -> Mapping[str, np.ndarray]:
        padded = np.zeros((1, piece.length, embeds.shape[1]), embeds.dtype)
        padded[0, : piece.stop - piece.start] = embeds[piece.start : piece.stop]
        first = start + piece.start
        inputs = (
            padded,
            np.arange(first, first + piece.length, dtype=np.int64)[None],
            np.array(piece.rows, np.int64) - piece.start,
        )
        named = {spec.name: array for spec, array in zip(self.contract.inputs, inputs, strict=True)}
        return self.asset.call(DECODE if piece.length == 1 else self.sizes.multi_token_function, named, state)
