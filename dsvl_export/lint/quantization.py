"""TensorRT's rules for quantize and dequantize operators.

From NVIDIA's documentation of explicit quantization: symmetric with constant zero points, positive
constant scales, activations per tensor, channels only for weights, blocks only for 4-bit codes.
What the parser of TensorRT-RTX 1.7.1 accepts against the documentation is ``unusual``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto

from dsvl_export.lint.finding import Finding
from dsvl_export.lint.view import GraphView, dtype_name, input_name, node_attributes

CODES = {TensorProto.INT8: "int8", TensorProto.FLOAT8E4M3FN: "float8e4m3fn", TensorProto.INT4: "int4"}
# Axis of the output channels of the weight that each operator reads second.
CHANNEL_AXIS = {"MatMul": 1, "Gemm": 1, "Conv": 0}


def quantization_problems(file: Path) -> list[str]:
    """List what breaks a rule of quantization, including what is unusual, as sentences.

    Raises:
        UserError: the file is not a readable ONNX file.
    """
    return [str(finding) for finding in quantization_findings(GraphView(file))]


def quantization_findings(view: GraphView) -> Iterator[Finding]:
    """Check every quantize and dequantize node."""
    for node in view.nodes:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            yield from _check(view, node)


def _check(view: GraphView, node: NodeProto) -> Iterator[Finding]:
    attributes, source, scale = node_attributes(node), input_name(node, 0), input_name(node, 1)
    weight = source in view.constants
    codes = view.constants[source].data_type if weight and node.op_type == "DequantizeLinear" else None
    zero = input_name(node, 2)
    if zero:
        codes = view.dtype(zero) if codes is None else codes
        yield from _zero_point(view, node, zero)
    elif node.op_type == "QuantizeLinear" and not attributes.get("output_dtype"):
        yield Finding(
            node.name,
            "zero-point",
            "changed",
            "without a zero point its codes are uint8, and TensorRT reads int8",
            "add a zero point of int8",
        )
    if codes is not None and codes not in CODES:
        yield Finding(
            node.name,
            "codes",
            "refused",
            f"its codes are {dtype_name(codes)}; TensorRT supports {', '.join(CODES.values())}",
            "quantize to int8",
        )
    yield from _scale(view, node, scale, attributes, codes)


def _zero_point(view: GraphView, node: NodeProto, zero: str) -> Iterator[Finding]:
    if zero not in view.constants:
        yield Finding(
            node.name,
            "zero-point",
            "refused",
            f"its zero point {zero} is not a constant",
            "make it a constant 0",
        )
    elif np.any(view.array(zero).astype(np.float32)):
        yield Finding(
            node.name,
            "zero-point",
            "refused",
            "its zero point is not 0; TensorRT supports only symmetric quantization",
            "calibrate symmetrically",
        )


def _scale(
    view: GraphView, node: NodeProto, scale: str, attributes: dict[str, Any], codes: int | None
) -> Iterator[Finding]:
    if scale not in view.constants:
        yield Finding(
            node.name,
            "scale",
            "unusual",
            f"its scale {scale} is not a constant",
            "calibrate it ahead of time",
        )
        return
    values = view.array(scale)
    if not (np.isfinite(values).all() and (values > 0).all()):
        yield Finding(
            node.name,
            "scale",
            "refused",
            f"its scale {scale} must be positive and finite, it holds {values.min()}",
            "calibrate it again",
        )
    block, weight = attributes.get("block_size", 0), input_name(node, 0) in view.constants
    if block and codes in CODES and codes != TensorProto.INT4:
        yield Finding(
            node.name, "block", "unusual", f"blocks of {block} need 4-bit codes", "use a scale per channel"
        )
    if values.size > 1 and not weight:
        yield Finding(
            node.name,
            "activation-scales",
            "unusual",
            f"an activation has {values.size} scales, only weights may have more than one",
            "quantize activations per tensor",
        )
    elif values.size > 1 and not block:
        yield from _channels(view, node, attributes.get("axis", 1))


def _channels(view: GraphView, node: NodeProto, axis: int) -> Iterator[Finding]:
    for reader, place in view.readers.get(node.output[0], []):
        expected = CHANNEL_AXIS.get(reader.op_type)
        if place == 1 and expected is not None and axis != expected:
            yield Finding(
                node.name,
                "scale-axis",
                "unusual",
                f"its scales are along axis {axis}, {reader.op_type} needs axis {expected}",
                "scale output channels",
            )
