"""Core ML itself: on a Mac the session contract and the ladder go through here, elsewhere nothing does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from runtimes.backends.mil.package import Package, identifier
from runtimes.backends.static_shape import DECODE
from runtimes.bundle.contracts import Contract

UNITS = {"ane": "CPU_AND_NE", "gpu": "CPU_AND_GPU", "cpu": "CPU_ONLY"}


class NativeAsset:
    """A package in Core ML; functions are loaded when they are called first."""

    def __init__(self, package: Package, contract: Contract, device: str) -> None:
        self._package, self._contract, self._device = package, contract, device
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

    def call(
        self, function: str, inputs: Mapping[str, np.ndarray], state: Any = None
    ) -> dict[str, np.ndarray]:
        given = {
            name: Image.fromarray(array) if array.dtype == np.uint8 else _as_core_ml(array)
            for name, array in inputs.items()
        }
        found = self._model(function).predict(given, **({"state": state} if state else {}))
        return {spec.name: found[identifier(spec.name)] for spec in self._contract.outputs}

    def new_state(self) -> Any:
        return self._model(DECODE).make_state()  # serves the other functions of the package too

    def read_state(self, state: Any, name: str) -> np.ndarray:
        return np.asarray(state.read_state(name))

    def write_state(self, state: Any, name: str, array: np.ndarray) -> None:
        state.write_state(name, array)


def _as_core_ml(array: np.ndarray) -> np.ndarray:
    return array.astype(np.int32) if array.dtype == np.int64 else array
