"""Runs of OpenVINO's compiled models, and its error messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from runtimes.bundle.contracts import Contract, TensorSpec
from runtimes.errors import UserError


def reason(error: Exception) -> str:
    """Return the last line of OpenVINO's message; the lines before it name its source files."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].rstrip(".!") if lines else type(error).__name__


class Request:
    """Runs a compiled model; its outputs stay in memory that the next run overwrites."""

    def __init__(self, compiled: Any, contract: Contract) -> None:
        """Run a ``CompiledModel`` of the component of a contract.

        Raises:
            UserError: the device has too little memory, or fails.
        """
        self._contract = contract
        try:
            self._request = compiled.create_infer_request()
        except RuntimeError as error:
            raise UserError(f"OpenVINO cannot run the {contract.component}: {reason(error)}.") from error

    def infer(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Run the model on contiguous arrays, which are read where they are.

        Raises:
            UserError: OpenVINO fails.
        """
        try:
            self._request.infer(dict(tensors), share_inputs=True, share_outputs=True)
        except RuntimeError as error:
            raise UserError(f"OpenVINO failed in the {self._contract.component}: {reason(error)}.") from error

    def outputs(self) -> dict[str, np.ndarray]:
        """Return copies of the contract's outputs of the last run."""
        return {spec.name: self.output(spec).copy() for spec in self._contract.outputs}

    def output(self, spec: TensorSpec) -> np.ndarray:
        """Return an output of the last run, without a copy."""
        return np.asarray(self._request.get_tensor(spec.name).data)
