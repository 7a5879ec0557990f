"""An ONNX file against the graph that was lowered anew: nodes, attributes, and each tensor in turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper

from dsvl_export.audit.result import AuditedPart, Difference
from dsvl_export.audit.values import compare_values
from dsvl_export.compilers.onnx.builder import Graph, element_type
from dsvl_export.compilers.onnx.writer import stored_bytes

METHOD = "compared with the graph lowered anew, bit for bit"


def compare_onnx(graph: Graph, file: Path, part: AuditedPart, on_bytes: Callable[[int], None]) -> None:
    """Note in ``part`` where a file is not the graph that was lowered; one tensor is in memory at a time."""
    part.method = METHOD
    try:
        model = onnx.load(str(file), load_external_data=False)
    except (DecodeError, OSError) as error:
        part.add(Difference(file.name, f"is not a readable ONNX file ({error})"))
        return
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for name in stored.keys() - graph.initializers.keys():
        part.add(Difference(name, "is a tensor that the graph does not have"))
    if len(stored) != len(model.graph.initializer):
        part.add(Difference(file.name, "holds two tensors of one name"))
    for name, item in graph.initializers.items():
        tensor = stored.get(name)
        if tensor is None:
            part.add(Difference(name, "is missing"))
        elif (tensor.data_type, tuple(tensor.dims)) != (element_type(item.dtype), item.shape):
            kind = TensorProto.DataType.Name(tensor.data_type)
            part.add(
                Difference(name, f"is {kind}{list(tensor.dims)}, expected {item.dtype}{list(item.shape)}")
            )
        else:
            found = _stored(tensor, file)
            if isinstance(found, str):
                part.add(Difference(name, found))
            else:
                expected = np.frombuffer(stored_bytes(item), np.uint8)
                difference = compare_values(name, found, expected, item.dtype, item.shape)
                if difference:
                    part.add(difference)
        part.tensors += 1
        part.values += int(np.prod(item.shape, dtype=np.int64))
        on_bytes(item.nbytes)
    part.nodes += len(graph.nodes)
    _compare_graphs(graph.model(), model, file.name, part)


def _stored(tensor: TensorProto, file: Path) -> np.ndarray | str:
    """The bytes of a tensor, flat, or what is wrong with where they lie."""
    if tensor.data_location != TensorProto.EXTERNAL:
        raw = tensor.raw_data if tensor.HasField("raw_data") else None
        content = numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data if raw is None else raw
        return np.frombuffer(content, np.uint8)
    place = {item.key: item.value for item in tensor.external_data}
    try:
        location, offset, length = place["location"], int(place["offset"]), int(place["length"])
    except (KeyError, ValueError):
        return "does not say where its values lie"
    data = file.parent / location
    if Path(location).name != location or not data.is_file():
        return f"lies in {location!r}, which is no file beside {file.name}"
    if offset < 0 or length < 0 or offset + length > data.stat().st_size:
        return f"lies beyond the end of {location}"
    return np.memmap(data, np.uint8, "r", offset, (length,)) if length else np.empty(0, np.uint8)


def _compare_graphs(expected: onnx.ModelProto, found: onnx.ModelProto, file: str, part: AuditedPart) -> None:
    """Everything of a model but its tensors."""
    bare = onnx.ModelProto()
    bare.CopyFrom(found)
    del bare.graph.initializer[:]
    if bare.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True):
        return
    before = len(part.differences) + part.more
    wanted = {node.name: node for node in expected.graph.node}
    names = Counter(node.name for node in bare.graph.node)
    for name in names.keys() - wanted.keys():
        part.add(Difference(name, "is a node that the graph does not have"))
    there = {node.name: node for node in bare.graph.node}
    for name, node in wanted.items():
        if name not in there:
            part.add(Difference(name, f"the node {node.op_type} is missing"))
        elif names[name] > 1:
            part.add(Difference(name, "is the name of two nodes"))
        elif detail := _node_difference(there[name], node):
            part.add(Difference(name, detail))
    order = [node.name for node in bare.graph.node] == [node.name for node in expected.graph.node]
    if len(part.differences) + part.more == before:
        what = "the order of its nodes" if not order else _fields(bare, expected)
        part.add(Difference(file, f"differs in {what}"))


def _node_difference(found: onnx.NodeProto, expected: onnx.NodeProto) -> str:
    if (found.domain, found.op_type) != (expected.domain, expected.op_type):
        return f"is {found.op_type}, expected {expected.op_type}"
    if list(found.input) != list(expected.input):
        return f"reads {', '.join(found.input)}; expected {', '.join(expected.input)}"
    if list(found.output) != list(expected.output):
        return f"gives {', '.join(found.output)}; expected {', '.join(expected.output)}"
    one, other = _attributes(found), _attributes(expected)
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            return f"has {name} {one.get(name, 'missing')}, expected {other.get(name, 'none')}"
    return "" if found == expected else "differs in a field that changes no value"


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def _fields(found: onnx.ModelProto, expected: onnx.ModelProto) -> str:
    """The fields of a model, and of its graph, that differ."""
    names = [
        field.name
        for one, other in ((found, expected), (found.graph, expected.graph))
        for field in one.DESCRIPTOR.fields
        if field.name != "graph" and getattr(one, field.name) != getattr(other, field.name)
    ]
    return ", ".join(names) or "fields that this release does not know"
