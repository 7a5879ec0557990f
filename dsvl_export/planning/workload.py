"""Bytes and operations of a component, from its traced program; no weights are loaded."""

from __future__ import annotations

import operator
from functools import cached_property
from math import ceil, prod
from typing import Any

import torch
from torch.fx import Node

from dsvl_export.compilers.lowering import arguments, without_weights
from dsvl_export.compilers.onnx.builder import Graph, Initializer
from dsvl_export.compilers.onnx.dialect_ort import MAX_BLOCK_SCORES, OrtDialect, sum_of_positions
from dsvl_export.compilers.onnx.dialect_standard import attention_inputs
from dsvl_export.compilers.onnx.lower import lower
from dsvl_export.targets.targets import WEIGHT_BITS
from reference.trace import TracedComponent
from runtimes.chain import PREFILL_CHUNK

aten = torch.ops.aten
# Operators whose output shares the memory of their input in every runtime.
VIEWS = {aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default, operator.getitem}
SCALE_BYTES = 2
INT4_BLOCK = 128


class Workload:
    """A traced component; its methods take the precision and the sizes of the call."""

    def __init__(self, traced: TracedComponent) -> None:
        """Prepare a traced component, on fake or real tensors."""
        self.traced = traced
        self._symbols = _symbols(traced)
        self._nodes = [node for node in traced.program.graph.nodes if node.op == "call_function"]

    @cached_property
    def graph(self) -> Graph:
        """The ONNX graph without values; every backend stores its constants."""
        return lower(self.traced, without_weights, OrtDialect())

    def weight_bytes(self, precision: str) -> int:
        """Return the bytes of weights and constants in a precision.

        Below 16 bits, this applies to weights of linear layers and convolutions; scales are
        included.
        """
        quantized = _matrices(self.graph) if WEIGHT_BITS[precision] <= 8 else {}
        return sum(
            _quantized_bytes(item, quantized[name], precision) if name in quantized else item.nbytes
            for name, item in self.graph.initializers.items()
        )

    def operations(self, **sizes: int) -> int:
        """Return the multiplications and additions of one call.

        Args:
            **sizes: the named dims of the contract: batch, sequence, rows, capacity. Attention
                reads the whole capacity.
        """
        return sum(self._node_operations(node, sizes) for node in self._nodes)

    def activation_bytes(self, max_scores: int | None = None, **sizes: int) -> int:
        """Return the largest sum of live intermediate tensors of one call, in the program's order.

        Scores and probabilities of attention count as tensors, since ONNX Runtime on a CPU and
        every runtime without a fused kernel store them. Tensors that depend on weights alone do not
        count.

        Args:
            max_scores: largest number of scores in memory at a time, for runtimes that process
                queries in blocks; None is all of them.
            **sizes: the named dims of the contract.
        """
        last_use: dict[Node, int] = {}
        for place, node in enumerate(self._nodes):
            for source in node.all_input_nodes:
                last_use[_owner(source)] = place
        (output,) = self.traced.program.graph.find_nodes(op="output")
        for source in output.all_input_nodes:
            last_use[_owner(source)] = len(self._nodes)
        live, peak = 0, 0
        expiring: dict[int, int] = {}
        for place, node in enumerate(self._nodes):
            allocates = node in self._varying and node.target not in VIEWS
            own = self._bytes(node, sizes) if allocates else 0
            if max_scores and node in self._positions:
                own = min(own, max_scores * node.meta["val"].element_size())
            live += own
            peak = max(peak, live + self._attention_bytes(node, max_scores, sizes))
            if own:
                end = last_use.get(node, place)
                expiring[end] = expiring.get(end, 0) + own
            live -= expiring.pop(place, 0)
        return peak

    @cached_property
    def _varying(self) -> set[Node]:
        """Nodes that depend on an input or a state, not on weights alone."""
        inputs = set(map(str, self.traced.program.graph_signature.user_inputs))
        varying: set[Node] = set()
        for node in self.traced.program.graph.nodes:
            if node.name in inputs or varying.intersection(node.all_input_nodes):
                varying.add(node)
        return varying

    @cached_property
    def _positions(self) -> set[Node]:
        """Sums of relative positions of rows and columns, which are as large as the scores."""
        attentions = (n for n in self._nodes if n.target is aten.scaled_dot_product_attention.default)
        biases = (bias for node in attentions for bias in attention_inputs(node)[1])
        return {node for bias in biases if (node := sum_of_positions(bias))}

    def _shape(self, value: Any, sizes: dict[str, int]) -> list[int]:
        """Return the shape of a fake tensor with its symbols replaced by sizes."""
        values = {symbol: sizes[name] for symbol, name in self._symbols.items()}
        return [dim if isinstance(dim, int) else int(dim.node.expr.subs(values)) for dim in value.shape]

    def _bytes(self, node: Node, sizes: dict[str, int]) -> int:
        values = node.meta["val"]
        values = values if isinstance(values, (tuple, list)) else [values]
        return sum(
            prod(self._shape(value, sizes)) * value.element_size() for value in values if value is not None
        )

    def _attention(self, node: Node, sizes: dict[str, int]) -> tuple[int, int, int] | None:
        """Return batch × heads, queries × keys, and head size of an attention node.

        None for others.
        """
        if node.target is aten.scaled_dot_product_attention.default:
            batch, heads, queries, head = self._input(node, 0, sizes)
            return batch * heads, queries * queries, head
        if node.target is torch.ops.dsvl.cached_attention.default:
            batch, queries, width = self._input(node, 0, sizes)
            *_, capacity, head = self._input(node, 6, sizes)
            return batch * (width // head), queries * capacity, head
        return None

    def _attention_bytes(self, node: Node, max_scores: int | None, sizes: dict[str, int]) -> int:
        """Return the bytes of scores and probabilities of an attention node; 0 for others."""
        attention = self._attention(node, sizes)
        if attention is None:
            return 0
        rows, scores, _ = attention
        return int(2 * min(rows * scores, max_scores or rows * scores) * node.meta["val"].element_size())

    def _node_operations(self, node: Node, sizes: dict[str, int]) -> int:
        attention = self._attention(node, sizes)
        if attention:
            return 4 * prod(attention)
        if node.target in (aten.linear.default, aten.matmul.default):
            inner = self._input(node, 0, sizes)[-1]
        elif node.target is aten.conv2d.default:
            inner = prod(self._input(node, 1, sizes)[1:])
        else:
            return 0
        return 2 * inner * prod(self._shape(node.meta["val"], sizes))

    def _input(self, node: Node, position: int, sizes: dict[str, int]) -> list[int]:
        return self._shape(arguments(node)[position].meta["val"], sizes)


def activation_bytes(workload: Workload, backend: str, prompt: int, capacity: int) -> int:
    """Return the largest bytes of intermediate tensors for one image or one sequence.

    Args:
        workload: the component.
        backend: decides whether attention runs in blocks.
        prompt: number of prompt tokens; a decode call reads at most a chunk of them.
        capacity: of the KV cache, in tokens.
    """
    max_scores = MAX_BLOCK_SCORES if backend == "onnxruntime" else None
    if not workload.traced.contract.states:
        return workload.activation_bytes(max_scores, batch=1)
    chunk = min(PREFILL_CHUNK, prompt, capacity)
    return workload.activation_bytes(None, batch=1, sequence=chunk, rows=1, capacity=capacity)


def activation_growth(workload: Workload, backend: str, longest: int) -> tuple[int, int]:
    """Return an upper bound of ``activation_bytes``: a constant, and bytes per token of capacity.

    The sum of live tensors grows at most linearly, so that the line between the smallest and the
    largest capacity lies above it.

    Args:
        workload: the component.
        backend: decides whether attention runs in blocks.
        longest: the largest capacity, in tokens.
    """
    least = min(PREFILL_CHUNK, longest)
    low, high = (activation_bytes(workload, backend, least, capacity) for capacity in (least, longest))
    slope = ceil((high - low) / max(longest - least, 1))
    return max(low - slope * least, 0), slope


def _symbols(traced: TracedComponent) -> dict[Any, str]:
    """Return the symbols of the program and their names in the contract."""
    specs = traced.contract.inputs + traced.contract.states
    names = traced.program.graph_signature.user_inputs
    values = {node.name: node.meta["val"] for node in traced.program.graph.nodes if node.op == "placeholder"}
    return {
        size.node.expr: dim
        for spec, name in zip(specs, names, strict=True)
        for dim, size in zip(spec.shape, values[str(name)].shape, strict=True)
        if isinstance(dim, str)
    }


def _owner(node: Node) -> Node:
    """Return the node whose memory a view shares."""
    while node.target in VIEWS:
        node = node.all_input_nodes[0]
    return node


def _matrices(graph: Graph) -> dict[str, int]:
    """Return the weights that quantization applies to, and their numbers of output channels."""
    channels = {"MatMul": -1, "Conv": 0}  # the axis; weights of linear layers are stored transposed
    return {
        name: graph.initializers[name].shape[channels[node.op_type]]
        for node in graph.nodes
        if node.op_type in channels
        for name in [node.input[1]]
        if name in graph.initializers and "folded" not in name
    }


def _quantized_bytes(item: Initializer, channels: int, precision: str) -> int:
    """Return the bytes of a weight and its scales.

    int4 has a scale for each ``INT4_BLOCK`` weights, other precisions one for each output channel.
    """
    count = prod(item.shape)
    scales = count / INT4_BLOCK if precision == "int4" else channels
    return int(count * WEIGHT_BITS[precision] / 8 + scales * SCALE_BYTES)
