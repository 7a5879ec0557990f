"""TensorRT 11's rules for quantize and dequantize operators, checked on a written ONNX file.

From NVIDIA's documentation of explicit quantization: symmetric with constant zero points, positive constant
scales, activations per tensor, single channels for weights alone, blocks for 4-bit codes alone, and no
operator of dynamic or implicit quantization.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import NodeProto, TensorProto, numpy_helper

from runtimes.errors import UserError

FORBIDDEN = {"DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv"}
CODES = {TensorProto.INT8: "int8", TensorProto.FLOAT8E4M3FN: "float8e4m3fn", TensorProto.INT4: "int4"}
# Axis of the output channels of the weight that each operator reads second.
CHANNEL_AXIS = {"MatMul": 1, "Gemm": 1, "Conv": 0}


def problems(file: Path) -> list[str]:
    """What breaks a rule in an ONNX file: a sentence each, with the node's name.

    Raises:
        UserError: it is no ONNX file.
    """
    try:
        model = onnx.load(str(file), load_external_data=False)
    except (OSError, DecodeError) as error:
        raise UserError(f"{file} is no ONNX file that can be read ({error}).") from error
    return list(_Linter(model, file.parent).run())


class _Linter:
    def __init__(self, model: onnx.ModelProto, folder: Path) -> None:
        self._folder, self._nodes = folder, list(model.graph.node)
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._readers: dict[str, list[tuple[NodeProto, int]]] = {}
        for node in self._nodes:
            for place, name in enumerate(node.input):
                self._readers.setdefault(name, []).append((node, place))

    def run(self) -> Iterator[str]:
        for node in self._nodes:
            if node.op_type in FORBIDDEN:
                yield f"{node.name}: TensorRT imports no {node.op_type}, only Quantize- and DequantizeLinear."
            elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                yield from self._check(node)

    def _check(self, node: NodeProto) -> Iterator[str]:
        attributes = {
            attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute
        }
        source, scale, *zero = node.input
        weight = source in self._constants
        if scale not in self._constants:
            yield f"{node.name}: its scale {scale} is no constant."
            return
        values = self._array(scale)
        if not (np.isfinite(values).all() and (values > 0).all()):
            yield f"{node.name}: its scale {scale} must be positive and finite, it holds {values.min()}."
        codes = self._constants[source].data_type if weight and node.op_type == "DequantizeLinear" else None
        if zero and zero[0]:
            if zero[0] not in self._constants:
                yield f"{node.name}: its zero point {zero[0]} is no constant."
            else:
                codes = self._constants[zero[0]].data_type
                if np.any(self._array(zero[0]).astype(np.float32)):
                    yield f"{node.name}: its zero point is not 0; only symmetric quantization is taken."
        elif node.op_type == "QuantizeLinear" and not attributes.get("output_dtype"):
            codes = TensorProto.UINT8  # ONNX's default
        if codes is not None and codes not in CODES:
            name = TensorProto.DataType.Name(codes).lower()
            yield f"{node.name}: its codes are {name}; TensorRT takes {', '.join(CODES.values())}."
        block = attributes.get("block_size", 0)
        if block and codes != TensorProto.INT4:
            yield f"{node.name}: blocks of {block} need 4-bit codes."
        if values.size > 1 and not weight:
            yield f"{node.name}: an activation has {values.size} scales, only weights may have several."
        elif values.size > 1 and not block:
            yield from self._check_axis(node, attributes.get("axis", 1))

    def _check_axis(self, node: NodeProto, axis: int) -> Iterator[str]:
        for reader, place in self._readers.get(node.output[0], []):
            wanted = CHANNEL_AXIS.get(reader.op_type)
            if place == 1 and wanted is not None and axis != wanted:
                yield f"{node.name}: its scales lie along axis {axis}, {reader.op_type} needs {wanted}."

    def _array(self, name: str) -> np.ndarray:
        return np.asarray(numpy_helper.to_array(self._constants[name], base_dir=str(self._folder)))
