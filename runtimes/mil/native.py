"""Core ML itself, on a Mac. Nothing here runs elsewhere; the tests marked ``mac`` hold it to the contract."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from runtimes.cache import KVCache
from runtimes.contracts import TensorSpec
from runtimes.errors import UserError
from runtimes.mil.package import EXTEND, Package

UNITS = {"ane": "CPU_AND_NE", "gpu": "CPU_AND_GPU", "cpu": "CPU_ONLY"}


class NativeCache(KVCache):
    """A cache whose rows are Core ML's states; ``arrays`` are copies.

    Args:
        states: an ``MLState`` for each row, of which this cache has ``batch`` from ``first`` on.
    """

    def __init__(
        self, specs: tuple[TensorSpec, ...], batch: int, capacity: int, states: list[Any], first: int = 0
    ) -> None:
        self.specs, self.batch, self.capacity = specs, batch, capacity
        self.lengths = np.zeros(batch, dtype=np.int64)
        self.states = states[first : first + batch]

    @property
    def arrays(self) -> list[np.ndarray]:  # type: ignore[override]
        return [
            np.concatenate([state.read_state(spec.name) for state in self.states])[:, :, : self.capacity]
            for spec in self.specs
        ]

    @property
    def addresses(self) -> list[int]:
        raise NotImplementedError("Core ML does not say where its states lie")

    def fork(self) -> KVCache:
        raise UserError("Core ML's states cannot be forked; save the cache and load it into another one.")

    def row(self, index: int) -> NativeCache:
        view = NativeCache(self.specs, 1, self.capacity, self.states, index)
        view.lengths = self.lengths[index : index + 1]
        return view

    def _write(self, states: list[np.ndarray]) -> None:
        for spec, part in zip(self.specs, states, strict=True):
            for row, state in enumerate(self.states):
                whole = state.read_state(spec.name)
                whole[0, :, : part.shape[2]] = part[row]
                state.write_state(spec.name, whole)


class NativePackage:
    """A package in Core ML; functions are loaded when they are called first."""

    def __init__(self, folder: Path, device: str) -> None:
        self._package, self._device = Package(folder), device
        self._models: dict[str, Any] = {}

    def _model(self, function: str) -> Any:
        if function not in self._models:
            import coremltools

            several = len(self._package.function_names) > 1
            self._models[function] = coremltools.models.MLModel(
                str(self._package.folder),
                compute_units=coremltools.ComputeUnit[UNITS[self._device]],
                function_name=function if several else None,
            )
        return self._models[function]

    def capacity(self) -> int:
        state = self._package.description(EXTEND).state[0].type.stateType.arrayType
        return int(state.shape[2])

    def length(self, function: str) -> int:
        return int(self._package.description(function).input[0].type.multiArrayType.shape[1])

    def new_cache(self, specs: tuple[TensorSpec, ...], batch: int, capacity: int) -> KVCache:
        # One function's state serves the others of the package.
        return NativeCache(specs, batch, capacity, [self._model(EXTEND).make_state() for _ in range(batch)])

    def call(
        self, function: str, inputs: Mapping[str, np.ndarray], cache: NativeCache | None = None
    ) -> dict[str, np.ndarray]:
        given = {
            name: Image.fromarray(array) if array.dtype == np.uint8 else _as_core_ml(array)
            for name, array in inputs.items()
        }
        state = {"state": cache.states[0]} if cache else {}
        found: dict[str, np.ndarray] = self._model(function).predict(given, **state)
        return found


def _as_core_ml(array: np.ndarray) -> np.ndarray:
    return array.astype(np.int32) if array.dtype == np.int64 else array
