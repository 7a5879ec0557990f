"""Small ONNX files, good ones and ones that break a rule each, for the linter and for TensorRT's own parser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401 -- registers float8 and int4 with numpy
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HALF, FLOAT, BFLOAT, INT64, BOOL = (
    TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.BFLOAT16, TensorProto.INT64, TensorProto.BOOL,
)  # fmt: skip
INT4, FLOAT8, FLOAT8_E5M2 = np.dtype("int4"), np.dtype("float8_e4m3fn"), np.dtype("float8_e5m2")
node = helper.make_node
Values = Sequence[tuple[str, int, Any]]
NO_ARRAYS: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Case:
    """A file, the rules that the linter must name (none: it must pass), and the GPU it is judged for."""

    model: onnx.ModelProto
    rules: tuple[str, ...] = ()
    sm: int = 89


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Values,
    output: tuple[str, int],
    constants: Mapping[str, Any] = NO_ARRAYS,
    opset: int = 24,
    more_outputs: Values = (),
) -> onnx.ModelProto:
    for index, item in enumerate(nodes):
        item.name = item.name or f"node{index}"
    infos = [helper.make_tensor_value_info(*value) for value in inputs]
    outputs = [helper.make_tensor_value_info(*value) for value in ((*output, None), *more_outputs)]
    arrays = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(list(nodes), "g", infos, outputs, arrays)
    domains = {item.domain for item in nodes} - {""}
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    made = helper.make_model(graph, opset_imports=imports)
    made.ir_version = 11
    return made


def unary(
    operator: str, dtype: int = FLOAT, shape: Sequence[Any] = (2, 4, 8), opset: int = 24, **attributes: Any
) -> onnx.ModelProto:
    return model(
        [node(operator, ["x"], ["y"], **attributes)], [("x", dtype, list(shape))], ("y", dtype), opset=opset
    )


def pair(operator: str, first: int, second: int, **attributes: Any) -> onnx.ModelProto:
    inputs = [("x", first, [4, 4]), ("z", second, [4, 4])]
    return model([node(operator, ["x", "z"], ["y"], **attributes)], inputs, ("y", first))


def attention(
    dtype: int = HALF, head: int = 64, mask: tuple[int, list[int]] | None = None, lengths: bool = False, past: bool = False,
    kv_heads: int = 4, **attributes: Any,
) -> onnx.ModelProto:  # fmt: skip
    shapes = {"q": [1, 4, 16, head], "k": [1, kv_heads, 16, head], "v": [1, kv_heads, 16, head]}
    inputs: list[tuple[str, int, Any]] = [(name, dtype, shape) for name, shape in shapes.items()]
    names, outputs = ["q", "k", "v"], ["y"]
    if mask:
        names, inputs = [*names, "m"], [*inputs, ("m", *mask)]
    if past:
        names, outputs = [*names, *["", "pk", "pv"][len(names) - 3 :]], ["y", "nk", "nv"]
        inputs += [("pk", dtype, shapes["k"]), ("pv", dtype, shapes["v"])]
    if lengths:
        names, inputs = [*names, *[""] * (6 - len(names)), "n"], [*inputs, ("n", INT64, [1])]
    more = [("nk", dtype, None), ("nv", dtype, None)] if past else []
    return model([node("Attention", names, outputs, **attributes)], inputs, ("y", dtype), more_outputs=more)


def scatter(
    dtype: int = HALF,
    length: Any = 32,
    inner_input: bool = False,
    inner_output: bool = False,
    **attributes: Any,
) -> onnx.ModelProto:
    nodes = [node("TensorScatter", ["c", "u", "w"], ["cu"], **{"axis": -2, **attributes})]
    name = "c"
    if inner_input:
        nodes, name = [node("Relu", ["c0"], ["c"]), *nodes], "c0"
    if inner_output:
        nodes = [*nodes, node("Relu", ["cu"], ["z"])]
    heads_last = attributes.get("axis") == 1
    shapes = ([1, length, 4, 64], [1, 1, 4, 64]) if heads_last else ([1, 4, length, 64], [1, 4, 1, 64])
    inputs = [(name, dtype, shapes[0]), ("u", dtype, shapes[1]), ("w", INT64, [1])]
    return model(nodes, inputs, ("z" if inner_output else "cu", dtype))


def quantized(
    dtype: Any = np.float16, scale: Any = 0.1, zero: Any = 0, codes: Any = np.int8, weight_scale: Any = None,
    weight_dtype: Any = None, **weight: Any,
) -> onnx.ModelProto:  # fmt: skip
    """A quantized linear layer of 32 inputs and 8 outputs; ``zero`` None leaves the zero point out."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    constants = {
        "s": np.asarray(scale, dtype), "w": np.ones((32, 8), weight_dtype or codes),
        "ws": np.full(8, 0.1, dtype) if weight_scale is None else weight_scale,
    }  # fmt: skip
    ends = [] if zero is None else ["z"]
    if zero is not None:
        constants["z"] = zero if isinstance(zero, np.ndarray) else np.asarray(zero).astype(codes)
    nodes = [
        node("QuantizeLinear", ["x", "s", *ends], ["q"], "quantize"),
        node("DequantizeLinear", ["q", "s", *ends], ["dx"], "dequantize"),
        node("DequantizeLinear", ["w", "ws"], ["dw"], "weight", **({"axis": 1} | weight)),
        node("MatMul", ["dx", "dw"], ["y"], "product"),
    ]
    return model(nodes, [("x", kind, [4, 32])], ("y", kind), constants)


