"""Rules of operators: which operators a release has, and what it does not support of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from onnx import NodeProto, TensorProto
from packaging.version import Version

from dsvl_export.lint.finding import Finding
from dsvl_export.lint.view import GraphView, dtype_name, input_name, node_attributes
from runtimes.bundle.yaml_files import read_yaml

TABLE = Path(__file__).parent / "operators.yaml"
INTEGER = ("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv")
MAX_HEAD_SIZE = 256  # of a fused attention kernel (observed: 256 builds, 512 does not)
# Inputs that are shapes, axes or counts: TensorRT needs their values at build time.
SHAPE_INPUTS = {
    "Reshape": (1,), "Expand": (1,), "Tile": (1,), "TopK": (1,), "Pad": (1, 3), "Slice": (1, 2, 3, 4),
    "Squeeze": (1,), "Unsqueeze": (1,), "ConstantOfShape": (0,), "Range": (0, 1, 2), "Resize": (1, 2, 3),
    "ReduceMean": (1,), "ReduceSum": (1,), "ReduceMax": (1,), "ReduceMin": (1,), "ReduceProd": (1,),
    "ReduceL2": (1,), "Split": (1,), "CumSum": (1,),
}  # fmt: skip
FIRST_OUTPUT_ONLY = {"LayerNormalization", "RMSNormalization", "MaxPool", "Attention", "GroupNormalization"}
Rule = Callable[[GraphView, NodeProto], Iterator[Finding]]


@cache
def operator_table() -> dict[str, Version]:
    """Load the table of operators → the first TensorRT version that imports them."""
    rows = read_yaml(TABLE, "table of operators")
    return {operator: Version(since) for since, operators in rows.items() for operator in operators}


def operator_findings(view: GraphView, version: Version) -> Iterator[Finding]:
    """Check every node's operator."""
    for node in view.nodes:
        missing = _missing(node, version)
        if missing:
            yield missing
            continue
        if node.op_type in FIRST_OUTPUT_ONLY and any(node.output[1:]):
            yield refused(node, "outputs", "only its first output is supported", "leave the others out")
        yield from _shape_inputs(view, node)
        if node.op_type in RULES:
            yield from RULES[node.op_type](view, node)


def refused(node: NodeProto, rule: str, problem: str, remedy: str) -> Finding:
    """Create a finding with the effect ``refused``."""
    return Finding(node.name, rule, "refused", problem, remedy)


def _missing(node: NodeProto, version: Version) -> Finding | None:
    if node.domain not in ("", "ai.onnx"):
        return refused(
            node,
            "domain",
            f"TensorRT has no {node.domain}::{node.op_type} without a plugin",
            "use operators of the ONNX standard, as the backend tensorrt does",
        )
    since = operator_table().get(node.op_type)
    if since is None:
        remedy = "quantize with QuantizeLinear and DequantizeLinear" if node.op_type in INTEGER else ""
        return refused(
            node, "operator", f"TensorRT does not import {node.op_type}", remedy or "use other operators"
        )
    if version < since:
        return refused(
            node,
            "operator",
            f"{node.op_type} needs TensorRT {since}, this is {version}",
            f"export for TensorRT {version}, which uses primitive operators instead",
        )
    return None


def _shape_inputs(view: GraphView, node: NodeProto) -> Iterator[Finding]:
    for place in SHAPE_INPUTS.get(node.op_type, ()):
        name = input_name(node, place)
        if name in view.inputs:
            yield refused(
                node,
                "shape-input",
                f"{node.op_type} takes a shape or axes from the network's input {name}",
                "make it a constant, or derive it from the shape of another input",
            )


