"""Check that a written package keeps its contract and can be executed by the interpreter."""

from __future__ import annotations

from pathlib import Path

from runtimes.backends.mil.interpreter import Function
from runtimes.backends.mil.package import IMAGE, Package, check_manifest
from runtimes.bundle.contracts import Contract

ARRAY_NAMES = {"float16": "FLOAT16", "float32": "FLOAT32", "int64": "INT32"}


def check_package(folder: Path, contract: Contract) -> None:
    """Check a package against its contract.

    Raises:
        ValueError: the package breaks the contract.
        UserError: the package is damaged.
    """
    check_manifest(folder)
    package = Package(folder)
    for name in package.function_names:
        function = Function(package, name, {})
        inputs = {spec.name: spec for spec in contract.inputs}
        if name == IMAGE:
            inputs = {IMAGE: contract.inputs[0]}
        for declared, specs, kind in (
            (function.inputs, inputs, "inputs"),
            (function.states, {spec.name: spec for spec in contract.states}, "states"),
            (function.outputs, {spec.name: spec for spec in contract.outputs}, "outputs"),
        ):
            dtypes = {key: item.dtype for key, item in declared.items()}
            expected = {key: ARRAY_NAMES[spec.dtype] for key, spec in specs.items()}
            if dtypes != expected:
                raise ValueError(
                    f"{name} of {folder.name} has the {kind} {dtypes}, the contract says {expected}"
                )
