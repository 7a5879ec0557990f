"""A small ONNX graph builder whose initializers are loaded when the file is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import onnx
from onnx import helper

TAPS = "dsvl_export.taps"  # key of the model's metadata
Attributes = Mapping[str, Any]
NO_ATTRIBUTES: Attributes = {}


@dataclass(frozen=True)
class Initializer:
    """A constant of the graph, whose values are loaded on demand.

    Args:
        name: its name.
        dtype: its dtype, numpy's or ml_dtypes'.
        shape: its shape.
        load: loads the values.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]

    @property
    def key(self) -> tuple[str, str, tuple[int, ...]]:
        """Identify the values among the graphs of a component."""
        return self.name, self.dtype.name, self.shape

    @property
    def nbytes(self) -> int:
        """Compute the bytes as stored; 4-bit numbers take half a byte."""
        count = prod(self.shape)
        return -(-count // 2) if self.dtype.name == "int4" else count * self.dtype.itemsize


@dataclass
class Graph:
    """An ONNX graph: nodes in execution order, and initializers by name.

    Args:
        name: name of the graph.
        opset: its opset.
        nodes: its nodes.
        initializers: its constants.
        inputs: its inputs.
        outputs: its outputs.
        taps: tap → the value of the graph that holds it.
    """

    name: str
    opset: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, Initializer] = field(default_factory=dict)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    taps: dict[str, str] = field(default_factory=dict)  # tap → the value in this graph that is it
    _names: set[str] = field(default_factory=set)

    def node(
        self,
        operator: str,
        inputs: Sequence[str],
        name: str,
        attributes: Attributes = NO_ATTRIBUTES,
        outputs: Sequence[str] = (),
        domain: str = "",
    ) -> str:
        """Append a node and return its first output, named like the node by default."""
        name = self.unique_name(name)
        outputs = list(outputs) or [name]
        self.nodes.append(
            helper.make_node(operator, list(inputs), outputs, name=name, domain=domain, **attributes)
        )
        return outputs[0]

    def unique_name(self, name: str) -> str:
        """Reserve a name: ``name``, or ``name_2`` and so on if it is taken."""
        candidate, count = name, 1
        while candidate in self._names:
            count += 1
            candidate = f"{name}_{count}"
        self._names.add(candidate)
        return candidate

    def initializer(
        self, name: str, dtype: np.dtype[Any], shape: Sequence[int], load: Callable[[], np.ndarray]
    ) -> str:
        """Add a constant that is loaded on demand, once; a name stands for the same values."""
        if name not in self.initializers:
            self.initializers[name] = Initializer(name, dtype, tuple(shape), load)
        return name

    def optional_input(self, name: str, dtype: np.dtype[Any], shape: Sequence[int | str]) -> str:
        """Add an input that may be left out; its named dimensions are 0 then."""
        self.inputs.append(value_info(name, dtype.name, shape))
        empty = np.zeros([dim if isinstance(dim, int) else 0 for dim in shape], dtype)
        return self.initializer(name, dtype, empty.shape, lambda: empty)

    def constant(self, array: np.ndarray, hint: str) -> str:
        """Add a small constant, shared by all nodes that need the same values."""
        values = "x".join(str(value) for value in array.flatten().tolist()[:8])
        name = f"{hint}_{array.dtype}_{'x'.join(map(str, array.shape)) or 'scalar'}_{values}"
        if array.size > 8:
            raise ValueError(f"constant {hint} has {array.size} values; make it an initializer")
        return self.initializer(name, array.dtype, array.shape, lambda: array)

    def ints(self, *values: int) -> str:
        """Add a constant ``[n]`` of int64."""
        return self.constant(np.array(values, dtype=np.int64), "ints")

    def model(self) -> onnx.ModelProto:
        """Build the model without initializers; ``write_model`` adds them."""
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs)
        domains = {node.domain for node in self.nodes} - {""}
        imports = [helper.make_opsetid("", self.opset)]
        imports += [helper.make_opsetid(domain, 1) for domain in sorted(domains)]
        model = helper.make_model(graph, opset_imports=imports, producer_name="dsvl-export")
        model.ir_version = 10
        helper.set_model_props(model, {TAPS: json.dumps(self.taps)})
        return model

    def prune(self) -> None:
        """Remove nodes and initializers that no output and no tap depends on."""
        needed_names = {value.name for value in self.outputs} | set(self.taps.values())
        live = []
        for node in reversed(self.nodes):
            if needed_names.intersection(node.output):
                needed_names.update(node.input)
                live.append(node)
        self.nodes = live[::-1]
        self.initializers = {name: item for name, item in self.initializers.items() if name in needed_names}


def element_type(dtype: np.dtype[Any] | str) -> int:
    """Return ONNX's number of a numpy dtype."""
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def value_info(name: str, dtype: str, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    """Describe an input or output."""
    return helper.make_tensor_value_info(name, element_type(dtype), list(shape))
