"""Backend ``coreml``: packages in Core ML on a Mac; elsewhere an interpreter executes the saved files.

Devices say which functions of a decoder are called: ``ane`` those of fixed lengths, which the Neural Engine
asks for, ``gpu`` and ``cpu`` the flexible one. The interpreter takes them all, so each can be proven.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from runtimes.cache import KVCache
from runtimes.contracts import Contract, TensorSpec
from runtimes.errors import UserError
from runtimes.fixed import FixedDecoder, Sizes
from runtimes.mil.package import DECODE, EXTEND, IMAGE, MAIN, PREFILL, identifier, package_folder
from runtimes.session import ComponentSession, DecoderSession, Execution, SessionOptions

if TYPE_CHECKING:
    from runtimes.bundle import Artifact

DEVICES = ("gpu", "ane", "cpu")
FLEXIBLE = ("gpu", "cpu")


class Asset(Protocol):
    """A package that can be called: by Core ML or by the interpreter."""

    def capacity(self) -> int:
        """Tokens of the KV cache, of a decoder."""
        ...

    def length(self, function: str) -> int:
        """Tokens that a decoder's function takes."""
        ...

    def new_cache(self, specs: tuple[TensorSpec, ...], batch: int, capacity: int) -> KVCache: ...

    def call(
        self, function: str, inputs: Mapping[str, np.ndarray], cache: Any = None
    ) -> dict[str, np.ndarray]:
        """Outputs of a function; the states of the cache, which is one row, are updated."""
        ...


def devices() -> list[str]:
    if find_spec("coremltools") is None:
        raise UserError("The backend coreml is not installed; run: pip install 'dsvl-export[coreml]'.")
    return list(DEVICES)


def execution(artifact: Artifact, device: str | None = None) -> Execution:
    try:
        known = devices()
    except UserError as error:
        return Execution("not run", str(error).rstrip("."))
    device = device or known[0]
    if device not in known:
        return Execution("not run", f"coreml runs on {', '.join(known)}, not on {device}")
    if sys.platform == "darwin":
        return Execution("ran", f"Core ML ({device})", device=device)
    return Execution("simulated", "the MIL interpreter on the saved package", device=device)


def open_component(file: Path, contract: Contract, options: SessionOptions) -> ComponentSession:
    return CoreMLComponent(_load(file, options), contract)


def open_decoder(file: Path, contract: Contract, options: SessionOptions) -> DecoderSession:
    asset = _load(file, options)
    sizes = Sizes(asset.capacity(), asset.length(PREFILL), (options.device or DEVICES[0]) in FLEXIBLE)
    return FixedDecoder(CoreMLDecoder(asset, sizes, contract), contract)


def _load(file: Path, options: SessionOptions) -> Asset:
    if sys.platform == "darwin":
        from runtimes.mil.native import NativePackage

        return NativePackage(package_folder(file), options.device or DEVICES[0])
    from runtimes.mil.interpreter import InterpretedPackage

    return InterpretedPackage(package_folder(file))


class CoreMLComponent:
    """A stateless component."""

    def __init__(self, asset: Asset, contract: Contract) -> None:
        self.contract, self._asset = contract, asset

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One image after the other: packages hold one."""
        for spec in self.contract.inputs:
            spec.check(inputs[spec.name])
        batch = len(inputs[self.contract.inputs[0].name])
        each = [
            self._asset.call(MAIN, {name: array[index : index + 1] for name, array in inputs.items()})
            for index in range(batch)
        ]
        return {
            spec.name: np.concatenate([found[identifier(spec.name)] for found in each]).astype(spec.dtype)
            for spec in self.contract.outputs
        }

    def run_image(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """The same from a square image ``uint8 [N, N, 3]``, as an app passes one."""
        found = self._asset.call(IMAGE, {IMAGE: image})
        return {spec.name: found[identifier(spec.name)].astype(spec.dtype) for spec in self.contract.outputs}


class CoreMLDecoder:
    """A decoder package, for ``FixedDecoder``."""

    def __init__(self, asset: Asset, sizes: Sizes, contract: Contract) -> None:
        self._asset, self.sizes, self._contract = asset, sizes, contract

    def new_cache(self, specs: tuple[TensorSpec, ...], batch: int, capacity: int) -> KVCache:
        return self._asset.new_cache(specs, batch, capacity)

    def run(self, inputs: Mapping[str, np.ndarray], cache: Any) -> Mapping[str, np.ndarray]:
        _, length, _ = next(iter(inputs.values())).shape
        several = EXTEND if self.sizes.flexible else PREFILL
        found = self._asset.call(DECODE if length == 1 else several, inputs, cache)
        return {spec.name: found[identifier(spec.name)] for spec in self._contract.outputs}
