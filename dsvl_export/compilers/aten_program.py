"""Traced components as ATen programs with fixed sizes, for converters of PyTorch programs.

The program is copied node by node; a backend's table replaces the operators that it needs in
another form. Weights, constants and states become buffers, and the program updates the states. Such
a converter holds the weights of one component in memory, in the precision of the artifact.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from calibration.quantized_weights import LoadParameter
from dsvl_export.compilers.lowering import Constant, ProgramLowering, fake_tensor
from reference.model.operators import cached_attention
from reference.trace import TracedComponent
from runtimes.bundle.contracts import TensorSpec

Lower = Callable[[Any, Node], Any]  # of an AtenLowering


class AtenLowering(ProgramLowering):
    """Build an ATen program; the value of a node is its new node, or a list of nodes.

    Args:
        traced: the component.
        load: loads a parameter by name.
        sizes: sizes of the contract's named dims.
        table: operator → its lowering, in addition to ``TABLE``.
        boundaries: operators that are never evaluated ahead of time.
        target_format: name of the format that the program is for, for messages.
        tensors: weights and constants by name, shared with the component's other programs.
    """

    def __init__(
        self,
        traced: TracedComponent,
        load: LoadParameter,
        sizes: Mapping[str, int],
        table: Mapping[Any, Lower],
        boundaries: frozenset[Any],
        target_format: str,
        tensors: dict[str, Tensor],
    ) -> None:
        """Create an empty program; see the class for the arguments."""
        super().__init__(traced, load, {**TABLE, **table}, boundaries)
        self.target_format, self.graph, self.root = target_format, Graph(), nn.Module()
        self._sizes, self._tensors = sizes, tensors
        self._buffers: dict[str, Node] = {}

    def bind_input(self, spec: TensorSpec, node: Node) -> Node:
        """Add a placeholder for an input, or a buffer for a state."""
        if spec in self.traced.contract.states:
            return self._registered(spec.name, self.example(spec))
        return self.graph.placeholder(spec.name)

    def bind_outputs(self, sources: list[Node]) -> None:
        """Return the values of these nodes from the program."""
        self.graph.output(tuple(self.value(source) for source in sources))

    def example(self, spec: TensorSpec) -> Tensor:
        """Create zeros with the shape and dtype of a spec."""
        shape = spec.sized(self._sizes)
        return torch.zeros(shape, dtype=getattr(torch, spec.dtype))

    def sanitize_name(self, name: str) -> str:
        """Replace the characters that a Python attribute cannot have."""
        return name.replace(".", "_").replace("/", "_")

    def buffer(self, name: str, load: Callable[[], Tensor]) -> Node:
        """Add a weight or constant as a buffer, once."""
        if name not in self._buffers:
            if name not in self._tensors:
                self._tensors[name] = load().detach().contiguous()
            self._buffers[name] = self._registered(name, self._tensors[name])
        return self._buffers[name]

    def _registered(self, name: str, tensor: Tensor) -> Node:
        target = self.unique_name(name)
        self.root.register_buffer(target, tensor)
        return self.graph.get_attr(target)

    def value(self, source: Node) -> Any:
        """Return the new node of a node; a constant becomes a buffer on first use."""
        value = self._values[source]
        return self.buffer(value.name, value.load) if isinstance(value, Constant) else value

    def call(self, target: Any, *args: Any) -> Node:
        """Add a call of an operator or a traceable function."""
        return self.graph.call_function(target, args)

    def lower_unlisted(self, node: Node) -> Any:
        """Copy the operator onto the new values."""
        args, kwargs = (torch.fx.map_arg(given, self.value) for given in (node.args, node.kwargs))
        out = self.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        if isinstance(fake_tensor(node), (list, tuple)):
            return [self.call(operator.getitem, out, index) for index in range(len(fake_tensor(node)))]
        return out


def _cached_attention(lowering: AtenLowering, node: Node) -> Node:
    """Decompose the operator; its updates of the states become plain ATen."""
    args = torch.fx.map_arg(node.args, lowering.value)
    return lowering.call(cached_attention, *args)


TABLE: dict[Any, Lower] = {torch.ops.dsvl.cached_attention.default: _cached_attention}


def fixed_program(
    traced: TracedComponent,
    load: LoadParameter,
    sizes: Mapping[str, int],
    target_format: str,
    table: Mapping[Any, Lower],
    boundaries: frozenset[Any],
    tensors: dict[str, Tensor],
) -> ExportedProgram:
    """Export a traced component with fixed sizes; inputs and states have the contract's names.

    See ``AtenLowering`` for the arguments.

    Raises:
        NotImplementedError: the table has no lowering for a quantized operator.
    """
    lowering = AtenLowering(traced, load, sizes, table, boundaries, target_format, tensors)
    lowering.lower_program()
    module = GraphModule(lowering.root, lowering.graph).eval()
    examples = tuple(map(lowering.example, traced.contract.inputs))
    with torch.no_grad():
        return torch.export.export(module, examples)
