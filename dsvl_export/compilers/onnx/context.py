"""A lowering to an ONNX graph; operators that consumers disagree on are left to the ``Dialect``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch.fx import Node

import calibration.quantized_program  # noqa: F401 -- registers the float8 operators
from dsvl_export.compilers.lowering import (
    Constant,
    LoadParameter,
    ProgramLowering,
    QuantizedWeight,
    arguments,
    fake_tensor,
    numpy_dtype,
    to_numpy,
)
from dsvl_export.compilers.onnx.builder import Graph, element_type, value_info
from reference.taps import tap_nodes
from reference.trace import TracedComponent
from runtimes.bundle.contracts import TensorSpec

qd, dsvl = torch.ops.quantized_decomposed, torch.ops.dsvl
ROUNDING = frozenset(
    {
        qd.quantize_per_tensor.tensor,
        qd.quantize_per_token.default,
        dsvl.quantize_float8.default,
    }
)


class Dialect(Protocol):
    """How one consumer wants the operators that have several forms in ONNX."""

    opset: int
    float32_norms: bool  # whether norms of half precision are cast to float32 and back

    def opset_of(self, graph: Graph) -> int:
        """The opset that a lowered graph is written in; at most ``opset``."""
        ...

    def state_output(self, state: TensorSpec) -> TensorSpec:
        """How a state leaves the graph: ``updated_state`` or ``appended_state``."""
        ...

    def rms_norm(self, context: Lowering, x: str, weight: str, epsilon: float, name: str) -> str: ...

    def attention(self, context: Lowering, node: Node) -> str: ...

    def cached_attention(self, context: Lowering, node: Node) -> str: ...

    def weight_only_linear(self, context: Lowering, node: Node, x: str, weight: QuantizedWeight) -> str:
        """``x @ W^T`` where the weight alone is quantized."""
        ...

    def dynamic_linear(self, context: Lowering, node: Node, x: str, weight: QuantizedWeight) -> str:
        """``x @ W^T`` where ``x`` is rounded to 8 bits as well, each token by its own range."""
        ...


class Lowering(ProgramLowering):
    """The graph so far; a node's value is its name in ONNX."""

    target_format = "ONNX"

    def __init__(
        self,
        traced: TracedComponent,
        load: LoadParameter,
        dialect: Dialect,
        table: Mapping[Any, Callable[[Lowering, Node], Any]],
        boundaries: frozenset[Any],
    ) -> None:
        super().__init__(traced, load, table, boundaries)
        self.dialect = dialect
        self.graph = Graph(traced.contract.component, dialect.opset)

    def bind_input(self, spec: TensorSpec, node: Node) -> str:
        self.graph.inputs.append(value_info(spec.name, spec.dtype, spec.shape))
        name, dtype = self.graph.unique_name(spec.name), numpy_dtype(fake_tensor(node).dtype)
        return name if np.dtype(spec.dtype) == dtype else self.cast(name, dtype, f"{name}_inside")

    def unique_name(self, name: str) -> str:
        return self.graph.unique_name(name)

    def run(self) -> Graph:
        """Lower every node; the outputs take the contract's names.

        Raises:
            NotImplementedError: the program holds an operator that the table lacks.
        """
        self.lower_program()
        for tap, node in tap_nodes(self.traced.program, self.traced.taps).items():
            self.graph.taps[tap] = self.value(node)
        self.graph.prune()
        self.graph.opset = self.dialect.opset_of(self.graph)
        return self.graph

    def bind_outputs(self, sources: list[Node]) -> None:
        contract = self.traced.contract
        for spec, source in zip(contract.outputs, sources, strict=True):
            if numpy_dtype(fake_tensor(source).dtype) == np.dtype(spec.dtype):
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
            tensor = fake_tensor(source)
            return self.graph.initializer(
                value.name, numpy_dtype(tensor.dtype), tensor.shape, lambda: to_numpy(value.load())
            )
        return value

    def float32_constant(self, source: Node) -> str:
        """A constant as a float32 initializer."""
        constant, shape = self.constant(source), fake_tensor(source).shape
        return self.graph.initializer(
            f"{constant.name}_float32", np.dtype(np.float32), shape, lambda: to_numpy(constant.load().float())
        )

    def cast(self, value: str, dtype: np.dtype[Any], name: str) -> str:
        return self.graph.node("Cast", [value], name, {"to": element_type(dtype)})

    def state_outputs(self, *states: Node) -> list[str]:
        """Names of the graph's outputs for these states."""
        by_name = {spec.name: spec for spec in self.traced.contract.states}
        return [self.dialect.state_output(by_name[self.value(state)]).name for state in states]

    @cached_property
    def first_input(self) -> Any:
        """The fake tensor of the program's first input."""
        name = str(self.traced.program.graph_signature.user_inputs[0])
        (first,) = (node for node in self.traced.program.graph.nodes if node.name == name)
        return fake_tensor(first)

    @cached_property
    def rounds_activations(self) -> bool:
        """Whether the program quantizes what layers read, and not their weights alone."""
        return any(node.target in ROUNDING for node in self.traced.program.graph.nodes)

    @property
    def base(self) -> np.dtype[Any]:
        """Dtype of what is not quantized: that of the program's first input."""
        return numpy_dtype(self.first_input.dtype)

    def operand(self, node: Node, position: int) -> str:
        """A tensor argument, or a Python number as a constant of the output's dtype."""
        argument = arguments(node)[position]
        if isinstance(argument, Node):
            return self.value(argument)
        dtype = numpy_dtype(fake_tensor(node).dtype)
        return self.graph.constant(np.array(argument, dtype=dtype), "scalar")

    def emit(
        self, node: Node, operator_type: str, inputs: list[str], attributes: dict[str, Any] | None = None
    ) -> str:
        return self.graph.node(operator_type, inputs, self.name(node), attributes or {})
