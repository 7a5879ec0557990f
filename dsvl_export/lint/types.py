"""Rules of types, ranks and inputs; networks are strongly typed, so TensorRT converts nothing."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import NodeProto, TensorProto
from packaging.version import Version

from dsvl_export.lint.finding import Finding
from dsvl_export.lint.view import GraphView, dtype_name, input_name

# TensorRT version → the newest opset that its ONNX parser supports.
NEWEST_OPSET = {Version("10.3"): 21, Version("10.8"): 22, Version("10.12"): 23, Version("10.15"): 24}
TYPES = {
    TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE, TensorProto.INT64,
    TensorProto.INT32, TensorProto.INT8, TensorProto.UINT8, TensorProto.BOOL, TensorProto.FLOAT8E4M3FN,
    TensorProto.INT4,
}  # fmt: skip
# Type → the compute capability that introduced it.
SINCE_SM = {TensorProto.FLOAT8E4M3FN: 89, TensorProto.BFLOAT16: 80}
# Operator → the places of inputs that must have the same type.
SAME_TYPE = {
    "Add": (0, 1), "Sub": (0, 1), "Mul": (0, 1), "Div": (0, 1), "MatMul": (0, 1), "Gemm": (0, 1, 2),
    "Conv": (0, 1, 2), "ConvTranspose": (0, 1, 2), "LayerNormalization": (0, 1, 2), "Where": (1, 2),
    "Less": (0, 1), "LessOrEqual": (0, 1), "Greater": (0, 1), "Equal": (0, 1), "Attention": (0, 1, 2),
}  # fmt: skip
FLOATS_ONLY = {"MatMul", "Gemm"}  # for which ONNX allows integers
FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
# UINT8 is for inputs and outputs of the network; these operators may still touch it.
TAKES_UINT8 = {"Cast", "Identity", "QuantizeLinear", "DequantizeLinear"}


def type_findings(view: GraphView, version: Version, sm: int | None) -> Iterator[Finding]:
    """Check opset, types, ranks and inputs of a file."""
    yield from _opset(view, version)
    values = [*view.constants, *view.inputs]
    for name in values:
        yield from _value(view, name)
    yield from _capability(view, values, sm)
    for node in view.nodes:
        yield from _node(view, node)
    for name in view.inputs:
        if name not in view.readers and name not in view.outputs:
            yield Finding(
                name,
                "unused-input",
                "changed",
                "no node reads this input",
                "remove it, or use it",
            )


def _opset(view: GraphView, version: Version) -> Iterator[Finding]:
    newest = max((opset for since, opset in NEWEST_OPSET.items() if version >= since), default=0)
    if version < Version("11") and view.opset > newest:
        yield Finding(
            "the file",
            "opset",
            "refused",
            f"TensorRT {version} supports opsets up to {newest}, this is {view.opset}",
            f"export it for TensorRT {version}",
        )


def _value(view: GraphView, name: str) -> Iterator[Finding]:
    dtype = view.dtype(name)
    if dtype is not None and dtype not in TYPES:
        yield Finding(
            name,
            "type",
            "refused",
            f"TensorRT has no {dtype_name(dtype)}",
            f"use one of {', '.join(sorted(dtype_name(known) for known in TYPES))}",
        )


def _capability(view: GraphView, values: list[str], sm: int | None) -> Iterator[Finding]:
    """Find types that the GPU does not support, each once."""
    types: dict[int, str] = {}
    for name in (*values, *(output for node in view.nodes for output in node.output)):
        dtype = view.dtype(name)
        if dtype is not None:
            types.setdefault(dtype, name)
    for dtype, since in SINCE_SM.items():
        if sm is not None and sm < since and dtype in types:
            other = "int8" if dtype == TensorProto.FLOAT8E4M3FN else "float16"
            yield Finding(
                types[dtype],
                "capability",
                "refused",
                f"{dtype_name(dtype)} needs SM {since}, this is SM {sm}",
                f"use {other} for this GPU",
            )


def _node(view: GraphView, node: NodeProto) -> Iterator[Finding]:
    places = SAME_TYPE.get(node.op_type, ())
    types = {view.dtype(input_name(node, place)) for place in places if input_name(node, place)} - {None}
    if len(types) > 1:
        names = " and ".join(sorted(dtype_name(found) for found in types if found))
        yield Finding(
            node.name,
            "mixed-types",
            "refused",
            f"{node.op_type} mixes {names}",
            "insert a Cast, or store the constant in the other's type",
        )
    first = view.dtype(input_name(node, 0))
    if node.op_type in FLOATS_ONLY and first is not None and first not in FLOATS:
        yield Finding(
            node.name,
            "float-only",
            "refused",
            f"{node.op_type} does not support {dtype_name(first)}",
            "compute it in float16 or float32",
        )
    elif first == TensorProto.UINT8 and node.op_type not in TAKES_UINT8:
        yield Finding(
            node.name,
            "uint8",
            "refused",
            f"{node.op_type} does not support uint8, which is only for inputs and outputs",
            "Cast it first",
        )
