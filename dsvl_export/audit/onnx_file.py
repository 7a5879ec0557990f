"""The comparison of an ONNX file with the graph that is lowered again: nodes and tensors."""

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

METHOD = "compared bit for bit with the graph lowered again"


def compare_onnx(graph: Graph, file: Path, part: AuditedPart, on_bytes: Callable[[int], None]) -> None:
    """Record in ``part`` where a file differs from a graph; one tensor at a time is in memory."""
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
            actual = _read_bytes(tensor, file)
            if isinstance(actual, str):
                part.add(Difference(name, actual))
            else:
                expected = np.frombuffer(stored_bytes(item), np.uint8)
                difference = compare_values(name, actual, expected, item.dtype, item.shape)
                if difference:
                    part.add(difference)
        part.tensors += 1
        part.values += int(np.prod(item.shape, dtype=np.int64))
        on_bytes(item.nbytes)
    part.nodes += len(graph.nodes)
    _compare_graphs(graph.model(), model, file.name, part)


def _read_bytes(tensor: TensorProto, file: Path) -> np.ndarray | str:
    """Return the flat bytes of a tensor, or what is wrong with their location."""
    if tensor.data_location != TensorProto.EXTERNAL:
        raw = tensor.raw_data if tensor.HasField("raw_data") else None
        content = numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data if raw is None else raw
        return np.frombuffer(content, np.uint8)
    place = {item.key: item.value for item in tensor.external_data}
    try:
        location, offset, length = place["location"], int(place["offset"]), int(place["length"])
    except (KeyError, ValueError):
        return "has no location of its external data"
    data = file.parent / location
    if Path(location).name != location or not data.is_file():
        return f"is stored in {location!r}, which is not a file next to {file.name}"
    if offset < 0 or length < 0 or offset + length > data.stat().st_size:
        return f"is stored beyond the end of {location}"
    return np.memmap(data, np.uint8, "r", offset, (length,)) if length else np.empty(0, np.uint8)


def _compare_graphs(expected: onnx.ModelProto, actual: onnx.ModelProto, file: str, part: AuditedPart) -> None:
    """Compare everything of a model except its tensors."""
    bare = onnx.ModelProto()
    bare.CopyFrom(actual)
    del bare.graph.initializer[:]
    if bare.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True):
        return
    before = len(part.differences) + part.more
    expected_nodes = {node.name: node for node in expected.graph.node}
    names = Counter(node.name for node in bare.graph.node)
    for name in names.keys() - expected_nodes.keys():
        part.add(Difference(name, "is a node that the graph does not have"))
    nodes = {node.name: node for node in bare.graph.node}
    for name, node in expected_nodes.items():
        if name not in nodes:
            part.add(Difference(name, f"the node {node.op_type} is missing"))
        elif names[name] > 1:
            part.add(Difference(name, "is the name of two nodes"))
        elif detail := _node_difference(nodes[name], node):
            part.add(Difference(name, detail))
    order = [node.name for node in bare.graph.node] == [node.name for node in expected.graph.node]
    if len(part.differences) + part.more == before:
        field = "the order of its nodes" if not order else _changed_fields(bare, expected)
        part.add(Difference(file, f"differs in {field}"))


def _node_difference(actual: onnx.NodeProto, expected: onnx.NodeProto) -> str:
    if (actual.domain, actual.op_type) != (expected.domain, expected.op_type):
        return f"is {actual.op_type}, expected {expected.op_type}"
    if list(actual.input) != list(expected.input):
        return f"reads {', '.join(actual.input)}; expected {', '.join(expected.input)}"
    if list(actual.output) != list(expected.output):
        return f"gives {', '.join(actual.output)}; expected {', '.join(expected.output)}"
    attributes, wanted = _attributes(actual), _attributes(expected)
    for name in sorted(attributes.keys() | wanted.keys()):
        if attributes.get(name) != wanted.get(name):
            return f"has {name} {attributes.get(name, 'missing')}, expected {wanted.get(name, 'none')}"
    return "" if actual == expected else "differs in a field that changes no value"


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def _changed_fields(actual: onnx.ModelProto, expected: onnx.ModelProto) -> str:
    """Return the names of the fields of a model, and of its graph, that differ."""
    names = [
        field.name
        for message, wanted in ((actual, expected), (actual.graph, expected.graph))
        for field in message.DESCRIPTOR.fields
        if field.name != "graph" and getattr(message, field.name) != getattr(wanted, field.name)
    ]
    return ", ".join(names) or "fields that are unknown to this release"
