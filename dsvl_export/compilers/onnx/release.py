"""The oldest ONNX Runtime that runs written files. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from onnx import TensorProto

from runtimes.backends.onnxruntime_releases import FEATURES, OLDEST, newest_release


def needed_release(files: Iterable[Path]) -> str:
    """The oldest release of ONNX Runtime that computes every one of some files; others are left out."""
    models = [onnx.load(str(file), load_external_data=False) for file in files if file.suffix == ".onnx"]
    return newest_release([OLDEST, *(FEATURES[name].since for model in models for name in features(model))])


def features(model: onnx.ModelProto) -> Iterator[str]:
    """Keys of ``FEATURES`` that a model holds."""
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