def _attention(view: GraphView, node: NodeProto) -> Iterator[Finding]:
    attributes, dtype = node_attributes(node), view.dtype(input_name(node, 0))
    mask, shape = input_name(node, 3), view.shape(input_name(node, 0))
    if attributes.get("softcap", 0.0):
        yield refused(
            node, "attention-softcap", "TensorRT's Attention has no softcap", "use primitive operators"
        )
    if mask and attributes.get("is_causal"):
        yield refused(
            node,
            "attention-mask",
            "it has both a mask and is_causal",
            "make the mask causal instead",
        )
    if input_name(node, 4) or input_name(node, 5):
        yield refused(
            node, "attention-past", "TensorRT's Attention has no past keys and values", "use TensorScatter"
        )
    if input_name(node, 6):
        yield Finding(
            node.name,
            "attention-lengths",
            "changed",
            "TensorRT drops nonpad_kv_seqlen with only a warning, and attends to unused slots",
            "use a mask instead",
        )
    if dtype == TensorProto.FLOAT:
        yield refused(
            node,
            "attention-float32",
            "TensorRT has no fused kernel for Attention in float32",
            "compute it in float16 or bfloat16, or use matrix products",
        )
    if mask and view.dtype(mask) not in (None, TensorProto.BOOL, dtype):
        yield refused(
            node,
            "attention-mask",
            f"the mask is {dtype_name(view.dtype(mask) or 0)}, the queries are not",
            "Cast the mask, or make it boolean",
        )
    head = shape[-1] if shape and len(shape) == 4 else None
    if isinstance(head, int) and head > MAX_HEAD_SIZE:
        yield refused(
            node,
            "attention-head",
            f"its head size is {head}, fused kernels support at most {MAX_HEAD_SIZE}",
            "use matrix products",
        )


def _tensor_scatter(view: GraphView, node: NodeProto) -> Iterator[Finding]:
    """Check the rules of KVCacheUpdate."""
    attributes, cache = node_attributes(node), input_name(node, 0)
    shape, axis = view.shape(cache), attributes.get("axis", -2)
    if shape and axis % len(shape) != len(shape) - 2:
        yield refused(
            node,
            "cache-axis",
            f"the cache is written along axis {axis}",
            "use the layout [B, H, C, Dh], axis -2",
        )
    length = shape[-2] if shape and len(shape) > 1 else None
    if shape and not isinstance(length, int) and length not in view.set_when_built:
        yield refused(
            node,
            "cache-length",
            "the cache has a dynamic length",
            "make it static; this package's compilers set it when they build",
        )
    if cache not in view.inputs:
        yield refused(
            node,
            "cache-input",
            f"its cache {cache} is not an input of the network",
            "pass the cache as input and output",
        )
    if node.output[0] not in view.outputs:
        yield refused(
            node,
            "cache-output",
            "the written cache is not an output of the network",
            "pass the cache as input and output",
        )


def _resize(view: GraphView, node: NodeProto) -> Iterator[Finding]:
    if node_attributes(node).get("antialias"):
        yield refused(
            node,
            "antialias",
            "TensorRT's Resize has no antialiasing",
            "for a fixed size, use two constant matrix products",
        )


def _scatter_nd(view: GraphView, node: NodeProto) -> Iterator[Finding]:
    kind = node_attributes(node).get("reduction", b"none")
    if kind not in (b"none", "none"):
        yield refused(
            node, "scatter-reduction", "TensorRT's ScatterND has no reduction", "use ScatterElements"
        )


def _batch_normalization(view: GraphView, node: NodeProto) -> Iterator[Finding]:
    if node_attributes(node).get("training_mode"):
        yield refused(node, "training", "BatchNormalization is in training mode", "export in evaluation mode")


def _max_pool(view: GraphView, node: NodeProto) -> Iterator[Finding]:
    if any(dilation != 1 for dilation in node_attributes(node).get("dilations", ())):
        yield refused(node, "pool-dilation", "TensorRT's MaxPool has no dilation", "use another pooling")


def _conv(view: GraphView, node: NodeProto) -> Iterator[Finding]:
    shape = view.shape(input_name(node, 0))
    if shape and len(shape) > 2 and not isinstance(shape[1], int):
        yield refused(
            node, "conv-channels", "its number of channels is dynamic", "make the channel axis static"
        )


RULES: dict[str, Rule] = {
    "Attention": _attention,
    "TensorScatter": _tensor_scatter,
    "Resize": _resize,
    "ScatterND": _scatter_nd,
    "BatchNormalization": _batch_normalization,
    "MaxPool": _max_pool,
    "Conv": _conv,
}
