"""Faults of ONNX files: values of tensors, attributes, operators and wiring."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.robustness.faults.values import change_values

ModelEdit = Callable[[onnx.ModelProto, Random], "str | None"]


def plant(folder: Path, random: Random) -> tuple[str, list[Path]]:
    """Change one of the ONNX files in a component's folder."""
    file = random.choice(sorted(folder.glob("*.onnx")))
    model = onnx.load(str(file))
    done = None
    while done is None:
        done = random.choice(EDITS)(model, random)
    onnx.save(model, str(file))
    return f"{done} ({file.name})", [file]


def _tensor(model: onnx.ModelProto, random: Random) -> str | None:
    tensor = random.choice(model.graph.initializer)
    small = tensor.data_type == TensorProto.INT64
    if small or tensor.data_type in (TensorProto.INT4, TensorProto.FLOAT8E4M3FN):
        return None
    values = numpy_helper.to_array(tensor)
    changed = change_values(values, random)
    if changed is None:
        return None
    what, array = changed
    array = np.ascontiguousarray(array.astype(values.dtype))
    if np.array_equal(array, values):
        return None
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return f"{tensor.name} {what}"


def _rope_rows(model: onnx.ModelProto, random: Random) -> str | None:
    tables = [item for item in model.graph.initializer if item.name in ("cos", "sin")]
    if not tables:
        return None
    tensor = random.choice(tables)
    values = numpy_helper.to_array(tensor).copy()
    first = random.randrange(len(values))
    values[first : first + random.choice([1, 16])] = 0
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return f"{tensor.name} zeroed from row {first} on"


def _epsilons(model: onnx.ModelProto, random: Random) -> str | None:
    found = [
        (node, field) for node in model.graph.node for field in node.attribute if field.name == "epsilon"
    ]
    if not found:
        return None
    value = random.choice([1e-3, 1e-2, 0.0])
    chosen = found if random.random() < 0.5 else [random.choice(found)]
    for _, field in chosen:
        field.f = value
    return f"{len(chosen)} epsilons {value} ({chosen[0][0].name})"


def _attention(model: onnx.ModelProto, random: Random) -> str | None:
    nodes = [item for item in model.graph.node if "Attention" in item.op_type]
    if not nodes:
        return None
    node = random.choice(nodes)
    cached = node.op_type == "GroupQueryAttention"
    names = (
        [("local_window_size", random.choice([16, 100, 400])), ("rotary_interleaved", 1)] if cached else []
    )
    name, value = random.choice([*names, ("scale", random.choice([0.1, 0.15, 0.25, 0.3]))])
    kept = [field for field in node.attribute if field.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])
    return f"{node.name}: {name} {value}"


def _operator(model: onnx.ModelProto, random: Random) -> str | None:
    others = {"Add": "Sub", "Mul": "Div", "Sub": "Add", "Div": "Mul", "Sigmoid": "Tanh", "Gelu": "Relu"}
    nodes = [item for item in model.graph.node if item.op_type in others]
    if not nodes:
        return None
    node = random.choice(nodes)
    before, node.op_type = node.op_type, others[node.op_type]
    if node.op_type == "Relu":
        del node.attribute[:]
    return f"{node.name}: {node.op_type} for {before}"


def _wiring(model: onnx.ModelProto, random: Random) -> str | None:
    """A residual of another layer, or two nodes that read each other's input."""
    nodes = [item for item in model.graph.node if item.op_type in ("Add", "MatMul", "Mul")]
    one, other = random.choice(nodes), random.choice(nodes)
    index = random.randrange(2)
    if one.name == other.name or one.op_type != other.op_type or one.input[index] == other.input[index]:
        return None
    shapes = {item.name: list(item.dims) for item in model.graph.initializer}
    if shapes.get(one.input[index]) != shapes.get(other.input[index]):
        return None
    one.input[index], other.input[index] = other.input[index], one.input[index]
    return f"{one.name} and {other.name} read each other's input {index}"


EDITS: list[ModelEdit] = [
    _tensor, _tensor, _tensor, _tensor, _tensor, _rope_rows, _epsilons, _attention, _operator, _wiring,
]  # fmt: skip
