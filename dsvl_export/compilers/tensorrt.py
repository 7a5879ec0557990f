"""Compiler ``tensorrt``: ONNX in the dialect of a TensorRT version; the engine is built where its GPU is.

``dsvl-export build-engine`` builds it there, from the bundle alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from dsvl_export.compilers import Compiled
from dsvl_export.compilers.onnx.check import check_file
from dsvl_export.compilers.onnx.debug import debug_build
from dsvl_export.compilers.onnx.layers import run_layers
from dsvl_export.compilers.onnx.release import needed_release
from dsvl_export.lint import Release, refuse
from dsvl_export.targets.options import CompileOptions
from runtimes.backends.onnxruntime_releases import NEEDED

if TYPE_CHECKING:
    from torch import Tensor

    from dsvl_export.compilers.onnx.builder import Graph
    from dsvl_export.compilers.onnx.context import Dialect
    from reference.trace import TracedComponent

PRECISIONS = ("fp32", "fp16", "bf16")
LAYER_PRECISIONS = ("int8", "fp8", "int8-weights", "int4")
CACHE_PRECISIONS: tuple[str, ...] = ()  # KVCacheUpdate takes float caches alone
RECIPE_BASE = "fp16"
OPTIONS = ("tensorrt.version",)
TARGET = "cuda"
__all__ = ["artifact_bytes", "compile_component", "debug_build", "graphs", "run_layers", "settings"]


def settings(options: CompileOptions) -> dict[str, Any]:
    return {"target": options.target_name(TARGET), "tensorrt": str(options.tensorrt_version())}


def make_dialect(name: str, traced: TracedComponent) -> Dialect:
    from dsvl_export.compilers.onnx.dialect_trt10 import Trt10Dialect
    from dsvl_export.compilers.onnx.dialect_trt11 import Trt11Dialect

    return Trt11Dialect() if name == "trt11" else Trt10Dialect(traced)


def compile_component(
    traced: TracedComponent,
    load: Callable[[str], Tensor],
    folder: Path,
    on_bytes: Callable[[int], None],
    options: CompileOptions,
) -> Compiled:
    """Write ``<component>.onnx`` and check it by the rules of the TensorRT that will build its engine.

    Raises:
        ValueError: the written file breaks the contract.
        UserError: that TensorRT, or the target's GPU, cannot take it.
    """
    release = Release(options.tensorrt_version(), options.target.sm if options.target else None)
    files = write_onnx(traced, load, folder, on_bytes, release.dialect)
    refuse(files[0], release)
    tools = {"onnx": onnx.__version__, "for": str(release.version), NEEDED: needed_release(files)}
    return Compiled(tuple(files), options.target_name(TARGET), release.dialect, tools)


def write_onnx(
    traced: TracedComponent,
    load: Callable[[str], Tensor],
    folder: Path,
    on_bytes: Callable[[int], None],
    dialect: str,
) -> list[Path]:
    """Lower, write and check a component's ONNX file."""
    # Here, so that a debug build needs no torch.
    from dsvl_export.compilers.onnx.writer import write_model

    file = folder / f"{traced.contract.component}.onnx"
    files = write_model(lower_for(dialect, traced, load), file, on_bytes)
    check_file(file, traced.contract, make_dialect(dialect, traced).state_output)
    return files


def graphs(traced: TracedComponent, load: Callable[[str], Tensor], options: CompileOptions) -> list[Graph]:
    """The graph of the component's ONNX file."""
    return [lower_for(Release(options.tensorrt_version()).dialect, traced, load)]


def lower_for(dialect: str, traced: TracedComponent, load: Callable[[str], Tensor]) -> Graph:
    """The component's graph in a dialect."""
    from dsvl_export.compilers.onnx.lower import lower

    return lower(traced, load, make_dialect(dialect, traced))


def artifact_bytes(traced: TracedComponent, options: CompileOptions) -> int:
    return onnx_bytes(traced, Release(options.tensorrt_version()).dialect)


def onnx_bytes(traced: TracedComponent, dialect: str) -> int:
    """Weights and graph of the ONNX file; an engine is about as large once more."""
    from dsvl_export.compilers.lowering import without_weights

    graph = lower_for(dialect, traced, without_weights)
    return sum(item.nbytes for item in graph.initializers.values()) + graph.model().ByteSize()
