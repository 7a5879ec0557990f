"""LoRA adapters as inputs of a graph: each linear layer adds ``x A B`` (arXiv 2106.09685).

The matrices of a layer are two optional inputs, which ONNX Runtime calls overridable initializers
and its ``LoraAdapter`` fills. Their default has rank 0, so that the layer adds zeros.
"""

from __future__ import annotations

from torch.fx import Node

from dsvl_export.compilers.lowering import arguments, fake_tensor, numpy_dtype
from dsvl_export.compilers.onnx.context import Lowering
from dsvl_export.compilers.onnx.quantization import DEQUANTIZE
from runtimes.backends.onnxruntime_adapters import down_name, up_name


def add_adapter(context: Lowering, node: Node, x: Node, out: str) -> str:
    """Add the change of an adapter to the output of a linear layer.

    Args:
        context: the lowering.
        node: the linear layer.
        x: its input; the adapter reads it before it is quantized.
        out: its output.
    """
    graph, name = context.graph, context.name(node)
    layer, dtype = name.rpartition("/")[0], numpy_dtype(fake_tensor(node).dtype)
    inputs, outputs = (int(fake_tensor(item).shape[-1]) for item in (x, node))
    rank = f"{layer}.rank"
    down = graph.optional_input(down_name(layer), dtype, (inputs, rank))
    up = graph.optional_input(up_name(layer), dtype, (rank, outputs))
    if x.target in DEQUANTIZE:
        x = arguments(arguments(x)[0])[0]
    inside = graph.node("MatMul", [context.value(x), down], f"{name}_down")  # [B, S, r]
    change = graph.node("MatMul", [inside, up], f"{name}_up")
    return graph.node("Add", [out, change], f"{name}_adapted")
