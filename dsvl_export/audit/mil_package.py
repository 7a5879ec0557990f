"""Where two Core ML packages of one component differ: functions, operations and weights, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dsvl_export.audit.result import Difference
from runtimes.backends.mil.package import Package


def package_differences(found: Path, expected: Path) -> list[Difference]:
    """What of a package is not as in the other; values of weights are compared one at a time.

    Raises:
        UserError: the first one cannot be read.
    """
    one, other = Package(found), Package(expected)
    if one.function_names != other.function_names:
        there = ", ".join(one.function_names)
        return [
            Difference(found.name, f"has the functions {there}; expected {', '.join(other.function_names)}")
        ]
    differences: dict[str, Difference] = {}
    for name in other.function_names:
        mine, wanted = (_operations(package, name) for package in (one, other))
        for output in mine.keys() - wanted.keys():
            differences[output] = Difference(output, f"is an operation that {name} does not have")
        for output, operation in wanted.items():
            if output not in mine:
                differences[output] = Difference(output, f"is missing in {name}")
            elif detail := _difference(output, mine[output], operation, one, other):
                differences.setdefault(output, detail)
        if list(mine) != list(wanted) and not differences:
            differences[name] = Difference(name, "has its operations in another order")
    if not differences and one.model.description != other.model.description:
        return [Difference(found.name, "describes other inputs, outputs or metadata")]
    return list(differences.values())


def _operations(package: Package, function: str) -> dict[str, Any]:
    """Operations of a function by the first value that each gives; those that give none by their place."""
    proto = package.function(function)
    operations = proto.block_specializations[proto.opset].operations
    return {
        operation.outputs[0].name if operation.outputs else f"{operation.type} {place}": operation
        for place, operation in enumerate(operations)
    }


def _difference(output: str, mine: Any, wanted: Any, one: Package, other: Package) -> Difference | None:
    if mine.type != wanted.type:
        return Difference(output, f"is {mine.type}, expected {wanted.type}")
    for field in ("inputs", "attributes"):
        found, expected = (dict(getattr(operation, field)) for operation in (mine, wanted))
        for key in sorted(found.keys() | expected.keys()):
            if key not in found or key not in expected:
                return Difference(output, f"{'lacks' if key in expected else 'has'} {key}")
            if difference := _argument(f"{output}.{key}", found[key], expected[key], one, other):
                return difference
    outputs = [[item.SerializeToString(deterministic=True) for item in op.outputs] for op in (mine, wanted)]
    return Difference(output, "has another type") if outputs[0] != outputs[1] else None


def _argument(name: str, mine: Any, wanted: Any, one: Package, other: Package) -> Difference | None:
    values = [
        [item.value for item in given.arguments] if hasattr(given, "arguments") else [given]
        for given in (mine, wanted)
    ]
    names = [
        [item.name for item in given.arguments] if hasattr(given, "arguments") else []
        for given in (mine, wanted)
    ]
    if names[0] != names[1] or len(values[0]) != len(values[1]):
        return Difference(name, f"reads {', '.join(names[0])}; expected {', '.join(names[1])}")
    for found, expected in zip(*values, strict=True):
        if expected.WhichOneof("value") == "blobFileValue" == found.WhichOneof("value"):
            difference = _weight(name, found, expected, one, other)
            if difference:
                return difference
        elif found.SerializeToString(deterministic=True) != expected.SerializeToString(deterministic=True):
            return Difference(name, f"is {_short(found)}, expected {_short(expected)}")
    return None


def _weight(name: str, found: Any, expected: Any, one: Package, other: Package) -> Difference | None:
    shapes = [
        tuple(int(dim.constant.size) for dim in value.type.tensorType.dimensions)
        for value in (found, expected)
    ]
    if shapes[0] != shapes[1]:
        return Difference(name, f"is {list(shapes[0])}, expected {list(shapes[1])}")
    mine = one.weights.read(int(found.blobFileValue.offset), shapes[0])
    wanted = other.weights.read(int(expected.blobFileValue.offset), shapes[1])
    changed = np.not_equal(mine, wanted)
    if mine.dtype == wanted.dtype and not changed.any():
        return None
    where = tuple(int(axis) for axis in np.unravel_index(int(changed.argmax()), shapes[0]))
    detail = f"{float(mine[where]):.6g} at {list(where)}, expected {float(wanted[where]):.6g}"
    return Difference(name, detail, where, int(changed.sum()), int(changed.size))


def _short(value: Any) -> str:
    """A constant that stands in the specification itself."""
    tensor = value.immediateValue.tensor
    kind = tensor.WhichOneof("value")
    if kind == "bytes":
        numbers = np.frombuffer(tensor.bytes.values, np.float16)
        return ", ".join(f"{float(number):.6g}" for number in numbers[:4])
    return ", ".join(map(str, getattr(tensor, kind).values[:4])) if kind else "another value"
