"""Compiler ``tensorrt_rtx``: ONNX in the dialect trt11, and engines built without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import tensorrt_rtx

from dsvl_export.compilers.engines.build import EngineSettings, build_engine, check_capabilities
from dsvl_export.compilers.onnx.debug import debug_build
from dsvl_export.compilers.onnx.layers import run_layers
from dsvl_export.compilers.onnx.release import needed_release
from dsvl_export.compilers.protocol import Compiled
from dsvl_export.compilers.tensorrt import (
    CACHE_PRECISIONS,
    LAYER_PRECISIONS,
    PRECISIONS,
    RECIPE_BASE,
    lower_for,
    onnx_bytes,
    write_onnx,
)
from dsvl_export.lint import Release, refuse
from dsvl_export.lint.types import SINCE_SM
from dsvl_export.targets.options import CompileOptions
from runtimes.backends.onnxruntime_releases import NEEDED
from runtimes.bundle.manifest import Engine

if TYPE_CHECKING:
    from torch import Tensor

    from dsvl_export.compilers.onnx.builder import Graph
    from reference.trace import TracedComponent

# GPUs with tensor cores that TensorRT-RTX builds for: Ampere, Ada, Blackwell.
CAPABILITIES = (86, 89, 120)
OPTIONS: tuple[str, ...] = ("tensorrt.capabilities",)
DIALECT = "trt11"
__all__ = [
    "CACHE_PRECISIONS", "LAYER_PRECISIONS", "OPTIONS", "PRECISIONS", "RECIPE_BASE",
    "artifact_bytes", "compile_component", "debug_build", "graphs", "run_layers", "settings",
]  # fmt: skip


def settings(options: CompileOptions) -> dict[str, Any]:
    """See ``Compiler.settings``.

    Raises:
        UserError: TensorRT-RTX builds no engines for one of the capabilities.
    """
    sm = options.target.sm if options.target else None
    check_capabilities(tensorrt_rtx, options.tensorrt.capabilities)
    return {
        "capabilities": options.tensorrt.capabilities or ((sm,) if sm else CAPABILITIES),
        "capacity": options.capacity,
        "library": tensorrt_rtx.__version__,
    }


def graphs(traced: TracedComponent, load: Callable[[str], Tensor], options: CompileOptions) -> list[Graph]:
    """See ``BuildsGraphs.graphs``."""
    return [lower_for(DIALECT, traced, load)]


def artifact_bytes(traced: TracedComponent, options: CompileOptions) -> int:
    """See ``Compiler.artifact_bytes``."""
    return onnx_bytes(traced, DIALECT)


def compile_component(
    traced: TracedComponent,
    load: Callable[[str], Tensor],
    folder: Path,
    on_bytes: Callable[[int], None],
    options: CompileOptions,
) -> Compiled:
    """Write ``<component>.onnx`` and ``<component>.engine``.

    Raises:
        ValueError: the written file breaks the contract.
        UserError: TensorRT-RTX refuses it.
    """
    files = write_onnx(traced, load, folder, on_bytes, DIALECT)
    chosen = settings(options)["capabilities"]
    eight_bit_floats = any("float8" in str(node.target) for node in traced.program.graph.nodes)
    capabilities = tuple(chosen)
    if eight_bit_floats and not options.tensorrt.capabilities:
        capabilities = tuple(sm for sm in chosen if sm >= SINCE_SM[onnx.TensorProto.FLOAT8E4M3FN])
    refuse(files[0], Release.tensorrt_rtx(min(capabilities)))
    engine = folder / f"{traced.contract.component}.engine"
    building = EngineSettings(options.capacity, compute_capabilities=capabilities)
    build_engine(tensorrt_rtx, files[0], traced.contract, building, engine)
    built = Engine(
        engine.name, capabilities, "", "", tensorrt_rtx.__version__, building.capacity, building.max_batch
    )
    target = options.target_name("rtx")
    tools = {
        "onnx": onnx.__version__,
        "tensorrt-rtx": tensorrt_rtx.__version__,
        NEEDED: needed_release(files),
    }
    return Compiled((*files, engine), target, DIALECT, tools, built)
