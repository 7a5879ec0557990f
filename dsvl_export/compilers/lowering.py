"""The base of every lowering of an ExportedProgram: values of nodes, and evaluation of constants.

A value that depends only on weights and constants is not lowered. It is evaluated when the artifact
is written, so that weights stream from the checkpoint one at a time.
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
from calibration.quantized_weights import LoadParameter
from reference.trace import TracedComponent
from runtimes.bundle.contracts import TensorSpec

aten, qd = torch.ops.aten, torch.ops.quantized_decomposed
# Operators on a weight, its scales and zero points ``[out, ...]`` that are computed in parts.
BY_ROWS = {qd.quantize_per_channel.default, qd.quantize_per_channel_group.default}


@dataclass(frozen=True)
class Constant:
    """A value that is computed when it is loaded, without running the graph."""

    name: str
    load: Callable[[], Tensor]


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as codes ``[out, in, ...]`` and scales ``[out]`` or ``[out, in / group]``.

    Args:
        codes: the codes.
        scale: the scales.
        shape: shape of the weight.
        bits: 4 or 8.
        dtype: dtype of the codes, numpy's or ml_dtypes'.
        group: inputs that share a scale; None has one scale per output channel.
    """

    codes: Constant
    scale: Constant
    shape: tuple[int, ...]
    bits: int
    dtype: np.dtype[Any]
    group: int | None = None


@dataclass(frozen=True)
class PaletteWeight:
    """A weight as indices ``[out, in]`` into palettes ``[out / group, entries]``.

    Args:
        codes: the indices.
        palettes: the palettes.
        shape: shape of the weight.
        entries: number of palettes, and numbers in each.
    """

    codes: Constant
    palettes: Constant
    shape: tuple[int, ...]
    entries: tuple[int, int]


