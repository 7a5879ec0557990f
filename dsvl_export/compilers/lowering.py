"""What every lowering of an ExportedProgram shares: its values, and what needs no graph to be known.

What depends only on weights and constants is not lowered but evaluated when the artifact is written, so
that weights stream from the checkpoint one at a time.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes  # noqa: F401 -- registers float8 and int4 with numpy
import numpy as np
import torch
from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.fx import Node

from calibration.quantized_program import map_row_chunks  # with it, the operators are registered
from reference.trace import TracedComponent
from runtimes.bundle.contracts import TensorSpec

LoadParameter = Callable[[str], Tensor]
aten, qd = torch.ops.aten, torch.ops.quantized_decomposed
# Operators on a weight, its scales and zero points, each ``[out, ...]``, that are computed in parts.
BY_ROWS = {qd.quantize_per_channel.default, qd.quantize_per_channel_group.default}


@dataclass(frozen=True)
class Constant:
    """A value known without running the graph."""

    name: str
    load: Callable[[], Tensor]


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as codes ``[out, in, ...]`` and scales: ``[out]``, or ``[out, in / group]``.

    ``bits`` is 4 or 8, ``dtype`` numpy's (or ml_dtypes') of the codes, ``shape`` the weight's.
    """

    codes: Constant
    scale: Constant
    shape: tuple[int, ...]
    bits: int
    dtype: np.dtype[Any]
    group: int | None = None


@dataclass(frozen=True)
class PaletteWeight:
    """A weight as indices ``[out, in]`` into palettes ``[out / group, entries]``."""

    codes: Constant
    palettes: Constant
    shape: tuple[int, ...]
    entries: tuple[int, int]


class ProgramLowering(ABC):
    """One lowering: what each node of the program became.

    Values are whatever the subclass makes of them, lists of those, ``Constant`` or ``QuantizedWeight``.

    Args:
        load: gives a parameter of the component by its name, in any float dtype.
        table: operator → its lowering.
        boundaries: operators that are never evaluated, though all they read is known.
    """

    form: str  # what programs are lowered to, for messages

    def __init__(
        self,
        traced: TracedComponent,
        load: LoadParameter,
        table: Mapping[Any, Callable[[Any, Node], Any]],
        boundaries: frozenset[Any] = frozenset(),
    ) -> None:
        self.traced, self._table, self._boundaries = traced, table, boundaries
        self.scope = ""  # name of the node that is being lowered
        self.scratch: dict[str, Any] = {}  # values that are computed once for all layers
        self._values: dict[Node, Any] = {}
        self._names: set[str] = set()
        self._load = load

    @abstractmethod
    def bind_input(self, spec: TensorSpec, node: Node) -> Any:
        """The value of an input or a state."""

    @abstractmethod
    def bind_outputs(self, sources: list[Node]) -> None:
        """Give the values of these nodes, one for each output of the contract, to the outside."""

    def spelled(self, name: str) -> str:
        """A name in the letters that the target allows."""
        return name

    def unique(self, name: str) -> str:
        """A name that nothing else has: ``name``, or ``name_2`` and so on where it is taken."""
        name = candidate = self.spelled(name)
        count = 1
        while candidate in self._names:
            count += 1
            candidate = f"{name}_{count}"
        self._names.add(candidate)
        return candidate

    def lower_program(self) -> None:
        """Lower every node.

        Raises:
            NotImplementedError: the program holds an operator that the table lacks.
        """
        self._bind_inputs()
        for node in self.traced.program.graph.nodes:
            if node.op == "call_function":
                self.scope = self.name(node)
                self._lower(node)
            elif node.op == "output":
                self.bind_outputs(arguments(node)[0])

    def _bind_inputs(self) -> None:
        contract, program = self.traced.contract, self.traced.program
        user_specs = iter(contract.inputs + contract.states)
        placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
        for spec in program.graph_signature.input_specs:
            node = placeholders[spec.arg.name]
            if spec.kind == InputKind.USER_INPUT:
                self._values[node] = self.bind_input(next(user_specs), node)
            elif spec.kind == InputKind.PARAMETER:
                dtype = fake(node).dtype
                self._values[node] = Constant(spec.target, _load_as(self._load, spec.target, dtype))
            else:
                value = program.constants[spec.target]
                self._values[node] = Constant(spec.target, partial(_same, value))

    def _lower(self, node: Node) -> None:
        if node.target == aten._assert_tensor_metadata.default:
            return
        if node.target is operator.getitem:
            source, index = arguments(node)
            self._values[node] = self._values[source][index]
        elif node.target not in self._boundaries and all(
            isinstance(self._values[source], Constant) for source in node.all_input_nodes
        ):
            name = self.unique(f"{self.name(node)}_folded")
            self._values[node] = Constant(name, lambda: self._evaluate(node))
        elif node.target in self._table:
            self._values[node] = self._table[node.target](self, node)
        else:
            self._values[node] = self.other(node)

    def other(self, node: Node) -> Any:
        """What the table lacks."""
        raise NotImplementedError(f"no {self.form} lowering for {node.target} ({self.name(node)})")

    def _evaluate(self, node: Node) -> Tensor:
        args: Any = torch.fx.map_arg(node.args, lambda source: self._values[source].load())
        target: Any = node.target
        if target not in BY_ROWS:
            return target(*args, **node.kwargs)
        return map_row_chunks(lambda *parts: target(*parts, *args[3:], **node.kwargs), *args[:3])

    def is_constant(self, source: Node) -> bool:
        return isinstance(self._values[source], Constant)

    def constant(self, source: Node) -> Constant:
        value = self._values[source]
        if not isinstance(value, Constant):
            raise NotImplementedError(f"{source.name} must be a weight or a constant")
        return value

    def weight(self, source: Node) -> Any:
        """A ``Constant``, a ``QuantizedWeight`` or, of a program that has some, a ``PaletteWeight``."""
        value = self._values[source]
        return value if isinstance(value, (QuantizedWeight, PaletteWeight)) else self.constant(source)

    def channel_weight(self, node: Node, codes: np.dtype[Any]) -> QuantizedWeight:
        """The weight of a dequantize operator with a scale per output channel."""
        source, scale = arguments(node)[:2]
        shape = tuple(static(fake(source).shape))
        return QuantizedWeight(self.constant(source), self.constant(scale), shape, 8, codes)

    def group_weight(self, node: Node) -> QuantizedWeight:
        """The weight of a dequantize operator with a scale for each group of inputs, in 4 bits."""
        source, scale = arguments(node)[:2]
        shape = tuple(static(fake(source).shape))
        group = shape[1] // int(fake(scale).shape[1])
        codes = np.dtype("int4")
        return QuantizedWeight(self.constant(source), self.constant(scale), shape, 4, codes, group)

    def palette_weight(self, node: Node) -> PaletteWeight:
        """The weight of a dequantize operator with palettes."""
        codes, palettes = arguments(node)[:2]
        shape, (groups, entries) = tuple(static(fake(codes).shape)), static(fake(palettes).shape)
        return PaletteWeight(self.constant(codes), self.constant(palettes), shape, (groups, entries))

    def name(self, node: Node) -> str:
        """Module path and operator, as in ``layers.0.mlp.down_proj/linear``."""
        stack = node.meta.get("nn_module_stack") or {"": ("", "")}
        path = list(stack.values())[-1][0]
        kind = str(node.target).split(".")[1] if "." in str(node.target) else str(node.target)
        return f"{path}/{kind}" if path else kind


