"""Compiler ``tensorrt``: ONNX files in the dialect of a TensorRT version.

``dsvl-export build-engine`` builds the engine on the device, from the bundle alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from dsvl_export.compilers.onnx.check import check_file
from dsvl_export.compilers.onnx.debug import debug_build
from dsvl_export.compilers.onnx.layers import run_layers
from dsvl_export.compilers.onnx.release import needed_release
from dsvl_export.compilers.onnx.writer import write_model
from dsvl_export.compilers.protocol import Compiled
from dsvl_export.lint import Release, refuse
from dsvl_export.targets.options import CompileOptions
from runtimes.backends.onnxruntime_releases import NEEDED

if TYPE_CHECKING:
    from torch import Tensor

    from dsvl_export.compilers.onnx.builder import Graph
    from dsvl_export.compilers.onnx.context import Dialect
    from reference.trace import TracedComponent

PRECISIONS: tuple[str, ...] = ("fp32", "fp16", "bf16")
LAYER_PRECISIONS: tuple[str, ...] = ("int8", "fp8", "int8-weights", "int4")
CACHE_PRECISIONS: tuple[str, ...] = ()  # KVCacheUpdate takes float caches alone
RECIPE_BASE = "fp16"
OPTIONS: tuple[str, ...] = ("tensorrt.version",)
TARGET = "cuda"
__all__ = [
    "CACHE_PRECISIONS", "LAYER_PRECISIONS", "OPTIONS", "PRECISIONS", "RECIPE_BASE",
    "artifact_bytes", "compile_component", "debug_build", "graphs", "run_layers", "settings",
]  # fmt: skip


def settings(options: CompileOptions) -> dict[str, Any]:
    """See ``Compiler.settings``."""
    return {"target": options.target_name(TARGET), "tensorrt": str(options.tensorrt_version())}


def make_dialect(name: str, traced: TracedComponent) -> Dialect:
    """Create the dialect of this name for a component."""
    # Deferred: imports torch, which a debug build does without.
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
    """Write ``<component>.onnx`` and check it against the rules of the target's TensorRT version.

    Raises:
        ValueError: the written file breaks the contract.
        UserError: this TensorRT version, or the target's GPU, does not support the file.
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
    """Lower a component, write its ONNX file and check it against the contract."""
    file = folder / f"{traced.contract.component}.onnx"
    files = write_model(lower_for(dialect, traced, load), file, on_bytes)
    check_file(file, traced.contract, make_dialect(dialect, traced).state_output)
    return files


def graphs(traced: TracedComponent, load: Callable[[str], Tensor], options: CompileOptions) -> list[Graph]:
    """See ``BuildsGraphs.graphs``."""
    return [lower_for(Release(options.tensorrt_version()).dialect, traced, load)]


def lower_for(dialect: str, traced: TracedComponent, load: Callable[[str], Tensor]) -> Graph:
    """Lower a component to a graph in a dialect."""
    from dsvl_export.compilers.onnx.lower import lower  # deferred: imports torch

    return lower(traced, load, make_dialect(dialect, traced))


def artifact_bytes(traced: TracedComponent, options: CompileOptions) -> int:
    """See ``Compiler.artifact_bytes``."""
    return onnx_bytes(traced, Release(options.tensorrt_version()).dialect)


def onnx_bytes(traced: TracedComponent, dialect: str) -> int:
    """Compute the bytes of an ONNX file's weights and graph; an engine takes about as much."""
    from dsvl_export.compilers.lowering import without_weights  # deferred: imports torch

    graph = lower_for(dialect, traced, without_weights)
    return sum(item.nbytes for item in graph.initializers.values()) + graph.model().ByteSize()
