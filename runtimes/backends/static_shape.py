"""Sessions on compiled assets with static shapes: fixed capacity and tokens per call.

A decode call is split into pieces that the asset's functions accept. The padding of a piece is
written after its tokens, where later tokens overwrite it before attention reads it.
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

# Functions of an asset: of a stateless component, and of a decoder for a single token.
MAIN, DECODE = "main", "decode"


class Asset(Protocol):
    """A compiled component; a decoder's states hold one sequence and stay with the asset."""

    def call(
        self, function: str, inputs: Mapping[str, np.ndarray], state: Any = None
    ) -> Mapping[str, np.ndarray]:
        """Run a function on inputs by name, batch 1; the state is updated in place."""
        ...

    def new_state(self) -> Any:
        """Create zeroed states of one sequence."""
        ...

    def read_state(self, state: Any, name: str) -> np.ndarray:
        """Return a copy of a state ``[1, Hkv, C, Dh]``."""
        ...

    def write_state(self, state: Any, name: str, array: np.ndarray) -> None:
        """Overwrite a state with ``[1, Hkv, C, Dh]``."""
        ...


class AssetCache(KVCache):
    """A KV cache whose states stay with the asset, in the capacity that it was compiled for."""

    writes_parts = False

    def __init__(
        self, specs: tuple[TensorSpec, ...], batch: int, capacity: int, asset: Asset, states: list[Any]
    ) -> None:
        """Wrap the states of an asset.

        Args:
            specs: states of the decoder's contract.
            batch: number of rows.
            capacity: tokens per row, at most the compiled capacity.
            asset: the asset that holds the states.
            states: handles of the states, one per row.
        """
        super().__init__(specs, batch, capacity)
        self.states, self.asset = states, asset

    @property
    def arrays(self) -> list[np.ndarray]:
        """Copies of the states, limited to ``capacity`` tokens."""
        return [
            np.concatenate([self.asset.read_state(state, spec.name) for state in self.states])[
                :, :, : self.capacity
            ]
            for spec in self.specs
        ]

    @property
    def addresses(self) -> list[int]:
        """Identities of the handles; the runtime does not expose where the states are."""
        return [id(state) for state in self.states]

    def _view(self, start: int, stop: int) -> AssetCache:
        states = self.states[start:stop]
        return AssetCache(self.specs, len(states), self.capacity, self.asset, states)

    def _write(self, states: Sequence[np.ndarray]) -> None:
        for spec, part in zip(self.specs, states, strict=True):
            for row, state in enumerate(self.states):
                array = self.asset.read_state(state, spec.name).copy()
                array[0, :, : part.shape[2]] = part[row]
                self.asset.write_state(state, spec.name, array)


@dataclass(frozen=True)
class DecoderSizes:
    """Sizes that a decoder's functions accept.

    Args:
        capacity: compiled capacity of the states.
        multi_token_function: name of the function for more than one token.
        chunk: largest number of tokens of a call.
        flexible: whether that function accepts any number of tokens up to ``chunk``; otherwise
            exactly ``chunk``.
        any_rows: whether it returns any number of logit rows; otherwise only the last token's.
    """

    capacity: int
    multi_token_function: str
    chunk: int
    flexible: bool
    any_rows: bool

    @property
    def limits(self) -> CallLimits:
        """Limits of one call."""
        padded_capacity = None if self.flexible else self.capacity
        return CallLimits(self.chunk, last_row_only=not self.any_rows, padded_capacity=padded_capacity)


class StaticShapeComponent:
    """Session of a stateless component; it runs images one by one, since assets have batch 1."""

    def __init__(self, asset: Asset, contract: Contract) -> None:
        """Run ``asset`` under its contract."""
        self.contract, self.asset = contract, asset

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute the outputs by name; see ``ComponentSession.run``."""
        for spec in self.contract.inputs:
            spec.check(inputs[spec.name])
        batch = len(inputs[self.contract.inputs[0].name])
        results = [
            self.asset.call(MAIN, {name: array[index : index + 1] for name, array in inputs.items()})
            for index in range(batch)
        ]
        return {
            spec.name: np.concatenate([result[spec.name] for result in results]).astype(spec.dtype)
            for spec in self.contract.outputs
        }


class StaticShapeDecoder:
    """Session of a decoder; it runs the rows of a batch one by one, since assets have batch 1."""

    max_batch = UNLIMITED

    def __init__(self, asset: Asset, contract: Contract, sizes: DecoderSizes) -> None:
        """Run ``asset``, whose functions accept ``sizes``, under its contract."""
        self.contract, self.asset, self.sizes = contract, asset, sizes
        self.max_logit_rows = sizes.chunk if sizes.any_rows else 1
        self.tapped: Mapping[str, np.ndarray] = {}

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """Create an empty cache.

        Raises:
            UserError: the capacity exceeds the compiled one.
        """
        if capacity > self.sizes.capacity:
            raise UserError(
                f"The decoder was compiled for {self.sizes.capacity} tokens, but a KV cache of {capacity}"
                f" was requested; export it again with --capacity {capacity}."
            )
        states = [self.asset.new_state() for _ in range(batch)]
        return AssetCache(self.contract.states, batch, capacity, self.asset, states)

    def decode(self, inputs_embeds: np.ndarray, logit_rows: np.ndarray, cache: KVCache) -> np.ndarray:
        """Append tokens to the cache and compute logits; see ``DecoderSession.decode``."""
        call = validated_call(self.contract, AssetCache, inputs_embeds, logit_rows, cache)
        with call as (own, rows, positions):
            results = [
                self._decode_row(embeds, int(places[0]), rows.tolist(), state)
                for embeds, places, state in zip(inputs_embeds, positions, own.states, strict=True)
            ]
        outputs = {name: np.stack([result[name] for result in results]) for name in results[0]}
        logits = outputs.pop("logits")
        self.tapped = outputs
        return logits

    def _decode_row(
        self, embeds: np.ndarray, start: int, rows: list[int], state: Any
    ) -> dict[str, np.ndarray]:
        """Decode one sequence; return its outputs ``[S or K, ...]`` by name."""
        by_token: dict[str, list[np.ndarray]] = {}
        by_row: dict[str, dict[int, np.ndarray]] = {}
        for piece in split_call(len(embeds), rows, start, self.sizes.limits):
            results = self._call_piece(piece, embeds, start, state)
            for spec in self.contract.outputs:
                value = results[spec.name][0].astype(spec.dtype, copy=False)
                if spec.shape[1] == "sequence":
                    by_token.setdefault(spec.name, []).append(value[: piece.stop - piece.start])
                else:
                    by_row.setdefault(spec.name, {}).update(zip(piece.rows, value, strict=True))
        outputs = {name: np.concatenate(parts) for name, parts in by_token.items()}
        return outputs | {name: np.stack([values[row] for row in rows]) for name, values in by_row.items()}

    def _call_piece(
        self, piece: Piece, embeds: np.ndarray, start: int, state: Any
    ) -> Mapping[str, np.ndarray]:
        padded = np.zeros((1, piece.length, embeds.shape[1]), embeds.dtype)
        padded[0, : piece.stop - piece.start] = embeds[piece.start : piece.stop]
        first = start + piece.start
        inputs = (
            padded,
            np.arange(first, first + piece.length, dtype=np.int64)[None],
            np.array(piece.rows, np.int64) - piece.start,
        )
        named = {spec.name: array for spec, array in zip(self.contract.inputs, inputs, strict=True)}
        function = DECODE if piece.length == 1 else self.sizes.multi_token_function
        return self.asset.call(function, named, state)
