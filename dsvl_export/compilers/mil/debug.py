"""Debug builds of packages: the same program with its taps as further outputs. Needs no torch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from runtimes.backends.mil.package import IMAGE, SPECIFICATION, TAPS, Package, identifier, package_folder
from runtimes.bundle.contracts import Contract, TensorSpec
from runtimes.bundle.files import parse_json
from runtimes.errors import UserError

ARRAY_TYPES = {"float16": 65552, "float32": 65568}  # ArrayFeatureType.ArrayDataType


def debug_build(artifact: Path, contract: Contract, folder: Path) -> Path:
    """Write the package with the contract's taps as further outputs of its functions."""
    source = package_folder(artifact)
    package = Package(source)
    for name in package.function_names:
        if name != IMAGE:
            _add_outputs(package, name, contract)
    debug = folder / source.name
    for file in source.rglob("*"):
        target = debug / file.relative_to(source)
        if file.is_file() and file != artifact:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                target.hardlink_to(file.resolve())
            except OSError:  # another file system
                shutil.copyfile(file, target)
    (debug / SPECIFICATION).write_bytes(package.model.SerializeToString())
    return debug / SPECIFICATION


def tap_variables(package: Package, function: str, contract: Contract) -> dict[str, str]:
    """Map the contract's taps to the variables of a function.

    Raises:
        UserError: the package does not list its taps.
    """
    try:
        taps = parse_json(package.metadata[TAPS], "the list of taps")[function]
        return {spec.name: str(taps[spec.name]) for spec in contract.taps}
    except (KeyError, TypeError) as error:
        raise UserError(f"{package.folder} does not list its taps; export it again.") from error


def _add_outputs(package: Package, name: str, contract: Contract) -> None:
    taps = tap_variables(package, name, contract)
    proto = package.function(name)
    block = proto.block_specializations[proto.opset]
    types = {item.name: item.type for operation in block.operations for item in operation.outputs}
    for spec in contract.taps:
        variable = taps[spec.name]
        operation = block.operations.add(type="identity")
        operation.inputs["x"].arguments.add(name=variable)
        operation.outputs.add(name=identifier(spec.name), type=types[variable])
        block.outputs.append(identifier(spec.name))
        _describe(package.description(name), spec)


def _describe(description: Any, spec: TensorSpec) -> None:
    feature = description.output.add(name=identifier(spec.name), shortDescription=spec.meaning)
    feature.type.multiArrayType.dataType = ARRAY_TYPES[spec.dtype]
