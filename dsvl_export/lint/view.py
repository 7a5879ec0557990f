"""A view of an ONNX file for rules: types and shapes of all values, constants, readers."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import NodeProto, TensorProto, numpy_helper

from runtimes.errors import UserError

PRODUCER = "dsvl-export"
Shape = tuple[int | str | None, ...]


class GraphView:
    """The graph of a file; weights stay on disk unless a rule reads them.

    Args:
        file: the ONNX file.

    Raises:
        UserError: the file is not a readable ONNX file.
    """

    def __init__(self, file: Path) -> None:
        """Load the graph; see the class."""
        try:
            model = onnx.load(str(file), load_external_data=False)
        except (OSError, DecodeError) as error:
            raise UserError(f"{file} is not a readable ONNX file ({error}).") from error
        self.file, self.model = file, model
        # Dims that this package's compilers make static when they build.
        self.set_when_built = {"capacity"} if model.producer_name == PRODUCER else set()
        self.nodes: list[NodeProto] = list(model.graph.node)
        # PyTorch's older exporter writes constants as nodes.
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer} | {
            node.output[0]: attribute.t
            for node in self.nodes
            if node.op_type == "Constant"
            for attribute in node.attribute
            if attribute.name == "value"
        }
        self.inputs = {value.name: value for value in model.graph.input if value.name not in self.constants}
        self.outputs = {value.name for value in model.graph.output}
        self.readers: dict[str, list[tuple[NodeProto, int]]] = {}
        for node in self.nodes:
            for place, name in enumerate(node.input):
                self.readers.setdefault(name, []).append((node, place))

    @property
    def opset(self) -> int:
        """The opset of the ONNX standard's operators; 0 if the file has none."""
        return next((item.version for item in self.model.opset_import if item.domain in ("", "ai.onnx")), 0)

    @cached_property
    def _values(self) -> dict[str, onnx.TypeProto.Tensor]:
        """Types of all values; if shape inference fails, only the declared ones."""
        try:
            model = onnx.shape_inference.infer_shapes(self.model)
        except onnx.shape_inference.InferenceError:
            model = self.model
        graph = model.graph
        return {
            value.name: value.type.tensor_type for value in (*graph.input, *graph.value_info, *graph.output)
        }

    def dtype(self, name: str) -> int | None:
        """Return ONNX's number of a value's dtype, or None if it is unknown."""
        if name in self.constants:
            return int(self.constants[name].data_type)
        found = self._values.get(name)
        return int(found.elem_type) if found is not None and found.elem_type else None

    def shape(self, name: str) -> Shape | None:
        """Return sizes, names or None for each dim, or None if the rank is unknown."""
        if name in self.constants:
            return tuple(self.constants[name].dims)
        value = self._values.get(name)
        if value is None or not value.HasField("shape"):
            return None
        return tuple(
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in value.shape.dim
        )

    def array(self, name: str) -> np.ndarray:
        """Load the values of a constant."""
        return np.asarray(numpy_helper.to_array(self.constants[name], base_dir=str(self.file.parent)))


def node_attributes(node: NodeProto) -> dict[str, Any]:
    """Return the attributes of a node by name."""
    return {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}


def dtype_name(dtype: int) -> str:
    """Return the name of a dtype, in lower case."""
    return TensorProto.DataType.Name(dtype).lower()


def input_name(node: NodeProto, place: int) -> str:
    """Return the name of an input, or an empty string if it is left out."""
    return node.input[place] if place < len(node.input) else ""
