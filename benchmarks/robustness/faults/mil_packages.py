"""Faults of Core ML packages: values of weights, constants, operators and wiring."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from benchmarks.robustness.faults.values import change_values
from runtimes.backends.mil.blob import KINDS
from runtimes.backends.mil.package import SPECIFICATION, WEIGHTS, Package

Edit = Callable[["Opened", Random], "str | None"]
EPSILON, FACTORS = 1e-3, (0.5, 0.9, 1.05, 1.3, 2.0)


class Opened:
    """A package that is edited: its functions (one, or all of them, as a fault is drawn) and its weights."""

    def __init__(self, folder: Path, random: Random) -> None:
        self.package = Package(folder)
        self.weights = np.fromfile(folder / WEIGHTS, np.uint8)
        names = self.package.function_names
        self.names = names if random.random() < 0.5 else [random.choice(names)]

    def operations(self) -> list[Any]:
        found: list[Any] = []
        for name in self.names:
            function = self.package.function(name)
            found += function.block_specializations[function.opset].operations
        return found

    def same(self, operation: Any) -> list[Any]:
        """An operation as all chosen functions have it."""
        output = operation.outputs[0].name
        return [item for item in self.operations() if item.outputs and item.outputs[0].name == output]

    def save(self) -> None:
        (self.package.folder / SPECIFICATION).write_bytes(self.package.model.SerializeToString())
        self.weights.tofile(self.package.folder / WEIGHTS)


def plant(folder: Path, random: Random) -> tuple[str, list[Path]]:
    """Change the package in a component's folder."""
    (package,) = folder.glob("*.mlpackage")
    opened = Opened(package, random)
    done = None
    while done is None:
        done = random.choice(EDITS)(opened, random)
    opened.save()
    where = "" if len(opened.names) > 1 else f" in {opened.names[0]}"
    return f"{done}{where}", [package / SPECIFICATION, package / WEIGHTS]


def _stored(opened: Opened) -> list[tuple[str, Any]]:
    """Weights that lie in the file, with the name of their operation; all functions share them."""
    found = []
    for operation in opened.operations():
        values = [operation.attributes["val"]] if "val" in operation.attributes else []
        values += [item.value for given in operation.inputs.values() for item in given.arguments]
        found += [
            (operation.outputs[0].name, value)
            for value in values
            if value.WhichOneof("value") == "blobFileValue"
        ]
    return found


def _change_stored(opened: Opened, name: str, value: Any, random: Random) -> str | None:
    shape = [int(dim.constant.size) for dim in value.type.tensorType.dimensions]
    kind, begin, size = opened.package.weights.check(int(value.blobFileValue.offset), tuple(shape))
    bits, dtype = KINDS[kind]
    packed = bits < 8
    stored = opened.weights[begin : begin + size].view(np.uint8 if packed else dtype)
    values = stored if packed else stored.reshape(shape)
    changed = change_values(values.copy(), random)
    if changed is None:
        return None
    what, array = changed
    array = array.astype(values.dtype)
    if np.array_equal(array, values):
        return None
    stored[:] = array.reshape(-1)
    return f"{name} {what}"


def _weight(opened: Opened, random: Random) -> str | None:
    return _change_stored(opened, *random.choice(_stored(opened)), random)


def _rope_rows(opened: Opened, random: Random) -> str | None:
    tables = [pair for pair in _stored(opened) if pair[0] in ("cos_table", "sin_table")]
    return _change_stored(opened, *random.choice(tables), random) if tables else None


def _immediate(opened: Opened, random: Random) -> str | None:
    """A constant of half precision that stands in the program: an epsilon, a scale, a mean."""
    found = [
        item
        for item in opened.operations()
        if item.type == "const" and item.attributes["val"].immediateValue.tensor.bytes.values
    ]
    if not found:
        return None
    chosen = random.choice(found)
    name = chosen.outputs[0].name
    values = np.frombuffer(chosen.attributes["val"].immediateValue.tensor.bytes.values, np.float16)
    epsilon = "epsilon" in name
    factor = random.choice(FACTORS)
    changed = np.full_like(values, EPSILON) if epsilon else (values * factor).astype(np.float16)
    if np.array_equal(changed, values):
        return None
    for item in opened.same(chosen):
        item.attributes["val"].immediateValue.tensor.bytes.values = changed.tobytes()
    return f"{name} {EPSILON if epsilon else f'times {factor}'}"


def _operator(opened: Opened, random: Random) -> str | None:
    others = {"add": "sub", "mul": "real_div", "sub": "add", "real_div": "mul", "silu": "sigmoid"}
    found = [item for item in opened.operations() if item.type in others]
    if not found:
        return None
    chosen = random.choice(found)
    before = chosen.type
    for item in opened.same(chosen):
        item.type = others[before]
    return f"{chosen.outputs[0].name}: {others[before]} for {before}"


def _wiring(opened: Opened, random: Random) -> str | None:
    """Two operations of a kind, with inputs of one shape, that read each other's."""
    types = {
        output.name: output.type.SerializeToString(deterministic=True)
        for item in opened.operations()
        for output in item.outputs
    }
    found = [item for item in opened.operations() if item.type in ("add", "mul", "linear", "reshape")]
    if not found:
        return None
    one = random.choice(found)
    key = random.choice([key for key in ("x", "y", "weight") if key in one.inputs])
    names = [one.inputs[key].arguments[0].name]
    fitting = [
        item
        for item in found
        if item.type == one.type
        and key in item.inputs
        and item.inputs[key].arguments[0].name != names[0]
        and types.get(item.inputs[key].arguments[0].name) == types.get(names[0])
    ]
    if not fitting:
        return None
    other = random.choice(fitting)
    names.append(other.inputs[key].arguments[0].name)
    for chosen, name in ((one, names[1]), (other, names[0])):
        for item in opened.same(chosen):
            item.inputs[key].arguments[0].name = name
    return f"{one.outputs[0].name} and {other.outputs[0].name} read each other's {key}"


EDITS: list[Edit] = [
    _weight, _weight, _weight, _weight, _weight, _rope_rows, _immediate, _operator, _wiring,
]  # fmt: skip
