"""A traced component as a method that XNNPACK takes in as few pieces as can be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node

import calibration.quantized  # noqa: F401 -- registers the operators
from dsvl_export.aten_program import AtenLowering, Lower
from dsvl_export.executorch_program import forms
from dsvl_export.lowering import Constant, LoadParameter, QuantizedWeight, arguments, aten, fake
from reference.trace import TracedComponent
from runtimes.contracts import TensorSpec

qd, dsvl = torch.ops.quantized_decomposed, torch.ops.dsvl
MAX_CHUNK = 1024  # tokens of a call: activations are planned for so many


def largest_chunk(capacity: int) -> int:
    """The most tokens of a call of a decoder."""
    return min(MAX_CHUNK, capacity)


class MethodLowering(AtenLowering):
    """As its parent; the decoder takes ``cache_position [S]`` and gives the logits of the last row."""

    def __init__(self, traced: TracedComponent, load: LoadParameter, capacity: int) -> None:
        sizes = {"batch": 1, "sequence": min(5, capacity), "rows": 1, "capacity": capacity}
        super().__init__(traced, load, sizes, TABLE, BOUNDARIES, "ExecuTorch", {})
        self.capacity = capacity
        self.examples: list[Tensor] = []
        self.dynamic: list[dict[int, Any]] = []
        self._sequence = Dim("sequence", min=1, max=largest_chunk(capacity))
        self.cache_position: Node | None = None
        self.start: Node | None = None

    def bind_input(self, spec: TensorSpec, node: Node) -> Any:
        example = self.example(spec)
        if spec in self.traced.contract.states:
            return self._registered(spec.name, example.transpose(1, 2).contiguous())
        if spec.name == "logit_rows":
            return None
        if spec.name == "positions":
            example = torch.arange(example.shape[1])
            self.cache_position = self.graph.placeholder("cache_position")
            self.start = self.call(forms.start_of, self.cache_position, self.capacity)
            self.dynamic.append({0: self._sequence})
        else:
            placeholder = self.graph.placeholder(spec.name)
            self.dynamic.append({1: self._sequence} if "sequence" in spec.shape else {})
        self.examples.append(example)
        return self.start if spec.name == "positions" else placeholder

    def once(self, target: Any, *args: Any) -> Node:
        """A call that others share which make the same one."""
        key = f"{target}{args}"
        if key not in self.scratch:
            self.scratch[key] = self.call(target, *args)
        return self.scratch[key]

    def mean(self, width: int) -> Node:
        return self.buffer(f"mean_of_{width}", lambda: torch.full((1, width), 1 / width))


@dataclass(frozen=True)
class Method:
    """A module with what it is exported with."""

    module: nn.Module
    examples: tuple[Tensor, ...]
    dynamic: tuple[dict[int, Any], ...]

    def program(self) -> ExportedProgram:
        with torch.no_grad():
            return torch.export.export(
                self.module, self.examples, dynamic_shapes=self.dynamic, strict=False
            )


def method(traced: TracedComponent, load: LoadParameter, capacity: int) -> Method:
    """A traced component; its weights are loaded."""
    lowering = MethodLowering(traced, load, capacity)
    lowering.lower_program()
    lowering.graph.eliminate_dead_code()
    module = GraphModule(lowering.root, lowering.graph).eval()
    return Method(module, tuple(lowering.examples), tuple(lowering.dynamic))


@dataclass(frozen=True)
class Part:
    """Rows of a weight: of each of ``blocks`` equal runs of rows the one of ``count`` equal parts."""

    blocks: int
    count: int
    index: int

    def of(self, tensor: Tensor) -> Tensor:
        part = tensor.unflatten(0, (self.blocks, self.count, -1))[:, self.index].flatten(0, 1)
        return part.clone()  # XNNPACK writes a view's storage from its beginning


def _projection(lowering: MethodLowering, node: Node) -> Any:
    """A linear layer; what is cut afterwards is computed in parts, since cutting makes borders.

    Queries and keys become the first and the second halves of all heads, a fused projection its chunks.
    """
    users = list(node.users)
    if all(user.target == dsvl.cached_attention.default and node in user.args[:2] for user in users):
        blocks = fake(node).shape[-1] // fake(users[0].args[6]).shape[3]
        return [_linear(lowering, node, Part(int(blocks), 2, half)) for half in range(2)]
    if [user.target for user in users] == [aten.chunk.default]:
        count = int(users[0].args[1])  # type: ignore[arg-type]
        return [_linear(lowering, node, Part(1, count, index)) for index in range(count)]
    return _linear(lowering, node, None)


def _linear(lowering: MethodLowering, node: Node, part: Part | None) -> Node:
    x, weight, *bias = node.args
    args = [lowering.value(x), _weight(lowering, weight, part)]  # type: ignore[arg-type]
    args += [
        _kept(lowering, lowering.constant(source), part, fake(source).dtype) for source in bias if source
    ]  # type: ignore[arg-type]
    return lowering.call(aten.linear.default, *args)


def _kept(lowering: MethodLowering, constant: Constant, part: Part | None, dtype: torch.dtype) -> Node:
    """A weight, a bias, codes or scales, or the rows of them that are wanted."""
    if part is None:
        return lowering.buffer(f"{constant.name}_{dtype}", lambda: constant.load().to(dtype))
    name = f"{constant.name}_{part.index}_of_{part.count}_{dtype}"
    return lowering.buffer(name, lambda: part.of(constant.load()).to(dtype))


def _weight(lowering: MethodLowering, source: Any, part: Part | None) -> Node:
    weight, dtype = lowering.weight(source), fake(source).dtype
    if isinstance(weight, Constant):
        return _kept(lowering, weight, part, dtype)
    assert isinstance(weight, QuantizedWeight)
    codes = _kept(lowering, weight.codes, part, torch.int8)
    scale = _kept(lowering, weight.scale, part, torch.float32)
    shape = lowering.root.get_buffer(str(scale.target)).shape
    name = "zeros_" + "x".join(map(str, shape))
    zeros = lowering.buffer(name, lambda: torch.zeros(shape, dtype=torch.int64))
    if weight.group:
        limits = (-8, 7, torch.int8, weight.group, dtype)
        return lowering.call(qd.dequantize_per_channel_group.default, codes, scale, zeros, *limits)
    return lowering.call(qd.dequantize_per_channel.default, codes, scale, zeros, 0, -128, 127, torch.int8)


def _chunk(lowering: MethodLowering, node: Node) -> Any:
    parts = lowering.value(arguments(node)[0])
    return parts if isinstance(parts, list) else lowering.other(node)


def _rms_norm(lowering: MethodLowering, node: Node) -> Node:
    x, _, weight, eps = arguments(node)
    mean = lowering.mean(fake(x).shape[-1])
    return lowering.call(forms.rms_norm, lowering.value(x), lowering.value(weight), mean, eps)


def _layer_norm(lowering: MethodLowering, node: Node) -> Node:
    x, _, weight, bias, eps = arguments(node, None, None, 1e-5)[:5]
    mean = lowering.mean(fake(x).shape[-1])
    return lowering.call(forms.layer_norm, *map(lowering.value, (x, weight, bias)), mean, eps)


def _gelu(lowering: MethodLowering, node: Node) -> Node:
    if node.kwargs.get("approximate") == "tanh":
        return lowering.call(forms.gelu_tanh, lowering.value(node.args[0]))  # type: ignore[arg-type]
    return lowering.other(node)


def _attention(lowering: MethodLowering, node: Node) -> Node:
    q, k, v, *mask = node.args
    operands = [lowering.value(source) for source in (q, k, v)]  # type: ignore[arg-type]
    scale = fake(q).shape[-1] ** -0.5
    if not mask:
        return lowering.call(forms.attention, *operands, scale)
    by_row, by_column = _shifts(mask[0])
    dtype, images, grid = fake(q).dtype, _of_one_image(fake(q).shape[0]), int(fake(by_row).shape[-1])
    cells = lowering.buffer(
        f"cells_of_{images}_{grid}_{dtype}",
        lambda: forms.cell_rows(grid).expand(images, -1, -1).to(dtype),
    )
    shifts = lowering.value(by_row), lowering.value(by_column)
    return lowering.call(forms.relative_attention, *operands, *shifts, cells, scale)


def _of_one_image(size: Any) -> int:
    """A size of the vision encoder, whose only open dim is the batch."""
    if isinstance(size, int):
        return size
    formula = size.node.expr
    return int(formula.subs({symbol: 1 for symbol in formula.free_symbols}))


def _shifts(mask: Any) -> tuple[Node, Node]:
    """What a relative-position bias is the sum of, ``[B, H, n, n, n]`` by row and by column.

    Raises:
        NotImplementedError: the mask is another one.
    """
    total = mask
    while isinstance(total, Node) and total.target == aten.flatten.using_ints:
        total = total.args[0]
    parts = total.args[:2] if isinstance(total, Node) and total.target == aten.add.Tensor else ()
    if [getattr(part, "target", None) for part in parts] != [aten.unsqueeze.default] * 2:
        raise NotImplementedError(f"no ExecuTorch lowering for attention masked by {mask}")
    by_row, by_column = parts
    assert by_row.args[1] == -1 and by_column.args[1] == -2
    return by_row.args[0], by_column.args[0]


def _matmul(lowering: MethodLowering, node: Node) -> Node:
    """A product with a constant, which spares a copy of the constant for each channel."""
    x, y = node.args[:2]
    if lowering.is_constant(x) and fake(x).dim() == 2:  # type: ignore[arg-type]
        columns = lowering.call(aten.transpose.int, lowering.value(y), -1, -2)  # type: ignore[arg-type]
        product = lowering.call(aten.linear.default, columns, lowering.value(x))  # type: ignore[arg-type]
        return lowering.call(aten.transpose.int, product, -1, -2)
    if lowering.is_constant(y) and fake(y).dim() == 2:  # type: ignore[arg-type]
        constant = lowering.constant(y)  # type: ignore[arg-type]
        matrix = lowering.buffer(f"{constant.name}_transposed", lambda: constant.load().t().clone())
        return lowering.call(aten.linear.default, lowering.value(x), matrix)  # type: ignore[arg-type]
    if lowering.is_constant(y) and fake(x).dim() == 5:  # type: ignore[arg-type]
        return lowering.call(forms.position_table, lowering.value(x), lowering.value(y))  # type: ignore[arg-type]
    return lowering.other(node)


def _cached_attention(lowering: MethodLowering, node: Node) -> Node:
    q, k, v, start, cos, sin, keys, values = map(lowering.value, node.args)  # type: ignore[arg-type]
    rows = [lowering.once(forms.rows_from, table, start, lowering.cache_position) for table in (cos, sin)]
    query, key = (lowering.call(forms.rotated, *halves, *rows) for halves in (q, k))
    return lowering.call(forms.cached_attention, query, key, v, start, keys, values)


def _index_select(lowering: MethodLowering, node: Node) -> Node:
    x, _, rows = node.args
    if lowering.value(rows) is None:  # type: ignore[arg-type]
        return lowering.call(forms.last_row, lowering.value(x))  # type: ignore[arg-type]
    return lowering.other(node)


TABLE: Mapping[Any, Lower] = {
    aten.linear.default: _projection,
    aten.gelu.default: _gelu,
    aten.matmul.default: _matmul,
    aten.chunk.default: _chunk,
    aten.rms_norm.default: _rms_norm,
    aten.layer_norm.default: _layer_norm,
    aten.scaled_dot_product_attention.default: _attention,
    dsvl.cached_attention.default: _cached_attention,
    aten.index_select.default: _index_select,
    qd.dequantize_per_channel.default: lambda lowering, node: lowering.channel_weight(node, "int8"),
    qd.dequantize_per_channel_group.default: lambda lowering, node: lowering.group_weight(node),
}  # type: ignore[dict-item]
BOUNDARIES = frozenset({qd.dequantize_per_channel.default, qd.dequantize_per_channel_group.default})
