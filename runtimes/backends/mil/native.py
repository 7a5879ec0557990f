"""Packages in Core ML itself; used on macOS only."""

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
    """A package in Core ML; each function is loaded at its first call.

    Args:
        package: the package to run.
        contract: contract of its component.
        device: a key of ``UNITS``.
    """

    def __init__(self, package: Package, contract: Contract, device: str) -> None:
        """Store the arguments; nothing is loaded yet."""
        self._package, self._contract, self._device = package, contract, device
        self._models: dict[str, Any] = {}

    def _model(self, function: str) -> Any:
        if function not in self._models:
            import coremltools

            multifunction = len(self._package.function_names) > 1
            self._models[function] = coremltools.models.MLModel(
                str(self._package.folder),
                compute_units=coremltools.ComputeUnit[UNITS[self._device]],
                function_name=function if multifunction else None,
            )
        return self._models[function]

    def call(
        self, function: str, inputs: Mapping[str, np.ndarray], state: Any = None
    ) -> dict[str, np.ndarray]:
        """Return the outputs of a function; images are ``uint8 [N, N, 3]``."""
        arguments = {
            name: Image.fromarray(array) if array.dtype == np.uint8 else _to_core_ml_dtype(array)
            for name, array in inputs.items()
        }
        outputs = self._model(function).predict(arguments, **({"state": state} if state else {}))
        return {spec.name: outputs[identifier(spec.name)] for spec in self._contract.outputs}

    def new_state(self) -> Any:
        """Return the zeroed states of one sequence, which all functions of the package can use."""
        return self._model(DECODE).make_state()

    def read_state(self, state: Any, name: str) -> np.ndarray:
        """Return a state ``[1, Hkv, C, Dh]``."""
        return np.asarray(state.read_state(name))

    def write_state(self, state: Any, name: str, array: np.ndarray) -> None:
        """Replace a state ``[1, Hkv, C, Dh]``."""
        state.write_state(name, array)


def _to_core_ml_dtype(array: np.ndarray) -> np.ndarray:
    return array.astype(np.int32) if array.dtype == np.int64 else array
