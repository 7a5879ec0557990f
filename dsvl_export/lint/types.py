"""Rules of types, ranks and inputs; networks are strongly typed, so TensorRT converts nothing."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import NodeProto, TensorProto
from packaging.version import Version

from dsvl_export.lint.finding import Finding
from dsvl_export.lint.view import GraphView, dtype_name, input_name

MAX_RANK = 8
OLDEST_OPSET = 7
# The newest opset that the ONNX inside a release knows.
NEWEST_OPSET = {Version("10.3"): 21, Version("10.8"): 22, Version("10.12"): 23, Version("10.15"): 24}
TYPES = {
    TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE, TensorProto.INT64,
    TensorProto.INT32, TensorProto.INT8, TensorProto.UINT8, TensorProto.BOOL, TensorProto.FLOAT8E4M3FN,
    TensorProto.INT4,
}  # fmt: skip
# Compute capabilities that have a type.
SINCE_SM = {TensorProto.FLOAT8E4M3FN: 89, TensorProto.BFLOAT16: 80}
# Operators whose inputs, from the first place on and at these places, must have one type.
SAME_TYPE = {
    "Add": (0, 1), "Sub": (0, 1), "Mul": (0, 1), "Div": (0, 1), "MatMul": (0, 1), "Gemm": (0, 1, 2),
    "Conv": (0, 1, 2), "ConvTranspose": (0, 1, 2), "LayerNormalization": (0, 1, 2), "Where": (1, 2),
    "Less": (0, 1), "LessOrEqual": (0, 1), "Greater": (0, 1), "Equal": (0, 1), "Attention": (0, 1, 2),
}  # fmt: skip
FLOATS_ONLY = {
    "MatMul",
    "Gemm",
    "Conv",
    "Softmax",
    "LayerNormalization",
    "RMSNormalization",
    "Attention",
    "Gelu",
}
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
                "no node reads this input, so what it says is lost",
                "remove it, or use it",
            )


def _opset(view: GraphView, version: Version) -> Iterator[Finding]:
    newest = max((opset for since, opset in NEWEST_OPSET.items() if version >= since), default=0)
    if view.opset < OLDEST_OPSET:
        yield Finding(
            "the file",
            "opset",
            "refused",
            f"opset {view.opset} is older than {OLDEST_OPSET}",
            f"convert it to opset {OLDEST_OPSET} or later",
        )
    elif version < Version("11") and view.opset > newest:
        yield Finding(
            "the file",
            "opset",
            "refused",
            f"TensorRT {version} knows opsets up to {newest}, this is {view.opset}",
            f"export it for TensorRT {version}",
        )


def _value(view: GraphView, name: str) -> Iterator[Finding]:
    dtype, shape = view.dtype(name), view.shape(name)
    if dtype is not None and dtype not in TYPES:
        yield Finding(
            name,
            "type",
            "refused",
            f"TensorRT has no {dtype_name(dtype)}",
            f"take one of {', '.join(sorted(dtype_name(known) for known in TYPES))}",
        )
    if shape is not None and len(shape) > MAX_RANK:
        yield Finding(
            name,
            "rank",
            "refused",
            f"its rank is {len(shape)}, TensorRT has at most {MAX_RANK}",
            "merge axes by a Reshape",
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
                f"take {other} for this GPU",
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
            f"{node.op_type} takes no {dtype_name(first)}",
            "compute it in float16 or float32",
        )
    elif first == TensorProto.UINT8 and node.op_type not in TAKES_UINT8:
        yield Finding(
            node.name,
            "uint8",
            "refused",
            f"{node.op_type} takes no uint8, which only inputs and outputs may be",
            "Cast it first",
        )
