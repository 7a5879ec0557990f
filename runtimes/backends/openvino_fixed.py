"""OpenVINO sessions on devices that need fixed shapes, such as an NPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from runtimes.backends.openvino_requests import Request
from runtimes.backends.static_shape import (
    DECODE,
    AssetCache,
    DecoderSizes,
    StaticShapeDecoder,
)
from runtimes.bundle.contracts import Contract, appended_state
from runtimes.cache import KVCache
from runtimes.decode_call import UNLIMITED

PREFILL = "prefill"  # the function for CHUNK tokens
CHUNK = 256  # tokens of a prefill call
CAPACITY_STEP = 1024  # tokens; a decoder is compiled for multiples of it, and padding of a chunk

# Compiles a component for sizes of its named dimensions, and returns a ``CompiledModel``.
Compile = Callable[[Mapping[str, int]], Any]


class FixedShapeComponent:
    """Session of a stateless component; it runs images one by one."""

    def __init__(self, compile_for: Compile, contract: Contract) -> None:
        """Compile the component for one image; one with other named dimensions, when it first runs.

        Raises:
            UserError: OpenVINO cannot compile it.
        """
        self.contract, self._compile_for = contract, compile_for
        self._requests: dict[tuple[tuple[str, int], ...], Request] = {}
        named = {dim for spec in contract.inputs for dim in spec.shape if isinstance(dim, str)}
        self._by_image = named == {"batch"}
        if self._by_image:
            self._request({"batch": 1})

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute the outputs by name; see ``ComponentSession.run``."""
        for spec in self.contract.inputs:
            spec.check(inputs[spec.name])
        if not self._by_image:
            return self._run(inputs)
        batch = len(inputs[self.contract.inputs[0].name])
        results = [
            self._run({name: array[index : index + 1] for name, array in inputs.items()})
            for index in range(batch)
        ]
        return {name: np.concatenate([result[name] for result in results]) for name in results[0]}

    def _run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        arrays = {spec.name: np.ascontiguousarray(inputs[spec.name]) for spec in self.contract.inputs}
        request = self._request(
            {
                dim: size
                for spec in self.contract.inputs
                for dim, size in zip(spec.shape, arrays[spec.name].shape, strict=True)
                if isinstance(dim, str)
            }
        )
        request.infer(arrays)
        return request.outputs()

    def _request(self, sizes: Mapping[str, int]) -> Request:
        key = tuple(sorted(sizes.items()))
        if key not in self._requests:
            self._requests[key] = Request(self._compile_for(sizes), self.contract)
        return self._requests[key]


class FixedShapeAsset:
    """A decoder compiled for one token and for ``CHUNK`` tokens; see ``static_shape.Asset``."""

    def __init__(self, compile_for: Compile, contract: Contract, capacity: int) -> None:
        """Compile the decoder for states of a capacity.

        The states have room for the padding of a chunk after the last token.

        Raises:
            UserError: OpenVINO cannot compile it.
        """
        self.capacity, self._contract = capacity, contract
        self._sizes = {"batch": 1, "rows": 1, "capacity": capacity + CHUNK}
        self._requests = {
            function: Request(compile_for(self._sizes | {"sequence": tokens}), contract)
            for function, tokens in ((DECODE, 1), (PREFILL, CHUNK))
        }

    def call(
        self, function: str, inputs: Mapping[str, np.ndarray], state: Any = None
    ) -> dict[str, np.ndarray]:
        """Run a function, and copy the new rows into the states."""
        request, contract = self._requests[function], self._contract
        request.infer({**inputs, **state})
        first = int(inputs["positions"][0, 0])
        for spec in contract.states:
            new = request.output(appended_state(spec))
            state[spec.name][:, :, first : first + new.shape[2]] = new
        return request.outputs()

    def new_state(self) -> dict[str, np.ndarray]:
        """Create zeroed states of one sequence."""
        return {spec.name: spec.allocate(self._sizes) for spec in self._contract.states}

    def read_state(self, state: Any, name: str) -> np.ndarray:
        """Return a copy of a state ``[1, Hkv, C, Dh]``."""
        return np.array(state[name])

    def write_state(self, state: Any, name: str, array: np.ndarray) -> None:
        """Overwrite a state with ``[1, Hkv, C, Dh]``."""
        state[name][:] = array


class FixedShapeDecoder:
    """Session of the decoder.

    It is compiled for a capacity when a cache needs it. A compiled decoder is kept while a cache
    uses it, and until another capacity is compiled.
    """

    max_logit_rows, max_batch = 1, UNLIMITED

    def __init__(self, compile_for: Compile, contract: Contract) -> None:
        """Compile nothing yet."""
        self.contract, self._compile_for = contract, compile_for
        self._assets: WeakValueDictionary[int, FixedShapeAsset] = WeakValueDictionary()  # by capacity
        self._last: FixedShapeAsset | None = None
        self.tapped: Mapping[str, np.ndarray] = {}

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """Create an empty cache; compile the decoder if no compiled capacity is enough.

        Raises:
            UserError: OpenVINO cannot compile it.
        """
        compiled = [asset for asset in self._assets.values() if asset.capacity >= capacity]
        asset = min(compiled, key=lambda each: each.capacity, default=None)
        if asset is None:
            rounded = -(-capacity // CAPACITY_STEP) * CAPACITY_STEP
            self._last = asset = FixedShapeAsset(self._compile_for, self.contract, rounded)
            self._assets[rounded] = asset
        return self._on(asset).new_cache(batch, capacity)

    def decode(self, inputs_embeds: np.ndarray, logit_rows: np.ndarray, cache: KVCache) -> np.ndarray:
        """Append tokens to the cache and compute logits; see ``DecoderSession.decode``."""
        asset = cache.asset if isinstance(cache, AssetCache) else None
        if not isinstance(asset, FixedShapeAsset) or asset not in self._assets.values():
            raise TypeError(f"the session needs a cache from its own new_cache, got a {type(cache).__name__}")
        decoder = self._on(asset)
        logits = decoder.decode(inputs_embeds, logit_rows, cache)
        self.tapped = decoder.tapped
        return logits

    def _on(self, asset: FixedShapeAsset) -> StaticShapeDecoder:
        sizes = DecoderSizes(asset.capacity + CHUNK, PREFILL, CHUNK, flexible=False, any_rows=False)
        return StaticShapeDecoder(asset, self.contract, sizes)
