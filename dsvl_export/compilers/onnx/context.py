"""The lowering to an ONNX graph; a ``Dialect`` lowers the operators on which consumers differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch.fx import Node

import calibration.quantized_program  # noqa: F401 -- registers the float8 operators
from calibration.quantized_weights import LoadParameter
from dsvl_export.compilers.lowering import (
    Constant,
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
    """The forms of operators that one consumer of ONNX files supports.

    Attributes:
        opset: the newest opset that the dialect writes.
        float32_norms: whether norms of half precision are computed in float32.
        takes_adapters: whether linear layers add the change of a LoRA adapter, which is an input.
    """

    opset: int
    float32_norms: bool  # whether norms of half precision are cast to float32 and back
    takes_adapters: bool

    def opset_of(self, graph: Graph) -> int:
        """Return the opset that a lowered graph is written in; at most ``opset``."""
        ...

    def state_output(self, state: TensorSpec) -> TensorSpec:
        """Map a state to an output of the graph: ``updated_state`` or ``appended_state``."""
        ...

    def rms_norm(self, context: Lowering, x: str, weight: str, epsilon: float, name: str) -> str:
        """Add RMSNorm over the last axis."""
        ...

    def attention(self, context: Lowering, node: Node) -> str:
        """Lower the softmax attention of the vision towers."""
        ...

    def cached_attention(self, context: Lowering, node: Node) -> str:
        """Lower the decoder's attention: RoPE, cache update, attention."""
        ...

    def weight_only_linear(self, context: Lowering, node: Node, x: str, weight: QuantizedWeight) -> str:
        """Lower ``x @ W^T`` where only the weight is quantized."""
        ...

    def dynamic_linear(self, context: Lowering, node: Node, x: str, weight: QuantizedWeight) -> str:
        """Lower ``x @ W^T`` where ``x`` is also quantized to 8 bits, with a range per token."""
        ...


class Lowering(ProgramLowering):
    """Lower a component to an ONNX graph; the value of a node is its name in ONNX.

    Args:
        traced: the component.
        load: loads a parameter by name.
        dialect: lowers the operators that have several forms.
        table: operator → its lowering.
        boundaries: operators that are never evaluated ahead of time.
    """

    target_format = "ONNX"

    def __init__(
        self,
        traced: TracedComponent,
        load: LoadParameter,
        dialect: Dialect,
        table: Mapping[Any, Callable[[Lowering, Node], Any]],
        boundaries: frozenset[Any],
    ) -> None:
        """Create an empty graph; see the class for the arguments."""
        super().__init__(traced, load, table, boundaries)
        self.dialect = dialect
        self.graph = Graph(traced.contract.component, dialect.opset)

    def bind_input(self, spec: TensorSpec, node: Node) -> str:
        """Add an input; cast it where the program has another dtype than the contract."""
        self.graph.inputs.append(value_info(spec.name, spec.dtype, spec.shape))
        name, dtype = self.graph.unique_name(spec.name), numpy_dtype(fake_tensor(node).dtype)
        return name if np.dtype(spec.dtype) == dtype else self.cast(name, dtype, f"{name}_inside")

    def unique_name(self, name: str) -> str:
        """Reserve a name in the graph."""
        return self.graph.unique_name(name)

    def run(self) -> Graph:
        """Lower every node; the outputs have the contract's names.

        Raises:
            NotImplementedError: the table has no lowering for an operator.
        """
        self.lower_program()
        for tap, node in tap_nodes(self.traced.program, self.traced.taps).items():
            self.graph.taps[tap] = self.value(node)
        self.graph.prune()
        self.graph.opset = self.dialect.opset_of(self.graph)
        return self.graph

    def bind_outputs(self, sources: list[Node]) -> None:
        """Add the outputs, in the contract's dtypes, and the outputs of the states."""
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
        """Return the name of a node's value; a constant becomes an initializer on first use."""
        value = self._values[source]
        if isinstance(value, Constant):
            tensor = fake_tensor(source)
            return self.graph.initializer(
                value.name, numpy_dtype(tensor.dtype), tensor.shape, lambda: to_numpy(value.load())
            )
        return value

    def float32_constant(self, source: Node) -> str:
        """Add a constant as a float32 initializer."""
        constant, shape = self.constant(source), fake_tensor(source).shape
        return self.graph.initializer(
            f"{constant.name}_float32", np.dtype(np.float32), shape, lambda: to_numpy(constant.load().float())
        )

    def cast(self, value: str, dtype: np.dtype[Any], name: str) -> str:
        """Cast a value."""
        return self.graph.node("Cast", [value], name, {"to": element_type(dtype)})

    def state_outputs(self, *states: Node) -> list[str]:
        """Return the names of the graph's outputs for these states."""
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
        """Whether the program quantizes activations, and not only weights."""
        return any(node.target in ROUNDING for node in self.traced.program.graph.nodes)

    @property
    def base(self) -> np.dtype[Any]:
        """The dtype of the tensors that are not quantized: the first input's."""
        return numpy_dtype(self.first_input.dtype)

    def operand(self, node: Node, position: int) -> str:
        """Return a tensor argument, or a Python number as a constant of the output's dtype."""
        argument = arguments(node)[position]
        if isinstance(argument, Node):
            return self.value(argument)
        dtype = numpy_dtype(fake_tensor(node).dtype)
        return self.graph.constant(np.array(argument, dtype=dtype), "scalar")

    def emit(
        self, node: Node, operator_type: str, inputs: list[str], attributes: dict[str, Any] | None = None
    ) -> str:
        """Add the ONNX node that gives a node's value, named after the node."""
        return self.graph.node(operator_type, inputs, self.name(node), attributes or {})
