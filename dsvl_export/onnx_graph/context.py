"""The state of a lowering from an ExportedProgram to an ONNX graph, and what its functions share.

What depends only on weights and constants is not emitted but evaluated when the file is written.
The few operators that consumers disagree on are left to the ``Dialect``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol, cast

import ml_dtypes  # noqa: F401 -- registers float8 and int4 with numpy
import numpy as np
import torch
from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.fx import Node

from dsvl_export.onnx_graph.builder import Graph, element_type, value_info
from reference.taps import tap_nodes
from reference.trace import TracedComponent
from runtimes.contracts import TensorSpec

LoadParameter = Callable[[str], Tensor]
Table = Mapping[Any, Callable[["Lowering", Node], Any]]
aten = torch.ops.aten


class Dialect(Protocol):
    """How one consumer wants the operators that have several forms in ONNX."""

    opset: int
    float32_norms: bool  # whether norms of half precision are cast to float32 and back

    def state_output(self, state: TensorSpec) -> TensorSpec:
        """How a state leaves the graph: ``updated_state`` or ``appended_state``."""
        ...

    def rms_norm(self, context: Lowering, x: str, weight: str, epsilon: float, name: str) -> str: ...

    def attention(self, context: Lowering, node: Node) -> str: ...

    def cached_attention(self, context: Lowering, node: Node) -> str: ...

    def weight_only_linear(self, context: Lowering, node: Node, x: str, weight: QuantizedWeight) -> str:
        """``x @ W^T`` where the weight alone is quantized."""
        ...


@dataclass(frozen=True)
class Constant:
    """A value known without running the graph."""

    name: str
    load: Callable[[], Tensor]


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as codes ``[out, in, ...]`` and scales: ``[out]``, or ``[out, in / group]``.

    ``bits`` is 4 or 8, ``dtype`` that of the codes in ONNX, ``shape`` the weight's.
    """

    codes: Constant
    scale: Constant
    shape: tuple[int, ...]
    bits: int
    dtype: np.dtype[Any]
    group: int | None = None


