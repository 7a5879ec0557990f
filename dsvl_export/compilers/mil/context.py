"""The lowering of a component to one function of a MIL program.

Core ML needs the sizes that a traced program leaves open, so a component becomes several functions
of one package, each with its own sizes; the functions share the weights. A tensor has at most five
axes: where the program has six, the first two are merged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import types
from torch.fx import Node

from calibration.quantized_weights import LoadParameter
from dsvl_export.compilers.lowering import (
    Constant,
    ProgramLowering,
    arguments,
    fake_tensor,
    numpy_dtype,
    to_numpy,
)
from reference.trace import TracedComponent
from runtimes.backends.mil.package import identifier
from runtimes.bundle.contracts import TensorSpec

Var = Any  # coremltools' value of a program
MAX_RANK = 5
MAX_INLINE_VALUES = 9  # of a constant; larger ones are loaded when the weight file is written
MIL_TYPES = {"float16": types.fp16, "float32": types.fp32, "int64": types.int32}
MIL_NAMES = {"float16": "fp16", "float32": "fp32", "int64": "int32"}


@dataclass
class Weights:
    """The constants of all functions of a package; values are loaded when the file is written.

    Args:
        loaders: name → the function that loads the values.
        bytes: name → bytes in the file.
    """

    loaders: dict[str, Callable[[], np.ndarray]] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, shape: tuple[int, ...], bits: int, load: Callable[[], np.ndarray]) -> None:
        """Register a constant."""
        self.loaders[name] = load
        self.bytes[name] = -(-prod(shape) * bits // 8)


class MilLowering(ProgramLowering):
    """Lower a component to one function; the value of a node is a variable of the MIL program.

    Args:
        traced: the component.
        load: loads a parameter by name.
        weights: receives the constants.
        inputs: variables of the contract's inputs and states, by name.
        sizes: sizes of the contract's named dims; a dim that is missing stays flexible.
        table: operator → its lowering.
        boundaries: operators that are never evaluated ahead of time.
    """

    target_format = "Core ML"

    def __init__(
        self,
        traced: TracedComponent,
        load: LoadParameter,
        weights: Weights,
        inputs: Mapping[str, Var],
        sizes: Mapping[str, int],
        table: Mapping[Any, Callable[[MilLowering, Node], Any]],
        boundaries: frozenset[Any],
    ) -> None:
        """Create a lowering with no values; see the class for the arguments."""
        super().__init__(traced, load, table, boundaries)
        self._weights, self._inputs, self._sizes = weights, inputs, sizes
        self._constants: dict[str, Var] = {}
        self._names.update(inputs)
        self.outputs: list[Var] = []

    def bind_input(self, spec: TensorSpec, node: Node) -> Var:
        """Return the variable of an input or a state."""
        return self._inputs[spec.name]

    def bind_outputs(self, sources: list[Node]) -> None:
        """Cast the values of these nodes to the contract's dtypes and name them as outputs."""
        for spec, source in zip(self.traced.contract.outputs, sources, strict=True):
            self.outputs.append(mb.cast(x=self.value(source), dtype=MIL_NAMES[spec.dtype], name=spec.name))

    def sanitize_name(self, name: str) -> str:
        """Turn a name into a MIL identifier."""
        return identifier(name)

    @cached_property
    def _symbols(self) -> dict[Any, int]:
        """Map the symbols of the traced program to sizes."""
        contract = self.traced.contract
        nodes = {node.name: node for node in self.traced.program.graph.nodes if node.op == "placeholder"}
        names = self.traced.program.graph_signature.user_inputs
        sizes = {}
        for spec, name in zip(contract.inputs + contract.states, names, strict=True):
            for dim, size in zip(spec.shape, fake_tensor(nodes[str(name)]).shape, strict=True):
                if dim in self._sizes:
                    sizes[size.node.expr] = self._sizes[str(dim)]
        return sizes

    def full_shape(self, source: Node) -> list[int]:
        """Return the shape of a node, with -1 for a flexible dim."""
        shape = []
        for size in fake_tensor(source).shape:
            known: Any = size if isinstance(size, int) else size.node.expr.subs(self._symbols)
            shape.append(int(known) if isinstance(size, int) or known.is_number else -1)
        return shape

    def shape(self, source: Node) -> list[int]:
        """Return the shape of a node in Core ML, with at most five axes."""
        shape = self.full_shape(source)
        if len(shape) > MAX_RANK + 1 or (len(shape) > MAX_RANK and -1 in shape[:2]):
            raise NotImplementedError(f"{self.name(source)} has {len(shape)} axes, Core ML takes {MAX_RANK}")
        return [shape[0] * shape[1], *shape[2:]] if len(shape) > MAX_RANK else shape

    def value(self, source: Node) -> Var:
        """Return the variable of a node; a constant is added to the program on first use."""
        value = self._values[source]
        if isinstance(value, Constant):
            dtype = numpy_dtype(fake_tensor(source).dtype)
            shape = tuple(self.shape(source))
            return self.add_constant(value.name, dtype, shape, lambda: to_numpy(value.load()))
        return value

    def add_constant(
        self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], load: Callable[[], np.ndarray]
    ) -> Var:
        """Add a constant once; a name means the same values in all functions.

        Args:
            name: name of the constant.
            dtype: numpy's dtype, or coremltools' own for 4-bit codes.
            shape: shape of the constant.
            load: loads the values.
        """
        if name not in self._constants:
            stored = np.dtype(np.int32) if dtype == np.int64 else dtype
            small = prod(shape) <= MAX_INLINE_VALUES
            held = (
                load().reshape(shape).astype(stored)
                if small
                else np.broadcast_to(np.zeros((), stored), shape)
            )
            var = mb.const(val=held, name=self.unique_name(name))
            if not small:
                bits = 4 if var.dtype in (types.int4, types.uint4) else stored.itemsize * 8
                var.op.weight_id = name
                self._weights.add(name, shape, bits, lambda: load().astype(stored, copy=False))
            self._constants[name] = var
        return self._constants[name]

    def operand(self, node: Node, position: int) -> Any:
        """Return a tensor argument, or a Python number in the output's dtype."""
        argument = arguments(node)[position]
        return self.value(argument) if isinstance(argument, Node) else self.number(argument, node)

    def number(self, value: float, like: Node) -> Any:
        """Convert a number to the dtype of a node."""
        return numpy_dtype(fake_tensor(like).dtype).type(value)

    def op(self, kind: str, **arguments: Any) -> Any:
        """Add an intermediate MIL operator, named after the node that is being lowered."""
        return getattr(mb, kind)(**arguments, name=self.unique_name(f"{self.scope}_{kind}"))

    def emit(self, node: Node, operator: Callable[..., Var], **arguments: Any) -> Var:
        """Add the MIL operator that gives a node's value, named after the node."""
        return operator(**arguments, name=self.unique_name(self.name(node)))
