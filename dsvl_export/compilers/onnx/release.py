"""The oldest ONNX Runtime release that runs written files. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from onnx import TensorProto

from runtimes.backends.onnxruntime_releases import FEATURES, OLDEST, newest_release


def needed_release(files: Iterable[Path]) -> str:
    """Return the oldest ONNX Runtime release that runs all ONNX files among these."""
    models = [onnx.load(str(file), load_external_data=False) for file in files if file.suffix == ".onnx"]
    return newest_release([OLDEST, *(FEATURES[name].since for model in models for name in features(model))])


def features(model: onnx.ModelProto) -> Iterator[str]:
    """List the keys of ``FEATURES`` that a model uses."""
    opset = next(item.version for item in model.opset_import if item.domain in ("", "ai.onnx"))
    types = {item.name: item.data_type for item in model.graph.initializer}
    if opset >= 24:
        yield "opset24"
    for node in model.graph.node:
        if node.op_type == "TensorScatter":
            yield "tensor-scatter"
        elif node.op_type == "GroupQueryAttention":
            if any(item.name == "kv_cache_bit_width" for item in node.attribute):
                yield "int8-cache"
        elif node.op_type == "QuantizeLinear":
            scale, codes = (types.get(name) for name in node.input[1:3])
            if opset >= 23:
                yield "opset23-quantize"
            if codes == TensorProto.FLOAT8E4M3FN:
                if scale == TensorProto.FLOAT:
                    yield "float8"
            elif scale == TensorProto.FLOAT16:
                yield "float16-quantize"
