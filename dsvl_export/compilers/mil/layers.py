"""Run the layers of a package one by one in the MIL interpreter, on recorded taps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dsvl_export.compilers.mil.debug import tap_variables
from runtimes.backends.mil.interpreter import Function
from runtimes.backends.mil.package import EXTEND, Package, package_folder
from runtimes.backends.mil.threads import blas_threads
from runtimes.backends.static_shape import MAIN
from runtimes.bundle.contracts import Contract
from runtimes.session import SessionOptions


def run_layers(
    artifact: Path,
    contract: Contract,
    inputs: Mapping[str, np.ndarray],
    taps: Mapping[str, np.ndarray],
    folder: Path,
    options: SessionOptions,
) -> dict[str, np.ndarray]:
    """See ``RunsLayers.run_layers``."""
    package = Package(package_folder(artifact))
    function = Function(package, EXTEND if contract.states else MAIN, {})
    variables = tap_variables(package, function.name, contract)
    states = {
        name: np.zeros([int(size or 0) for size in declared.shape], np.float16)
        for name, declared in function.states.items()
    }
    handed = {variables[name]: array for name, array in taps.items()}
    given = {name: inputs[name] for name in function.inputs}
    with blas_threads(options.threads):
        found = function.run_with_replacements(given, states, handed)
    return {name: found[variable] for name, variable in variables.items()}
