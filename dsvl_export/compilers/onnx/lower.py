"""Lower an ExportedProgram to an ONNX graph, with one Python function per operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from calibration.quantized_weights import LoadParameter
from dsvl_export.compilers.lowering import (
    QuantizedWeight,
    arguments,
    aten,
    fake_tensor,
    numpy_dtype,
    permuted_axes,
    static_shape,
    swapped_axes,
    to_numpy,
)
from dsvl_export.compilers.onnx.adapters import add_adapter
from dsvl_export.compilers.onnx.builder import Graph, element_type
from dsvl_export.compilers.onnx.context import Dialect, Lowering
from dsvl_export.compilers.onnx.quantization import (
    DEQUANTIZE,
    QUANTIZATION,
    dequantize_weight,
    quantized_linear,
)
from reference.trace import TracedComponent

FLOAT32, BFLOAT16 = np.dtype(np.float32), numpy_dtype(torch.bfloat16)
CONV_IN_BFLOAT16 = 22  # the opset that allows it


def _reshape(context: Lowering, node: Node) -> str:
    """Use 0 for an axis whose symbolic size is kept, and -1 for the one that is inferred."""
    (source, *_) = arguments(node)
    before, after = fake_tensor(source).shape, fake_tensor(node).shape
    target: list[int] = []
    for axis, size in enumerate(after):
        if isinstance(size, int):
            target.append(size)
        elif axis < len(before) and str(before[axis]) == str(size):
            target.append(0)
        else:
            target.append(-1)
    if target.count(-1) > 1:
        raise NotImplementedError(f"{context.name(node)} leaves two symbolic dims to infer")
    return context.emit(node, "Reshape", [context.value(source), context.graph.ints(*target)])


def _linear(context: Lowering, node: Node) -> str:
    """Lower ``x @ W^T + b``; stores the weight transposed, so that no consumer has to fold it."""
    x, weight_node, bias = arguments(node, None, None)
    weight = context.weight(weight_node)
    if isinstance(weight, QuantizedWeight):
        out = quantized_linear(context, node, x, weight)
    else:
        rows, columns = static_shape(fake_tensor(weight_node).shape)
        load = weight.load
        transposed = context.graph.initializer(
            f"{weight.name}_transposed",
            numpy_dtype(fake_tensor(weight_node).dtype),
            (columns, rows),
            lambda: to_numpy(load().t()),
        )
        out = context.emit(node, "MatMul", [context.value(x), transposed])
    if bias is not None:
        out = context.graph.node("Add", [out, context.value(bias)], f"{context.name(node)}_bias")
    return add_adapter(context, node, x, out) if context.dialect.takes_adapters else out


def _conv2d(context: Lowering, node: Node) -> str:
    x, weight, bias, stride, padding, dilation, groups = arguments(
        node, None, None, [1, 1], [0, 0], [1, 1], 1
    )
    kernel, name = context.weight(weight), context.name(node)
    inputs = [
        context.value(x),
        dequantize_weight(context, kernel, 0)
        if isinstance(kernel, QuantizedWeight)
        else context.value(weight),
        *([context.value(bias)] if bias is not None else []),
    ]
    dtype = numpy_dtype(fake_tensor(node).dtype)
    widen = dtype == BFLOAT16 and context.dialect.opset < CONV_IN_BFLOAT16
    if widen:
        inputs = [context.cast(value, FLOAT32, f"{name}_float32") for value in inputs]
    attributes = {
        "kernel_shape": static_shape(fake_tensor(weight).shape[2:]), "strides": stride,
        "pads": [*padding, *padding], "dilations": dilation, "group": groups,
    }  # fmt: skip
    out = context.emit(node, "Conv", inputs, attributes)
    return context.cast(out, dtype, f"{name}_cast") if widen else out


def _layer_norm(context: Lowering, node: Node) -> str:
    x, normalized, weight, bias, epsilon = arguments(node)[:5]
    if len(normalized) != 1:
        raise NotImplementedError("LayerNorm over more than the last axis")

    def emit(x: str, *parameters: str) -> str:
        return context.emit(node, "LayerNormalization", [x, *parameters], {"axis": -1, "epsilon": epsilon})

    return _normalized(context, node, x, [weight, bias], emit)


def _rms_norm(context: Lowering, node: Node) -> str:
    x, _, weight, epsilon = arguments(node)

    def emit(x: str, weight: str) -> str:
        return context.dialect.rms_norm(context, x, weight, epsilon, context.name(node))

    return _normalized(context, node, x, [weight], emit)


def _normalized(
    context: Lowering, node: Node, x: Node, parameters: list[Node], emit: Callable[..., str]
) -> str:
    """Lower a norm, in float32 if the dialect requires it.

    Squares overflow in half precision above 65,504.
    """
    dtype = numpy_dtype(fake_tensor(x).dtype)
    if dtype == FLOAT32 or not context.dialect.float32_norms:
        return emit(context.value(x), *(context.value(item) for item in parameters))
    name = context.name(node)
    wide = [context.float32_constant(item) for item in parameters]
    out = emit(context.cast(context.value(x), FLOAT32, f"{name}_float32"), *wide)
    return context.cast(out, dtype, f"{name}_cast")


def _gelu(context: Lowering, node: Node) -> str:
    form = node.kwargs.get("approximate", "none")
    return context.emit(node, "Gelu", [context.value(arguments(node)[0])], {"approximate": form})


def _silu(context: Lowering, node: Node) -> str:
    x = context.value(arguments(node)[0])
    gate = context.graph.node("Sigmoid", [x], f"{context.name(node)}_sigmoid")
    return context.emit(node, "Mul", [x, gate])


def _binary(operator_type: str) -> Callable[[Lowering, Node], str]:
    def lower(context: Lowering, node: Node) -> str:
        if node.kwargs.get("alpha", 1) != 1:
            raise NotImplementedError(f"{node.target} with alpha")
        return context.emit(node, operator_type, [context.operand(node, 0), context.operand(node, 1)])

    return lower


def _permutation(order: Callable[[Node], list[int]]) -> Callable[[Lowering, Node], str]:
    def lower(context: Lowering, node: Node) -> str:
        return context.emit(node, "Transpose", [context.value(arguments(node)[0])], {"perm": order(node)})

    return lower


def _unsqueeze(context: Lowering, node: Node) -> str:
    x, axis = arguments(node)
    axis %= fake_tensor(node).dim()
    return context.emit(node, "Unsqueeze", [context.value(x), context.graph.ints(axis)])


def _chunk(context: Lowering, node: Node) -> list[str]:
    x, count, axis = arguments(node, 0, 0)
    axis %= fake_tensor(x).dim()
    sizes = [int(part.shape[axis]) for part in fake_tensor(node)]
    names = [context.graph.unique_name(f"{context.name(node)}_{index}") for index in range(count)]
    inputs = [context.value(x), context.graph.ints(*sizes)]
    context.graph.node("Split", inputs, context.name(node), {"axis": axis}, outputs=names)
    return names


def _slice(context: Lowering, node: Node) -> str:
    x, axis, start, end = arguments(node, 0, None, None)[:4]
    if (start or 0) == 0 and end is None:
        return context.value(x)
    inputs = [context.value(x), *(context.graph.ints(v) for v in (start or 0, min(end, 1 << 62), axis))]
    return context.emit(node, "Slice", inputs)


def _pad(context: Lowering, node: Node) -> str:
    """PyTorch pads from the last axis backward; ONNX lists all begins, then all ends."""
    x, amounts = arguments(node)[:2]
    rank = fake_tensor(x).dim()
    begins, ends = [0] * rank, [0] * rank
    for index in range(len(amounts) // 2):
        begins[rank - 1 - index], ends[rank - 1 - index] = amounts[2 * index : 2 * index + 2]
    pads = context.graph.initializer(
        "pads_" + "_".join(map(str, begins + ends)), np.dtype(np.int64), (2 * rank,),
        lambda: np.array(begins + ends, dtype=np.int64),
    )  # fmt: skip
    return context.emit(node, "Pad", [context.value(x), pads])


def _cat(context: Lowering, node: Node) -> str:
    parts, axis = arguments(node, 0)
    axis %= fake_tensor(node).dim()
    return context.emit(node, "Concat", [context.value(part) for part in parts], {"axis": axis})


def _index_select(context: Lowering, node: Node) -> str:
    x, axis, index = arguments(node)
    return context.emit(node, "Gather", [context.value(x), context.value(index)], {"axis": axis})


def _cast(context: Lowering, node: Node) -> str:
    source, dtype = arguments(node)[0], fake_tensor(node).dtype
    if fake_tensor(source).dtype == dtype:
        return context.value(source)
    return context.emit(node, "Cast", [context.value(source)], {"to": element_type(numpy_dtype(dtype))})


TABLE: dict[Any, Callable[[Lowering, Node], Any]] = {
    aten.linear.default: _linear,
    aten.conv2d.default: _conv2d,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.gelu.default: _gelu,
    aten.silu.default: _silu,
    aten.matmul.default: _binary("MatMul"),
    aten.add.Tensor: _binary("Add"),
    aten.sub.Tensor: _binary("Sub"),
    aten.mul.Tensor: _binary("Mul"),
    aten.div.Tensor: _binary("Div"),
    aten.flatten.using_ints: _reshape,
    aten.unflatten.int: _reshape,
    aten.transpose.int: _permutation(swapped_axes),
    aten.permute.default: _permutation(permuted_axes),
    aten.unsqueeze.default: _unsqueeze,
    aten.chunk.default: _chunk,
    aten.slice.Tensor: _slice,
    aten.pad.default: _pad,
    aten.cat.default: _cat,
    aten.index_select.default: _index_select,
    aten.to.dtype: _cast,
    aten.scaled_dot_product_attention.default: lambda context, node: context.dialect.attention(context, node),
    torch.ops.dsvl.cached_attention.default: lambda context, node: context.dialect.cached_attention(
        context, node
    ),
    **QUANTIZATION,
}


def lower(traced: TracedComponent, load: LoadParameter, dialect: Dialect) -> Graph:
    """Lower a traced component to an ONNX graph in a dialect; weights are not loaded yet.

    Args:
        traced: the component.
        load: loads a parameter of the component by name, in any float dtype.
        dialect: lowers the operators that have several forms.
    """
    return Lowering(traced, load, dialect, TABLE, DEQUANTIZE).run()