def weight_only(
    codes: Any, scales: Any, columns: int = 8, dtype: Any = np.float16, **attributes: Any
) -> onnx.ModelProto:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes = [
        node("DequantizeLinear", ["w", "ws"], ["dw"], "weight", **attributes),
        node("MatMul", ["x", "dw"], ["y"], "product"),
    ]
    constants = {"w": np.ones((32, columns), codes), "ws": scales}
    return model(nodes, [("x", kind, [4, 32])], ("y", kind), constants)


def conv(dtype: int = HALF, weight: Any = np.float16, shape: Sequence[Any] = (1, 3, 8, 8)) -> onnx.ModelProto:
    kernel = np.ones((4, 3, *[3] * (len(shape) - 2)), weight)
    return model([node("Conv", ["x", "w"], ["y"])], [("x", dtype, list(shape))], ("y", dtype), {"w": kernel})


def rope(positions: int = INT64) -> onnx.ModelProto:
    tables = {name: np.ones((64, 32), np.float16) for name in ("c", "s")}
    inputs = [("x", HALF, [1, 4, 16, 64]), ("p", positions, [1, 16])]
    return model([node("RotaryEmbedding", ["x", "c", "s", "p"], ["y"])], inputs, ("y", HALF), tables)


def norm(
    operator: str, weight: Any = np.float16, outputs: Sequence[str] = ("y",), **attributes: Any
) -> onnx.ModelProto:
    names = ["w", "b"] if operator == "LayerNormalization" else ["w"]
    constants = {name: np.ones(8, weight) for name in names}
    more = [(name, FLOAT, None) for name in outputs[1:]]
    made = node(operator, ["x", *names], list(outputs), axis=-1, **attributes)
    return model([made], [("x", HALF, [2, 4, 8])], ("y", HALF), constants, more_outputs=more)


def resize(**attributes: Any) -> onnx.ModelProto:
    scales = {"sc": np.array([1, 1, 2, 2], np.float32)}
    return model(
        [node("Resize", ["x", "", "sc"], ["y"], **attributes)],
        [("x", HALF, [1, 3, 8, 8])],
        ("y", HALF),
        scales,
    )


def shaped_by_input(operator: str, size: int = 2, **constants: Any) -> onnx.ModelProto:
    names = ["x", "s", *constants]
    inputs = [("x", HALF, [4, 4]), ("s", INT64, [size])]
    return model([node(operator, names, ["y"])], inputs, ("y", HALF), constants)


def pooled(**attributes: Any) -> onnx.ModelProto:
    return model(
        [node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], **attributes)],
        [("x", FLOAT, [1, 3, 8, 8])],
        ("y", FLOAT),
    )


