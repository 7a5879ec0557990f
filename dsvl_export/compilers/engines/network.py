"""A TensorRT network from an ONNX file, with the cache's capacity and attention's lengths set.

Works with ``tensorrt`` and ``tensorrt_rtx``: the module is an argument.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx

from runtimes.backends.engines.library import first_log_line, get_logger
from runtimes.bundle.contracts import Contract
from runtimes.errors import UserError

# Of the parser's warnings those that say nothing about the result, of the builder's those that do.
HARMLESS = ("has Int64 binding",)
LEFT_OUT = ("Unused Input", "is unused")


class ParsedNetwork:
    """A TensorRT builder with the network of one ONNX file.

    Args:
        trt: ``tensorrt`` or ``tensorrt_rtx``.
        file: an ONNX file of the dialect trt10 or trt11.
        contract: contract of the component.
        capacity: tokens of the KV cache. KVCacheUpdate needs a static length, which a file of the
            dialect trt11 leaves open; it is set here.

    Raises:
        UserError: the parser refuses the file, or warns of something that changes what it computes.
    """

    def __init__(self, trt: ModuleType, file: Path, contract: Contract, capacity: int) -> None:
        """Parse the file; see the class for the arguments."""
        self.trt, self.file, self.contract = trt, file, contract
        model = onnx.load(str(file), load_external_data=False)
        self.updates_cache = any(node.op_type == "TensorScatter" for node in model.graph.node)
        if self.updates_cache:
            _set_capacity(model, contract, capacity)
        self.logger = get_logger(trt)
        try:
            self.builder = trt.Builder(self.logger)
        except TypeError as error:  # how the bindings say that TensorRT gave none
            raise UserError(
                f"TensorRT cannot start here: {self.logger.errors()}; check that the GPU is free."
            ) from error
        strong = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        self.network = self.builder.create_network(1 << int(strong))
        self._parser = trt.OnnxParser(self.network, self.logger)
        self.logger.messages.clear()  # warnings of a starting builder do not concern the file
        if not self._parser.parse(model.SerializeToString(), str(file)):
            errors = [self._parser.get_error(index) for index in range(self._parser.num_errors)]
            where = errors[0].node_name() if errors else ""
            reason = first_log_line(errors[0].desc()) if errors else self.logger.errors()
            raise UserError(f"TensorRT cannot import {file}{f' at {where}' if where else ''}: {reason}.")
        self._refuse([text for text in self.warnings() if not any(known in text for known in HARMLESS)])
        if self.updates_cache:
            self._limit_attention()

    def warnings(self) -> list[str]:
        """List the warnings that TensorRT has logged since the parser was created."""
        return [text for error, text in self.logger.messages if not error]

    def check_build(self) -> None:
        """Refuse a build that left out a part of the file.

        Raises:
            UserError: a warning says so.
        """
        self._refuse([text for text in self.warnings() if any(known in text for known in LEFT_OUT)])

    def _refuse(self, suspicious: list[str]) -> None:
        if suspicious:
            raise UserError(
                f"TensorRT accepts {self.file} with a warning, so the engine may compute something else:"
                f" {first_log_line(suspicious[0])}."
            )

    def input(self, name: str) -> Any:
        """Return the network's input of this name."""
        return next(tensor for tensor in self.inputs() if tensor.name == name)

    def inputs(self) -> list[Any]:
        """List the network's inputs."""
        return [self.network.get_input(index) for index in range(self.network.num_inputs)]

    def _limit_attention(self) -> None:
        """Set the row lengths of every attention over the cache (TensorRT 11, TensorRT-RTX 1.5).

        The mask says the same. But with a mask alone, a kernel reads the whole capacity in each
        step; with the lengths, it can stop where the row ends.
        """
        trt, network = self.trt, self.network
        if not hasattr(getattr(trt, "IAttention", None), "key_value_lengths"):
            return
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        heads = [layer for layer in layers if layer.type == trt.LayerType.ATTENTION_INPUT]
        if not heads:  # float32: matrix products
            return
        # Positions are consecutive in a row, so its largest is its length minus one.
        last = network.add_reduce(self.input("positions"), trt.ReduceOperation.MAX, 1 << 1, False)
        one = network.add_constant((1,), trt.Weights(np.ones(1, np.int64)))
        length = network.add_elementwise(last.get_output(0), one.get_output(0), trt.ElementWiseOperation.SUM)
        lengths = network.add_cast(length.get_output(0), trt.int32).get_output(0)
        for layer in heads:
            attention_of(trt, layer).key_value_lengths = lengths


def attention_of(trt: ModuleType, layer: Any) -> Any:
    """Return the ``IAttention`` that an input layer belongs to.

    ``get_layer`` returns every layer as an ``ILayer``, and the bindings have no cast, so the class
    is changed.
    """
    layer.__class__ = trt.IAttentionInputLayer
    return layer.attention


def _set_capacity(model: onnx.ModelProto, contract: Contract, capacity: int) -> None:
    states = {spec.name for spec in contract.states}
    for value in (*model.graph.input, *model.graph.output):
        if value.name.removesuffix("_updated") in states:
            value.type.tensor_type.shape.dim[2].dim_value = capacity
