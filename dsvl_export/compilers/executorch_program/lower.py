"""A traced component as a method that XNNPACK runs in as few partitions as possible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node

import calibration.quantized_program  # noqa: F401 -- registers the operators
from calibration.quantized_weights import LoadParameter
from dsvl_export.compilers.aten_program import AtenLowering, Lower
from dsvl_export.compilers.executorch_program import xnnpack_operators as xnnpack
from dsvl_export.compilers.lowering import Constant, arguments, aten, fake_tensor
from reference.trace import TracedComponent
from runtimes.backends.executorch import largest_chunk
from runtimes.bundle.contracts import TensorSpec

qd, dsvl = torch.ops.quantized_decomposed, torch.ops.dsvl


@dataclass(frozen=True)
class Method:
    """A module and the arguments that it is exported with.

    Args:
        module: the module.
        examples: example inputs.
        dynamic: axis → open dim, for each input.
    """

    module: nn.Module
    examples: tuple[Tensor, ...]
    dynamic: tuple[dict[int, Any], ...]

    def program(self) -> ExportedProgram:
        """Export the module."""
        with torch.no_grad():
            return torch.export.export(self.module, self.examples, dynamic_shapes=self.dynamic, strict=False)


def build_method(traced: TracedComponent, load: LoadParameter, capacity: int) -> Method:
    """Build the method of a traced component and load its weights.

    The decoder takes ``inputs_embeds [1, S, D]`` and ``cache_position [S]`` int64, S open, and
    returns the logits ``[1, 1, V]`` of the last token. Its KV cache is held in buffers ``[1, C,
    Hkv, Dh]`` with the contract's names.

    Args:
        traced: the component.
        load: loads a parameter by name.
        capacity: C, the capacity of the KV cache.
    """
    lowering = MethodLowering(traced, load, capacity)
    lowering.lower_program()
    lowering.graph.eliminate_dead_code()
    module = GraphModule(lowering.root, lowering.graph).eval()
    return Method(module, tuple(lowering.examples), tuple(lowering.dynamic))


class MethodLowering(AtenLowering):
    """Lower a component for one sequence or image, and keep example inputs and their open dims.

    Args:
        traced: the component.
        load: loads a parameter by name.
        capacity: tokens of the KV cache.
    """

    def __init__(self, traced: TracedComponent, load: LoadParameter, capacity: int) -> None:
        """Create an empty program; see the class for the arguments."""
        sizes = {"batch": 1, "sequence": min(5, capacity), "rows": 1, "capacity": capacity}
        super().__init__(traced, load, sizes, TABLE, BOUNDARIES, "ExecuTorch", {})
        self.capacity = capacity
        self.examples: list[Tensor] = []
        self.dynamic: list[dict[int, Any]] = []
        self.cache_position: Node | None = None

    def bind_input(self, spec: TensorSpec, node: Node) -> Any:
        """Add a buffer for a state or a placeholder for an input.

        The value of ``positions`` is the first position, as a number.
        """
        example = self.example(spec)
        if spec in self.traced.contract.states:
            batch, heads, capacity, head_dim = example.shape
            # New memory: with one head, a transposed state keeps strides that ExecuTorch refuses.
            return self._registered(spec.name, example.new_zeros(batch, capacity, heads, head_dim))
        if spec.name == "logit_rows":
            return None
        sequence = Dim("sequence", min=1, max=largest_chunk(self.capacity))
        if spec.name == "positions":
            self.cache_position = self.graph.placeholder("cache_position")
            self.examples.append(torch.arange(example.shape[1]))
            self.dynamic.append({0: sequence})
            return self.call(xnnpack.first_position, self.cache_position, self.capacity)
        self.examples.append(example)
        self.dynamic.append({1: sequence} if "sequence" in spec.shape else {})
        return self.graph.placeholder(spec.name)

    def call_once(self, target: Any, *args: Any) -> Node:
        """Add a call, or return the node of an equal call."""
        key = f"{target}{args}"
        if key not in self.scratch:
            self.scratch[key] = self.call(target, *args)
        found: Node = self.scratch[key]
        return found

    def mean_and_eps(self, like: Any, eps: float) -> tuple[Node, Node]:
        """Add the constants of a norm over C channels.

        Returns:
            The matrix ``[1, C]`` whose product with ``[..., C]`` is the mean, and the number
            ``[1]`` that is added to a mean.
        """
        width = int(fake_tensor(like).shape[-1])
        mean = self.buffer(f"mean_of_{width}", lambda: torch.full((1, width), 1 / width))
        return mean, self.buffer(f"eps_{eps}", lambda: torch.tensor([eps]))

    def add_buffer(self, constant: Constant, part: Part | None, dtype: torch.dtype) -> Node:
        """Add a weight, a bias, codes or scales as a buffer, or the selected rows of them."""
        if part is None:
            return self.buffer(f"{constant.name}_{dtype}", lambda: constant.load().to(dtype))
        name = f"{constant.name}_{part.index}_of_{part.count}_{dtype}"
        return self.buffer(name, lambda: part.select(constant.load()).to(dtype))

    def weight_operand(self, source: Any, part: Part | None) -> Node:
        """Add a weight ``[out, in]``, dequantized where it is quantized, or its selected rows."""
        weight, dtype = self.weight(source), fake_tensor(source).dtype
        if isinstance(weight, Constant):
            return self.add_buffer(weight, part, dtype)
        codes = self.add_buffer(weight.codes, part, torch.int8)
        scale = self.add_buffer(weight.scale, part, torch.float32)
        shape = self.root.get_buffer(str(scale.target)).shape
        name = "zeros_" + "x".join(map(str, shape))
        zeros = self.buffer(name, lambda: torch.zeros(shape, dtype=torch.int64))
        if weight.group:
            dequantize, last = qd.dequantize_per_channel_group.default, (weight.group, dtype)
            return self.call(dequantize, codes, scale, zeros, -8, 7, torch.int8, *last)
        args = (codes, scale, zeros, 0, -128, 127, torch.int8)
        return self.graph.call_function(qd.dequantize_per_channel.default, args, {"out_dtype": dtype})


@dataclass(frozen=True)
class Part:
    """A selection of rows of a weight.

    The rows are split into equal blocks, and each block into equal parts; one part of each block is
    selected.

    Args:
        blocks: number of blocks.
        count: parts in each block.
        index: the part that is selected.
    """

    blocks: int
    count: int
    index: int

    def select(self, tensor: Tensor) -> Tensor:
        """Return the selected rows of a tensor."""
        part = tensor.unflatten(0, (self.blocks, self.count, -1))[:, self.index].flatten(0, 1)
        return part.clone()  # XNNPACK writes a view's storage from its beginning


def _projection(lowering: MethodLowering, node: Node) -> Any:
    """Lower a linear layer; a layer whose output is split is computed in parts.

    A split would end a partition. Queries and keys become the first and the second halves of all
    heads, a fused projection becomes its chunks.
    """
    users = list(node.users)
    if all(user.target == dsvl.cached_attention.default and node in user.args[:2] for user in users):
        blocks = int(fake_tensor(node).shape[-1]) // int(fake_tensor(arguments(users[0])[6]).shape[3])
        return [_linear(lowering, node, Part(blocks, 2, half)) for half in range(2)]
    if [user.target for user in users] == [aten.chunk.default]:
        count = arguments(users[0])[1]
        return [_linear(lowering, node, Part(1, count, index)) for index in range(count)]
    return _linear(lowering, node, None)


def _linear(lowering: MethodLowering, node: Node, part: Part | None) -> Node:
    x, weight, *biases = arguments(node)
    buffers = [
        lowering.add_buffer(lowering.constant(bias), part, fake_tensor(bias).dtype) for bias in biases if bias
    ]
    operand = lowering.weight_operand(weight, part)
    return lowering.call(aten.linear.default, lowering.value(x), operand, *buffers)


def _chunk(lowering: MethodLowering, node: Node) -> Any:
    parts = lowering.value(arguments(node)[0])
    return parts if isinstance(parts, list) else lowering.lower_unlisted(node)


def _rms_norm(lowering: MethodLowering, node: Node) -> Node:
    x, _, weight, eps = arguments(node)
    operands = map(lowering.value, (x, weight))
    return lowering.call(xnnpack.rms_norm, *operands, *lowering.mean_and_eps(x, eps))


def _layer_norm(lowering: MethodLowering, node: Node) -> Node:
    x, _, weight, bias, eps = arguments(node, None, None, 1e-5)[:5]
    operands = map(lowering.value, (x, weight, bias))
    return lowering.call(xnnpack.layer_norm, *operands, *lowering.mean_and_eps(x, eps))


def _conv2d(lowering: MethodLowering, node: Node) -> Node:
    """Lower a convolution; its bias is added separately.

    Core ML's delegate confuses the dtypes of the kernel and the bias.
    """
    x, weight, bias, *places = arguments(node, None, None)
    kernel = lowering.value(weight)
    out = lowering.call(aten.conv2d.default, lowering.value(x), kernel, None, *places)
    if bias is None:
        return out
    constant = lowering.constant(bias)
    column = lowering.buffer(f"{constant.name}_column", lambda: constant.load()[:, None, None].clone())
    return lowering.call(aten.add.Tensor, out, column)


def _gelu(lowering: MethodLowering, node: Node) -> Node:
    if node.kwargs.get("approximate") == "tanh":
        return lowering.call(xnnpack.gelu_tanh, lowering.value(arguments(node)[0]))
    return lowering.call(aten.gelu.default, lowering.value(arguments(node)[0]))


def _attention(lowering: MethodLowering, node: Node) -> Node:
    q, k, v, *mask = arguments(node)
    operands = [lowering.value(source) for source in (q, k, v)]
    scale = fake_tensor(q).shape[-1] ** -0.5
    if not mask:
        return lowering.call(xnnpack.attention, *operands, scale)
    by_row, by_column = _shifts(mask[0])
    dtype, images = fake_tensor(q).dtype, _size_for_one_image(fake_tensor(q).shape[0])
    grid = int(fake_tensor(by_row).shape[-1])
    cells = lowering.buffer(
        f"cells_of_{images}_{grid}_{dtype}",
        lambda: xnnpack.grid_one_hot(grid).repeat(images, 1, 1).to(dtype),
    )
    shifts = lowering.value(by_row), lowering.value(by_column)
    return lowering.call(xnnpack.relative_attention, *operands, *shifts, cells, scale)


def _size_for_one_image(size: Any) -> int:
    """Return a size in the vision encoder for batch 1; the batch is its only open dim."""
    if isinstance(size, int):
        return size
    formula = size.node.expr
    return int(formula.subs(dict.fromkeys(formula.free_symbols, 1)))


def _shifts(mask: Any) -> tuple[Any, Any]:
    """Return the two terms ``[B, H, n, n, n]`` of a relative-position bias, by row and by column.

    Raises:
        NotImplementedError: the mask is not such a bias.
    """
    total = mask
    while total.target == aten.flatten.using_ints:
        total = arguments(total)[0]
    if total.target == aten.add.Tensor:
        parts = [arguments(part) for part in arguments(total) if part.target == aten.unsqueeze.default]
        if [axis for _, axis in parts] == [-1, -2]:
            return parts[0][0], parts[1][0]
    raise NotImplementedError(f"no ExecuTorch lowering for attention masked by {mask}")


def _matmul(lowering: MethodLowering, node: Node) -> Node:
    """Lower a product; with a constant it is a linear layer, which needs no copy per channel."""
    x, y = arguments(node)
    if lowering.is_constant(x) and fake_tensor(x).dim() == 2:
        columns = lowering.call(aten.transpose.int, lowering.value(y), -1, -2)
        product = lowering.call(aten.linear.default, columns, lowering.value(x))
        return lowering.call(aten.transpose.int, product, -1, -2)
    if lowering.is_constant(y) and fake_tensor(y).dim() == 2:
        constant = lowering.constant(y)
        matrix = lowering.buffer(f"{constant.name}_transposed", lambda: constant.load().t().clone())
        return lowering.call(aten.linear.default, lowering.value(x), matrix)
    if lowering.is_constant(y) and fake_tensor(x).dim() == 5:
        return lowering.call(xnnpack.relative_scores, lowering.value(x), lowering.value(y))
    return lowering.call(aten.matmul.default, lowering.value(x), lowering.value(y))


def _cached_attention(lowering: MethodLowering, node: Node) -> Node:
    q, k, v, start, cos, sin, keys, values = map(lowering.value, arguments(node))
    place = start, lowering.cache_position
    rows = [lowering.call_once(xnnpack.table_rows, table, *place) for table in (cos, sin)]
    query, key = (lowering.call(xnnpack.rotate_halves, *halves, *rows) for halves in (q, k))
    return lowering.call(xnnpack.cached_attention, query, key, v, start, keys, values)


def _index_select(lowering: MethodLowering, node: Node) -> Node:
    """Select the rows whose logits are needed, which is the last one here."""
    return lowering.call(xnnpack.last_row, lowering.value(arguments(node)[0]))


TABLE: Mapping[Any, Lower] = {
    aten.linear.default: _projection,
    aten.conv2d.default: _conv2d,
    aten.gelu.default: _gelu,
    aten.matmul.default: _matmul,
    aten.chunk.default: _chunk,
    aten.rms_norm.default: _rms_norm,
    aten.layer_norm.default: _layer_norm,
    aten.scaled_dot_product_attention.default: _attention,
    dsvl.cached_attention.default: _cached_attention,
    aten.index_select.default: _index_select,
    qd.dequantize_per_channel.default: lambda low, node: low.channel_weight(node, np.dtype(np.int8)),
    qd.dequantize_per_channel_group.default: lambda low, node: low.group_weight(node),
}
BOUNDARIES = frozenset({qd.dequantize_per_channel.default, qd.dequantize_per_channel_group.default})