MASK = (BOOL, [1, 1, 16, 16])
FOUR_BIT_SCALES = np.full((2, 8), 0.1, np.float16)
ONES = np.full(8, 0.1, np.float16)

CASES: dict[str, Case] = {
    # Files that must pass.
    "attention in half": Case(attention()),
    "attention in bfloat16": Case(attention(BFLOAT)),
    "attention with a mask": Case(attention(mask=MASK)),
    "attention with a bias": Case(attention(mask=(HALF, [1, 4, 16, 16]))),
    "causal attention": Case(attention(is_causal=1)),
    "grouped attention": Case(attention(kv_heads=2)),
    "attention with heads of 256": Case(attention(head=256)),
    "cache": Case(scatter()),
    "cache in float32": Case(scatter(FLOAT)),
    "RoPE": Case(rope()),
    "RMSNorm": Case(norm("RMSNormalization")),
    "LayerNorm": Case(norm("LayerNormalization")),
    "linear resize": Case(resize(mode="linear")),
    "GELU": Case(unary("Gelu", HALF)),
    "int8 layer": Case(quantized()),
    "int8 layer in float32": Case(quantized(np.float32)),
    "float8 layer": Case(quantized(codes=FLOAT8)),
    "4-bit weights in blocks": Case(weight_only(INT4, FOUR_BIT_SCALES, axis=0, block_size=16)),
    "int8 weights": Case(weight_only(np.int8, ONES, axis=1)),
    "float8 weights": Case(weight_only(FLOAT8, ONES, axis=1)),
    "convolution": Case(conv()),
    "1-D convolution": Case(conv(shape=(1, 3, 8))),
    "integers": Case(unary("Neg", INT64)),
    "Hardmax": Case(unary("Hardmax")),
    "bfloat16 on Ampere": Case(unary("Relu", BFLOAT), sm=86),
    # What the parser takes, though the documentation says otherwise.
    "activation with scales per channel": Case(
        quantized(scale=np.full(32, 0.1), zero=np.zeros(32, np.int8)), ("activation-scales",)
    ),
    "weight scaled along its inputs": Case(
        quantized(weight_scale=np.full(32, 0.1, np.float16), axis=0), ("scale-axis",)
    ),
    "int8 in blocks": Case(weight_only(np.int8, FOUR_BIT_SCALES, axis=0, block_size=16), ("block",)),
    # What is taken, but changed.
    "no zero point": Case(quantized(zero=None), ("zero-point",)),
    "lengths without a mask": Case(attention(lengths=True), ("attention-lengths",)),
    "unused input": Case(
        model([node("Relu", ["x"], ["y"])], [("x", FLOAT, [4]), ("z", FLOAT, [4])], ("y", FLOAT)),
        ("unused-input",),
    ),
    # What is refused.
    "attention in float32": Case(attention(FLOAT), ("attention-float32",)),
    "attention with heads of 512": Case(attention(head=512), ("attention-head",)),
    "attention with past": Case(attention(past=True), ("attention-past", "outputs")),
    "attention with softcap": Case(attention(softcap=30.0), ("attention-softcap",)),
    "causal attention with a mask": Case(attention(mask=MASK, is_causal=1), ("attention-mask",)),
    "mask of another float": Case(attention(mask=(FLOAT, [1, 4, 16, 16])), ("attention-mask",)),
    "cache along the heads": Case(scatter(axis=1), ("cache-axis",)),
    "cache of dynamic length": Case(scatter(length="batch"), ("cache-length",)),
    "cache made inside": Case(scatter(inner_input=True), ("cache-input",)),
    "cache kept inside": Case(scatter(inner_output=True), ("cache-output",)),
    "LayerNorm with its mean": Case(norm("LayerNormalization", outputs=("y", "m")), ("outputs",)),
    "LayerNorm with other weights": Case(norm("LayerNormalization", np.float32), ("mixed-types",)),
    "antialiased resize": Case(resize(mode="linear", antialias=1), ("antialias",)),
    "unknown operator": Case(unary("Det", shape=[2, 4, 4]), ("operator",)),
    "integer product": Case(
        model(
            [node("MatMulInteger", ["x", "w"], ["y"])],
            [("x", TensorProto.INT8, [4, 32])],
            ("y", TensorProto.INT32),
            {"w": np.ones((32, 8), np.int8)},
        ),
        ("operator",),
    ),
    "dynamic quantization": Case(
        model(
            [node("DynamicQuantizeLinear", ["x"], ["y", "s", "z"])],
            [("x", FLOAT, [4, 32])],
            ("y", TensorProto.UINT8),
        ),
        ("operator",),
    ),
    "contrib operator": Case(
        model(
            [node("SkipLayerNormalization", ["x", "x", "w"], ["y"], domain="com.microsoft")],
            [("x", HALF, [1, 4, 8])],
            ("y", HALF),
            {"w": np.ones(8, np.float16)},
        ),
        ("domain",),
    ),
    "custom operator": Case(
        model([node("Mine", ["x"], ["y"], domain="me")], [("x", HALF, [4])], ("y", HALF)), ("domain",)
    ),
    "int16": Case(unary("Identity", TensorProto.INT16), ("type",)),
    "unsigned 32": Case(unary("Identity", TensorProto.UINT32), ("type",)),
    "uint8 computed with": Case(unary("Relu", TensorProto.UINT8), ("uint8",)),
    "mixed addition": Case(pair("Add", FLOAT, HALF), ("mixed-types",)),
    "mixed product": Case(pair("MatMul", FLOAT, HALF), ("mixed-types",)),
    "integer MatMul": Case(pair("MatMul", TensorProto.INT32, TensorProto.INT32), ("float-only",)),
    "mixed convolution": Case(conv(weight=np.float32), ("mixed-types",)),
    "dynamic channels": Case(conv(shape=(1, "batch", 8, 8)), ("conv-channels",)),
    "shape from an input": Case(shaped_by_input("Reshape"), ("shape-input",)),
    "repeats from an input": Case(shaped_by_input("Tile"), ("shape-input",)),
    "axes from an input": Case(shaped_by_input("Unsqueeze", 1), ("shape-input",)),
    "adding ScatterND": Case(
        model(
            [node("ScatterND", ["x", "i", "u"], ["y"], reduction="add")],
            [("x", FLOAT, [4, 8]), ("i", INT64, [2, 1]), ("u", FLOAT, [2, 8])],
            ("y", FLOAT),
        ),
        ("scatter-reduction",),
    ),
    "training BatchNorm": Case(
        model(
            [node("BatchNormalization", ["x", *"abcd"], ["y", "m", "v"], training_mode=1)],
            [("x", FLOAT, [1, 3, 4, 4])],
            ("y", FLOAT),
            {name: np.ones(3, np.float32) for name in "abcd"},
        ),
        ("training",),
    ),
    "dilated pooling": Case(pooled(dilations=[2, 2]), ("pool-dilation",)),
    "zero point of 3": Case(quantized(zero=3), ("zero-point",)),
    "uint8 codes": Case(quantized(codes=np.uint8, weight_dtype=np.int8), ("codes",)),
    "uint8 weights": Case(weight_only(np.uint8, ONES, axis=1), ("codes",)),
    "4-bit unsigned weights": Case(
        weight_only(np.dtype("uint4"), FOUR_BIT_SCALES, axis=0, block_size=16), ("type", "codes")
    ),
    "float8 of the other kind": Case(quantized(codes=FLOAT8_E5M2), ("type", "codes")),
    "int32 codes": Case(weight_only(np.int32, np.asarray(0.1, np.float16)), ("codes",)),
    "scale of zero": Case(quantized(scale=0.0), ("scale",)),
    "negative scale": Case(quantized(weight_scale=-ONES), ("scale",)),
    "scale that is no number": Case(quantized(weight_scale=np.full(8, np.nan, np.float16)), ("scale",)),
    "scale of another float": Case(quantized(weight_scale=np.full(8, 0.1, np.float32)), ("mixed-types",)),
    "float8 on Ampere": Case(quantized(codes=FLOAT8), ("capability",), sm=86),
    "bfloat16 on Turing": Case(unary("Relu", BFLOAT), ("capability",), sm=75),
}
