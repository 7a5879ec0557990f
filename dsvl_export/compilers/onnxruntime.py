"""Compiler ``onnxruntime``: an ONNX file per component, checked by onnx.checker and by loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnxruntime

from dsvl_export.compilers import Compiled, CompileOptions
from dsvl_export.onnx_graph.check import check_file
from dsvl_export.onnx_graph.debug import debug_build
from runtimes.errors import UserError, first_line

if TYPE_CHECKING:
    from torch import Tensor

    from reference.trace import TracedComponent

PRECISIONS = ("fp32", "fp16")
LAYER_PRECISIONS = ("int8", "fp8", "int8-weights", "int4")
CACHE_PRECISIONS = ("int8",)
RECIPE_BASE = "fp32"
__all__ = ["artifact_bytes", "compile_component", "debug_build", "settings"]


def settings(options: CompileOptions) -> dict[str, Any]:
    return {}


def compile_component(
    traced: TracedComponent,
    load: Callable[[str], Tensor],
    folder: Path,
    on_bytes: Callable[[int], None],
    options: CompileOptions,
) -> Compiled:
    """Write ``<component>.onnx`` (with ``.data`` beside it above 1 GB of weights).

    Raises:
        ValueError: the written file breaks the contract or a rule of quantization.
        UserError: ONNX Runtime has no kernel for the decoder's head size.
    """
    # Here, so that a debug build needs no torch.
    from dsvl_export.onnx_graph.dialect_ort import OrtDialect
    from dsvl_export.onnx_graph.lower import lower
    from dsvl_export.onnx_graph.writer import write_model

    graph = lower(traced, load, OrtDialect())
    file = folder / f"{traced.contract.component}.onnx"
    files = write_model(graph, file, on_bytes)
    check_file(file, traced.contract)
    _load_once(file)
    tools = {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
    return Compiled(tuple(files), "cpu", "ort", tools)


def artifact_bytes(traced: TracedComponent, options: CompileOptions) -> int:
    """Weights and graph; alignment and protobuf's own bytes per weight are left out."""
    from dsvl_export.lowering import without_weights
    from dsvl_export.onnx_graph.dialect_ort import OrtDialect
    from dsvl_export.onnx_graph.lower import lower

    graph = lower(traced, without_weights, OrtDialect())
    return sum(item.nbytes for item in graph.initializers.values()) + graph.model().ByteSize()


def _load_once(file: Path) -> None:
    """Every kernel is there. Unoptimised, so that half precision is not widened to check a big file."""
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.add_session_config_entry("session.disable_prepacking", "1")
    settings.log_severity_level = 3
    try:
        onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        reason = first_line(error)
        raise UserError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {file.name}: {reason}."
        ) from error