def arguments(node: Node, *defaults: Any) -> list[Any]:
    """Positional arguments of a node, missing ones filled from the end of ``defaults``' full list.

    Args:
        defaults: the operator's arguments after the first; only those that the node lacks are used.
    """
    return [*node.args, *defaults[max(len(node.args) - 1, 0) :]]


def swapped_axes(node: Node) -> list[int]:
    """The permutation that a transpose of two axes is."""
    order = list(range(fake(node).dim()))
    _, first, second = arguments(node)
    order[first], order[second] = order[second], order[first]
    return order


def permuted_axes(node: Node) -> list[int]:
    """The permutation of a permute, counted from the front."""
    _, order = arguments(node)
    return [axis % len(order) for axis in order]


def fake(source: Any) -> Any:
    """The fake tensor of a node: its shape and dtype."""
    return source.meta["val"]


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    return np.dtype(str(dtype).removeprefix("torch."))


def to_numpy(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.float8_e4m3fn:  # PyTorch's conversion knows no float8
        return np.asarray(tensor.view(torch.uint8).numpy()).view(numpy_dtype(tensor.dtype))
    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.view(torch.int16).numpy()).view(numpy_dtype(tensor.dtype))
    return np.asarray(tensor.numpy())


def without_weights(name: str) -> Tensor:
    """A ``load`` for those who only want sizes; scales of activations decide which nodes are shared."""
    if name.endswith("input_scale"):
        return torch.tensor(1.0)
    raise AssertionError(f"only sizes are wanted, but the weight {name} was asked for")


def parameter_bytes(traced: TracedComponent) -> int:
    """Bytes of a component's parameters as its program keeps them, codes for quantized ones."""
    dsvl = torch.ops.dsvl
    bits = {
        qd.quantize_per_channel.default: 8,
        qd.quantize_per_channel_group.default: 4,
        dsvl.quantize_float8.default: 8,
        dsvl.quantize_palette.default: 4,
    }
    names = {spec.arg.name for spec in traced.program.graph_signature.input_specs
             if spec.kind == InputKind.PARAMETER}  # fmt: skip
    total = 0
    for node in traced.program.graph.nodes:
        if node.name in names:
            codes = [bits[user.target] for user in node.users if user.target in bits and user.args[0] is node]
            total += fake(node).numel() * (codes[0] if codes else fake(node).dtype.itemsize * 8) // 8
    return total


def _same(value: Tensor) -> Tensor:
    return value


def _load_as(load: LoadParameter, name: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: load(name).to(dtype)


def static(shape: torch.Size) -> list[int]:
    return [int(size) for size in shape]