class ProgramLowering(ABC):
    """Lower a program node by node and keep the value of each node.

    A value is a ``Constant``, a ``QuantizedWeight``, a ``PaletteWeight``, or whatever the subclass
    makes of a node: one value or a list.

    Args:
        traced: the component.
        load: loads a parameter of the component by name, in any float dtype.
        table: operator → its lowering.
        boundaries: operators that are never evaluated ahead of time, even if all their inputs are
            constant.
    """

    target_format: str  # what programs are lowered to, for messages

    def __init__(
        self,
        traced: TracedComponent,
        load: LoadParameter,
        table: Mapping[Any, Callable[[Any, Node], Any]],
        boundaries: frozenset[Any] = frozenset(),
    ) -> None:
        """Create a lowering with no values; see the class for the arguments."""
        self.traced, self._table, self._boundaries = traced, table, boundaries
        self.scope = ""  # name of the node that is being lowered
        self.scratch: dict[str, Any] = {}  # values that are computed once for all layers
        self._values: dict[Node, Any] = {}
        self._names: set[str] = set()
        self._load = load

    @abstractmethod
    def bind_input(self, spec: TensorSpec, node: Node) -> Any:
        """Create the value of an input or a state."""

    @abstractmethod
    def bind_outputs(self, sources: list[Node]) -> None:
        """Make the values of these nodes the outputs of the contract, in order."""

    def sanitize_name(self, name: str) -> str:
        """Replace the characters that the target format does not allow."""
        return name

    def unique_name(self, name: str) -> str:
        """Reserve a name: ``name``, or ``name_2`` and so on if it is taken."""
        name = candidate = self.sanitize_name(name)
        count = 1
        while candidate in self._names:
            count += 1
            candidate = f"{name}_{count}"
        self._names.add(candidate)
        return candidate

    def lower_program(self) -> None:
        """Lower every node.

        Raises:
            NotImplementedError: the table has no lowering for an operator.
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
                dtype = fake_tensor(node).dtype
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
            name = self.unique_name(f"{self.name(node)}_folded")
            self._values[node] = Constant(name, lambda: self._evaluate(node))
        elif node.target in self._table:
            self._values[node] = self._table[node.target](self, node)
        else:
            self._values[node] = self.lower_unlisted(node)

    def lower_unlisted(self, node: Node) -> Any:
        """Lower a node whose operator is not in the table.

        Raises:
            NotImplementedError: the format has no lowering for the operator.
        """
        raise NotImplementedError(f"no {self.target_format} lowering for {node.target} ({self.name(node)})")

    def _evaluate(self, node: Node) -> Tensor:
        args: Any = torch.fx.map_arg(node.args, lambda source: self._values[source].load())
        target: Any = node.target
        if target not in BY_ROWS:
            return target(*args, **node.kwargs)
        return map_row_chunks(lambda *parts: target(*parts, *args[3:], **node.kwargs), *args[:3])

    def is_constant(self, source: Node) -> bool:
        """Return whether the value of a node is a ``Constant``."""
        return isinstance(self._values[source], Constant)

    def constant(self, source: Node) -> Constant:
        """Return the ``Constant`` of a node.

        Raises:
            NotImplementedError: the value depends on an input.
        """
        value = self._values[source]
        if not isinstance(value, Constant):
            raise NotImplementedError(f"{source.name} must be a weight or a constant")
        return value

    def weight(self, source: Node) -> Any:
        """Return the ``Constant``, ``QuantizedWeight`` or ``PaletteWeight`` of a node."""
        value = self._values[source]
        return value if isinstance(value, (QuantizedWeight, PaletteWeight)) else self.constant(source)

    def channel_weight(self, node: Node, codes: np.dtype[Any]) -> QuantizedWeight:
        """Read the weight of a dequantize operator with one scale per output channel."""
        source, scale = arguments(node)[:2]
        shape = tuple(static_shape(fake_tensor(source).shape))
        return QuantizedWeight(self.constant(source), self.constant(scale), shape, 8, codes)

    def group_weight(self, node: Node) -> QuantizedWeight:
        """Read the 4-bit weight of a dequantize operator with one scale per group of inputs."""
        source, scale = arguments(node)[:2]
        shape = tuple(static_shape(fake_tensor(source).shape))
        group = shape[1] // int(fake_tensor(scale).shape[1])
        codes = np.dtype("int4")
        return QuantizedWeight(self.constant(source), self.constant(scale), shape, 4, codes, group)

    def palette_weight(self, node: Node) -> PaletteWeight:
        """Read the weight of a dequantize operator with palettes."""
        codes, palettes = arguments(node)[:2]
        shape = tuple(static_shape(fake_tensor(codes).shape))
        groups, entries = static_shape(fake_tensor(palettes).shape)
        return PaletteWeight(self.constant(codes), self.constant(palettes), shape, (groups, entries))

    def name(self, node: Node) -> str:
        """Name a node by module path and operator, as in ``layers.0.mlp.down_proj/linear``."""
        stack = node.meta.get("nn_module_stack") or {"": ("", "")}
        path = list(stack.values())[-1][0]
        kind = str(node.target).split(".")[1] if "." in str(node.target) else str(node.target)
        return f"{path}/{kind}" if path else kind


def arguments(node: Node, *defaults: Any) -> list[Any]:
    """Return the positional arguments of a node, with defaults for those that it lacks.

    Args:
        node: a node of the program.
        defaults: defaults of the operator's arguments after the first.
    """
    return [*node.args, *defaults[max(len(node.args) - 1, 0) :]]


def swapped_axes(node: Node) -> list[int]:
    """Return the permutation that a transpose of two axes is."""
    order = list(range(fake_tensor(node).dim()))
    _, first, second = arguments(node)
    order[first], order[second] = order[second], order[first]
    return order


def permuted_axes(node: Node) -> list[int]:
    """Return the permutation of a permute, with axes counted from the front."""
    _, order = arguments(node)
    return [axis % len(order) for axis in order]


def fake_tensor(source: Any) -> Any:
    """Return the fake tensor of a node, which has its shape and dtype."""
    return source.meta["val"]


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """Return the numpy or ml_dtypes dtype of a torch dtype."""
    return np.dtype(str(dtype).removeprefix("torch."))


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Convert a tensor to numpy, float8 and bfloat16 included."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.float8_e4m3fn:  # PyTorch's conversion knows no float8
        return np.asarray(tensor.view(torch.uint8).numpy()).view(numpy_dtype(tensor.dtype))
    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.view(torch.int16).numpy()).view(numpy_dtype(tensor.dtype))
    return np.asarray(tensor.numpy())


def without_weights(name: str) -> Tensor:
    """Return placeholders for scales, for lowerings that need only sizes.

    Scales of activations are 1, because equal scales decide which nodes are shared.

    Raises:
        AssertionError: a weight is loaded.
    """
    if name.endswith("input_scale"):
        return torch.tensor(1.0)
    raise AssertionError(f"the weight {name} was requested where only sizes are computed")


def parameter_bytes(traced: TracedComponent) -> int:
    """Compute the bytes of a component's parameters as stored: codes where quantized."""
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
            tensor = fake_tensor(node)
            total += tensor.numel() * (codes[0] if codes else tensor.dtype.itemsize * 8) // 8
    return total


def _same(value: Tensor) -> Tensor:
    return value


def _load_as(load: LoadParameter, name: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: load(name).to(dtype)


def static_shape(shape: torch.Size) -> list[int]:
    """Convert a shape without open dims to integers."""
    return [int(size) for size in shape]
