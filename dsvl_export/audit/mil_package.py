"""Differences of two Core ML packages of one component: functions, operations and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dsvl_export.audit.result import Difference
from runtimes.backends.mil.package import Package


def package_differences(actual: Path, expected: Path) -> list[Difference]:
    """Return the differences of a package; one weight at a time is in memory.

    Raises:
        UserError: the first package cannot be read.
    """
    stored, wanted = Package(actual), Package(expected)
    if stored.function_names != wanted.function_names:
        names, expected_names = (", ".join(package.function_names) for package in (stored, wanted))
        return [Difference(actual.name, f"has the functions {names}; expected {expected_names}")]
    differences: dict[str, Difference] = {}
    for name in wanted.function_names:
        operations, wanted_operations = (_operations(package, name) for package in (stored, wanted))
        for output in operations.keys() - wanted_operations.keys():
            differences[output] = Difference(output, f"is an operation that {name} does not have")
        for output, operation in wanted_operations.items():
            if output not in operations:
                differences[output] = Difference(output, f"is missing in {name}")
            elif detail := _operation_difference(output, operations[output], operation, stored, wanted):
                differences.setdefault(output, detail)
        if list(operations) != list(wanted_operations) and not differences:
            differences[name] = Difference(name, "has its operations in another order")
    if not differences and stored.model.description != wanted.model.description:
        return [Difference(actual.name, "describes other inputs, outputs or metadata")]
    return list(differences.values())


def _operations(package: Package, function: str) -> dict[str, Any]:
    """Return the operations of a function by their first output, or else by position."""
    proto = package.function(function)
    operations = proto.block_specializations[proto.opset].operations
    return {
        operation.outputs[0].name if operation.outputs else f"{operation.type} {place}": operation
        for place, operation in enumerate(operations)
    }


def _operation_difference(
    output: str, actual: Any, expected: Any, stored: Package, wanted: Package
) -> Difference | None:
    """Compare an operation of the package ``stored`` with that of ``wanted``."""
    if actual.type != expected.type:
        return Difference(output, f"is {actual.type}, expected {expected.type}")
    for field in ("inputs", "attributes"):
        arguments, expected_arguments = (dict(getattr(operation, field)) for operation in (actual, expected))
        for key in sorted(arguments.keys() | expected_arguments.keys()):
            if key not in arguments or key not in expected_arguments:
                return Difference(output, f"{'lacks' if key in expected_arguments else 'has'} {key}")
            pair = (arguments[key], expected_arguments[key])
            if difference := _argument_difference(f"{output}.{key}", *pair, stored, wanted):
                return difference
    outputs = [
        [item.SerializeToString(deterministic=True) for item in operation.outputs]
        for operation in (actual, expected)
    ]
    return Difference(output, "has another type") if outputs[0] != outputs[1] else None


def _argument_difference(
    name: str, actual: Any, expected: Any, stored: Package, wanted: Package
) -> Difference | None:
    """Compare an input, which is a list of arguments, or an attribute, which is a value."""
    values = [
        [item.value for item in argument.arguments] if hasattr(argument, "arguments") else [argument]
        for argument in (actual, expected)
    ]
    names = [
        [item.name for item in argument.arguments] if hasattr(argument, "arguments") else []
        for argument in (actual, expected)
    ]
    if names[0] != names[1] or len(values[0]) != len(values[1]):
        return Difference(name, f"reads {', '.join(names[0])}; expected {', '.join(names[1])}")
    for value, wanted_value in zip(*values, strict=True):
        if wanted_value.WhichOneof("value") == "blobFileValue" == value.WhichOneof("value"):
            difference = _weight_difference(name, value, wanted_value, stored, wanted)
            if difference:
                return difference
        elif value.SerializeToString(deterministic=True) != wanted_value.SerializeToString(
            deterministic=True
        ):
            return Difference(
                name, f"is {_format_constant(value)}, expected {_format_constant(wanted_value)}"
            )
    return None


def _weight_difference(
    name: str, actual: Any, expected: Any, stored: Package, wanted: Package
) -> Difference | None:
    """Compare two weights in the packages' weight files."""
    shapes = [
        tuple(int(dim.constant.size) for dim in value.type.tensorType.dimensions)
        for value in (actual, expected)
    ]
    if shapes[0] != shapes[1]:
        return Difference(name, f"is {list(shapes[0])}, expected {list(shapes[1])}")
    values = stored.weights.read(int(actual.blobFileValue.offset), shapes[0])
    wanted_values = wanted.weights.read(int(expected.blobFileValue.offset), shapes[1])
    changed = np.not_equal(values, wanted_values)
    if values.dtype == wanted_values.dtype and not changed.any():
        return None
    where = tuple(int(axis) for axis in np.unravel_index(int(changed.argmax()), shapes[0]))
    detail = f"{float(values[where]):.6g} at {list(where)}, expected {float(wanted_values[where]):.6g}"
    return Difference(name, detail, where, int(changed.sum()), int(changed.size))


def _format_constant(value: Any) -> str:
    """Return the first values of a constant that the specification itself stores."""
    tensor = value.immediateValue.tensor
    kind = tensor.WhichOneof("value")
    if kind == "bytes":
        numbers = np.frombuffer(tensor.bytes.values, np.float16)
        return ", ".join(f"{float(number):.6g}" for number in numbers[:4])
    return ", ".join(map(str, getattr(tensor, kind).values[:4])) if kind else "another value"
