"""Compiler ``tensorrt_rtx``: ONNX in the dialect trt11, and engines built from it without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import tensorrt_rtx

from dsvl_export.compilers import Compiled, CompileOptions
from dsvl_export.compilers.tensorrt import artifact_bytes, write_onnx
from dsvl_export.engines.building import EngineSettings, build_engine
from dsvl_export.linter import Release, refuse
from dsvl_export.onnx_graph.debug import debug_build
from runtimes.bundle import Engine
from runtimes.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from reference.trace import TracedComponent

PRECISIONS = ("fp32", "fp16", "bf16")
LAYER_PRECISIONS = ("int8", "fp8", "int8-weights", "int4")
CACHE_PRECISIONS: tuple[str, ...] = ()
RECIPE_BASE = "fp16"
# GPUs with tensor cores that TensorRT-RTX builds for: Ampere, Ada, Blackwell.
CAPABILITIES = (86, 89, 120)
FP8_SINCE = 89
DIALECT = "trt11"
__all__ = ["artifact_bytes", "compile_component", "debug_build", "settings"]


def settings(options: CompileOptions) -> dict[str, Any]:
    if options.tensorrt:
        raise UserError(
            "tensorrt_rtx builds with the TensorRT-RTX that is installed;"
            " --tensorrt is for the backend tensorrt."
        )
    sm = options.target.sm if options.target else None
    return {
        "capabilities": options.capabilities or ((sm,) if sm else CAPABILITIES),
        "capacity": options.capacity,
        "library": tensorrt_rtx.__version__,
    }


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
    if eight_bit_floats and not options.capabilities:
        capabilities = tuple(sm for sm in chosen if sm >= FP8_SINCE)
    refuse(files[0], Release.tensorrt_rtx(min(capabilities)))
    engine = folder / f"{traced.contract.component}.engine"
    building = EngineSettings(options.capacity, compute_capabilities=capabilities)
    build_engine(tensorrt_rtx, files[0], traced.contract, building, engine)
    built = Engine(
        engine.name, capabilities, "", "", tensorrt_rtx.__version__, building.capacity, building.max_batch
    )
    target = options.target.name if options.target else "rtx"
    tools = {"onnx": onnx.__version__, "tensorrt-rtx": tensorrt_rtx.__version__}
    return Compiled((*files, engine), target, DIALECT, tools, built)