class Lowering:
    """The state of one lowering: the graph so far and what each program node became."""

    def __init__(
        self,
        traced: TracedComponent,
        load: LoadParameter,
        dialect: Dialect,
        table: Table,
        boundaries: frozenset[Any] = frozenset(),
    ) -> None:
        """``table``: operator → its lowering; ``boundaries``: operators that are never evaluated."""
        self.traced, self.dialect, self._table, self._boundaries = traced, dialect, table, boundaries
        self.graph = Graph(traced.contract.component, dialect.opset)
        self.scratch: dict[str, str] = {}  # values that a dialect computes once for all layers
        self._values: dict[Node, Any] = {}  # an ONNX name, a list of names, or a Constant
        self._bind_inputs(load)

    def _bind_inputs(self, load: LoadParameter) -> None:
        contract, program = self.traced.contract, self.traced.program
        user_specs = iter(contract.inputs + contract.states)
        placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
        for spec in program.graph_signature.input_specs:
            node = placeholders[spec.arg.name]
            if spec.kind == InputKind.USER_INPUT:
                tensor = next(user_specs)
                self.graph.inputs.append(value_info(tensor.name, tensor.dtype, tensor.shape))
                name, dtype = self.graph.unique(tensor.name), numpy_dtype(fake(node).dtype)
                border = np.dtype(tensor.dtype) != dtype
                self._values[node] = self.cast(name, dtype, f"{name}_inside") if border else name
            elif spec.kind == InputKind.PARAMETER:
                dtype = fake(node).dtype
                self._values[node] = Constant(spec.target, _load_as(load, spec.target, dtype))
            else:
                value = program.constants[spec.target]
                self._values[node] = Constant(spec.target, partial(_same, value))

    def run(self) -> Graph:
        """Lower every node; the outputs take the contract's names.

        Raises:
            NotImplementedError: the program holds an operator that the table lacks.
        """
        for node in self.traced.program.graph.nodes:
            if node.op == "call_function":
                self._lower(node)
            elif node.op == "output":
                self._bind_outputs(node)
        for tap, node in tap_nodes(self.traced.program, self.traced.taps).items():
            self.graph.taps[tap] = self.value(node)
        return self.graph

    def _lower(self, node: Node) -> None:
        if node.target == aten._assert_tensor_metadata.default:
            return
        if node.target is operator.getitem:
            source, index = arguments(node)
            self._values[node] = self._values[source][index]
        elif node.target not in self._boundaries and all(
            isinstance(self._values[source], Constant) for source in node.all_input_nodes
        ):
            name = self.graph.unique(f"{self.name(node)}_folded")
            self._values[node] = Constant(name, lambda: self._evaluate(node))
        elif node.target in self._table:
            self._values[node] = self._table[node.target](self, node)
        else:
            raise NotImplementedError(f"no ONNX lowering for {node.target} ({self.name(node)})")

    def _evaluate(self, node: Node) -> Tensor:
        args = torch.fx.map_arg(node.args, lambda source: self._values[source].load())
        return cast(Any, node.target)(*args, **node.kwargs)

    def _bind_outputs(self, node: Node) -> None:
        contract = self.traced.contract
        for spec, source in zip(contract.outputs, arguments(node)[0], strict=True):
            if numpy_dtype(fake(source).dtype) == np.dtype(spec.dtype):
                self.graph.node("Identity", [self.value(source)], spec.name, outputs=[spec.name])
            else:
                to = {"to": element_type(spec.dtype)}
                self.graph.node("Cast", [self.value(source)], spec.name, to, outputs=[spec.name])
            self.graph.outputs.append(value_info(spec.name, spec.dtype, spec.shape))
        for spec in map(self.dialect.state_output, contract.states):
            self.graph.outputs.append(value_info(spec.name, spec.dtype, spec.shape))

    # What the lowering functions use.

    def value(self, source: Node) -> str:
        """ONNX name of a program node's value; constants become initializers on first use."""
        value = self._values[source]
        if isinstance(value, Constant):
            tensor = fake(source)
            return self.graph.initializer(
                value.name, numpy_dtype(tensor.dtype), tensor.shape, lambda: to_numpy(value.load())
            )
        return value

    def widened(self, source: Node) -> str:
        """A constant as a float32 initializer."""
        constant, shape = self.constant(source), fake(source).shape
        return self.graph.initializer(
            f"{constant.name}_float32", np.dtype(np.float32), shape, lambda: to_numpy(constant.load().float())
        )

    def cast(self, value: str, dtype: np.dtype[Any], name: str) -> str:
        return self.graph.node("Cast", [value], name, {"to": element_type(dtype)})

    def state_outputs(self, *states: Node) -> list[str]:
        """Names of the graph's outputs for these states."""
        by_name = {spec.name: spec for spec in self.traced.contract.states}
        return [self.dialect.state_output(by_name[self.value(state)]).name for state in states]

    def is_constant(self, source: Node) -> bool:
        return isinstance(self._values[source], Constant)

    @cached_property
    def base(self) -> np.dtype[Any]:
        """Dtype of what is not quantized: that of the program's first input."""
        name = str(self.traced.program.graph_signature.user_inputs[0])
        (first,) = (node for node in self.traced.program.graph.nodes if node.name == name)
        return numpy_dtype(fake(first).dtype)

    def weight(self, source: Node) -> Constant | QuantizedWeight:
        """A weight, quantized or not."""
        value = self._values[source]
        return value if isinstance(value, QuantizedWeight) else self.constant(source)

    def constant(self, source: Node) -> Constant:
        value = self._values[source]
        if not isinstance(value, Constant):
            raise NotImplementedError(f"{source.name} must be a weight or a constant")
        return value

    def operand(self, node: Node, position: int) -> str:
        """A tensor argument, or a Python number as a constant of the output's dtype."""
        argument = arguments(node)[position]
        if isinstance(argument, Node):
            return self.value(argument)
        dtype = numpy_dtype(fake(node).dtype)
        return self.graph.constant(np.array(argument, dtype=dtype), "scalar")

    def name(self, node: Node) -> str:
        """Module path and operator, as in ``layers.0.mlp.down_proj/linear``."""
        stack = node.meta.get("nn_module_stack") or {"": ("", "")}
        path = list(stack.values())[-1][0]
        kind = str(node.target).split(".")[1] if "." in str(node.target) else str(node.target)
        return f"{path}/{kind}" if path else kind

    def emit(
        self, node: Node, operator_type: str, inputs: list[str], attributes: dict[str, Any] | None = None
    ) -> str:
        return self.graph.node(operator_type, inputs, self.name(node), attributes or {})


def arguments(node: Node, *defaults: Any) -> list[Any]:
    """Positional arguments of a node, missing ones filled from the end of ``defaults``' full list.

    Args:
        defaults: the operator's arguments after the first; only those that the node lacks are used.
    """
    return [*node.args, *defaults[max(len(node.args) - 1, 0) :]]


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


def _same(value: Tensor) -> Tensor:
    return value


def _load_as(load: LoadParameter, name: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: load(name).to(dtype)


def static(shape: torch.Size) -> list[int]:
    return [int(size) for size in shape]
