"""From an ExportedProgram to an ONNX graph: one function per ATen operator, by a table.

What depends only on weights and constants is not emitted but evaluated when the file is written.
The few operators that consumers disagree on are left to the ``Dialect``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.fx import Node

from dsvl_export.onnx_graph.builder import Graph, element_type, value_info
from reference.taps import tap_nodes
from reference.trace import TracedComponent
from runtimes.contracts import updated_state

LoadParameter = Callable[[str], Tensor]
aten = torch.ops.aten


class Dialect(Protocol):
    """How one consumer wants the operators that have several forms in ONNX."""

    opset: int

    def attention(self, context: Lowering, node: Node) -> str: ...

    def cached_attention(self, context: Lowering, node: Node) -> str: ...


@dataclass(frozen=True)
class Constant:
    """A value known without running the graph."""

    name: str
    load: Callable[[], Tensor]


class Lowering:
    """The state of one lowering: the graph so far and what each program node became."""

    def __init__(self, traced: TracedComponent, load: LoadParameter, dialect: Dialect) -> None:
        self.traced, self.dialect = traced, dialect
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
                self._values[node] = self.graph.unique(tensor.name)
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
        elif all(isinstance(self._values[source], Constant) for source in node.all_input_nodes):
            name = self.graph.unique(f"{self.name(node)}_folded")
            self._values[node] = Constant(name, lambda: self._evaluate(node))
        elif node.target in TABLE:
            self._values[node] = TABLE[node.target](self, node)
        else:
            raise NotImplementedError(f"no ONNX lowering for {node.target} ({self.name(node)})")

    def _evaluate(self, node: Node) -> Tensor:
        args = torch.fx.map_arg(node.args, lambda source: self._values[source].load())
        return cast(Any, node.target)(*args, **node.kwargs)

    def _bind_outputs(self, node: Node) -> None:
        contract = self.traced.contract
        for spec, source in zip(contract.outputs, arguments(node)[0], strict=True):
            self.graph.node("Identity", [self.value(source)], spec.name, outputs=[spec.name])
            self.graph.outputs.append(value_info(spec.name, spec.dtype, spec.shape))
        for spec in contract.states:
            name = updated_state(spec.name)
            self.graph.outputs.append(value_info(name, spec.dtype, spec.shape))

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
    return np.asarray(tensor.detach().contiguous().numpy())


def _same(value: Tensor) -> Tensor:
    return value


def _load_as(load: LoadParameter, name: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: load(name).to(dtype)


def _static(shape: torch.Size) -> list[int]:
    return [int(size) for size in shape]


def _reshape(context: Lowering, node: Node) -> str:
    """Reshape with 0 for a kept symbolic dim and -1 for the one that is left to infer."""
    (source, *_) = arguments(node)
    before, after = fake(source).shape, fake(node).shape
    target: list[int] = []
    for axis, size in enumerate(after):
        if isinstance(size, int):
            target.append(size)
        elif axis < len(before) and str(before[axis]) == str(size):
            target.append(0)
        else:
            target.append(-1)
    if target.count(-1) > 1:
        raise NotImplementedError(f"{context.name(node)} leaves two symbolic dims to infer")
    return context.emit(node, "Reshape", [context.value(source), context.graph.ints(*target)])


def _linear(context: Lowering, node: Node) -> str:
    """``x @ W^T + b``; the weight is stored transposed, so that no consumer has to fold it."""
    x, weight_node, bias = arguments(node, None, None)
    weight = context.constant(weight_node)
    rows, columns = _static(fake(weight_node).shape)
    transposed = context.graph.initializer(
        f"{weight.name}_transposed",
        numpy_dtype(fake(weight_node).dtype),
        (columns, rows),
        lambda: to_numpy(weight.load().t()),
    )
    out = context.emit(node, "MatMul", [context.value(x), transposed])
    if bias is None:
        return out
    return context.graph.node("Add", [out, context.value(bias)], f"{context.name(node)}_bias")


def _conv2d(context: Lowering, node: Node) -> str:
    x, weight, bias, stride, padding, dilation, groups = arguments(
        node, None, None, [1, 1], [0, 0], [1, 1], 1
    )
    inputs = [context.value(source) for source in (x, weight, bias) if source is not None]
    attributes = {
        "kernel_shape": _static(fake(weight).shape[2:]), "strides": stride,
        "pads": [*padding, *padding], "dilations": dilation, "group": groups,
    }  # fmt: skip
    return context.emit(node, "Conv", inputs, attributes)


def _layer_norm(context: Lowering, node: Node) -> str:
    x, normalized, weight, bias, epsilon = arguments(node)[:5]
    if len(normalized) != 1:
        raise NotImplementedError("LayerNorm over more than the last axis")
    inputs = [context.value(source) for source in (x, weight, bias)]
    return context.emit(node, "LayerNormalization", inputs, {"axis": -1, "epsilon": epsilon})


def _rms_norm(context: Lowering, node: Node) -> str:
    x, _, weight, epsilon = arguments(node)
    inputs = [context.value(x), context.value(weight)]
    return context.emit(node, "RMSNormalization", inputs, {"axis": -1, "epsilon": epsilon})


def _gelu(context: Lowering, node: Node) -> str:
    form = node.kwargs.get("approximate", "none")
    return context.emit(node, "Gelu", [context.value(arguments(node)[0])], {"approximate": form})


def _silu(context: Lowering, node: Node) -> str:
    x = context.value(arguments(node)[0])
    gate = context.graph.node("Sigmoid", [x], f"{context.name(node)}_sigmoid")
    return context.emit(node, "Mul", [x, gate])


def _binary(operator_type: str) -> Callable[[Lowering, Node], str]:
    def lower(context: Lowering, node: Node) -> str:
        if node.kwargs.get("alpha", 1) != 1:
            raise NotImplementedError(f"{node.target} with alpha")
        return context.emit(node, operator_type, [context.operand(node, 0), context.operand(node, 1)])

    return lower


def _permutation(order: Callable[[Node], list[int]]) -> Callable[[Lowering, Node], str]:
    def lower(context: Lowering, node: Node) -> str:
        return context.emit(node, "Transpose", [context.value(arguments(node)[0])], {"perm": order(node)})

    return lower


def _swap(node: Node) -> list[int]:
    order = list(range(fake(node).dim()))
    _, first, second = arguments(node)
    order[first], order[second] = order[second], order[first]
    return order


def _permuted(node: Node) -> list[int]:
    _, order = arguments(node)
    return [axis % len(order) for axis in order]


def _unsqueeze(context: Lowering, node: Node) -> str:
    x, axis = arguments(node)
    axis %= fake(node).dim()
    return context.emit(node, "Unsqueeze", [context.value(x), context.graph.ints(axis)])


def _chunk(context: Lowering, node: Node) -> list[str]:
    x, count, axis = arguments(node, 0, 0)
    axis %= fake(x).dim()
    sizes = [int(part.shape[axis]) for part in fake(node)]
    names = [context.graph.unique(f"{context.name(node)}_{index}") for index in range(count)]
    inputs = [context.value(x), context.graph.ints(*sizes)]
    context.graph.node("Split", inputs, context.name(node), {"axis": axis}, outputs=names)
    return names


def _slice(context: Lowering, node: Node) -> str:
    x, axis, start, end = arguments(node, 0, None, None)[:4]
    if (start or 0) == 0 and end is None:
        return context.value(x)
    inputs = [context.value(x), *(context.graph.ints(v) for v in (start or 0, min(end, 1 << 62), axis))]
    return context.emit(node, "Slice", inputs)


def _pad(context: Lowering, node: Node) -> str:
    """torch pads from the last axis backwards; ONNX lists all begins, then all ends."""
    x, amounts = arguments(node)[:2]
    rank = fake(x).dim()
    begins, ends = [0] * rank, [0] * rank
    for index in range(len(amounts) // 2):
        begins[rank - 1 - index], ends[rank - 1 - index] = amounts[2 * index : 2 * index + 2]
    pads = context.graph.initializer(
        "pads_" + "_".join(map(str, begins + ends)), np.dtype(np.int64), (2 * rank,),
        lambda: np.array(begins + ends, dtype=np.int64),
    )  # fmt: skip
    return context.emit(node, "Pad", [context.value(x), pads])


def _cat(context: Lowering, node: Node) -> str:
    parts, axis = arguments(node, 0)
    axis %= fake(node).dim()
    return context.emit(node, "Concat", [context.value(part) for part in parts], {"axis": axis})


def _index_select(context: Lowering, node: Node) -> str:
    x, axis, index = arguments(node)
    return context.emit(node, "Gather", [context.value(x), context.value(index)], {"axis": axis})


def _cast(context: Lowering, node: Node) -> str:
    source, dtype = arguments(node)[0], fake(node).dtype
    if fake(source).dtype == dtype:
        return context.value(source)
    return context.emit(node, "Cast", [context.value(source)], {"to": element_type(numpy_dtype(dtype))})


TABLE: dict[Any, Callable[[Lowering, Node], Any]] = {
    aten.linear.default: _linear,
    aten.conv2d.default: _conv2d,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.gelu.default: _gelu,
    aten.silu.default: _silu,
    aten.matmul.default: _binary("MatMul"),
    aten.add.Tensor: _binary("Add"),
    aten.sub.Tensor: _binary("Sub"),
    aten.mul.Tensor: _binary("Mul"),
    aten.div.Tensor: _binary("Div"),
    aten.flatten.using_ints: _reshape,
    aten.unflatten.int: _reshape,
    aten.transpose.int: _permutation(_swap),
    aten.permute.default: _permutation(_permuted),
    aten.unsqueeze.default: _unsqueeze,
    aten.chunk.default: _chunk,
    aten.slice.Tensor: _slice,
    aten.pad.default: _pad,
    aten.cat.default: _cat,
    aten.index_select.default: _index_select,
    aten.to.dtype: _cast,
    aten.scaled_dot_product_attention.default: lambda context, node: context.dialect.attention(context, node),
    torch.ops.dsvl.cached_attention.default: lambda context, node: context.dialect.cached_attention(
        context, node
    ),
}


def lower(traced: TracedComponent, load: LoadParameter, dialect: Dialect) -> Graph:
    """The ONNX graph of a traced component in a dialect; weights stay behind ``load``.

    Args:
        load: gives a parameter of the component by its name, in any float dtype.
    """
    return Lowering(traced, load, dialect).run()


def without_weights(name: str) -> Tensor:
    """A ``load`` for those who only want sizes."""
    raise AssertionError(f"only sizes are wanted, but the weight {name} was asked for")
