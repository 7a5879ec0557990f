"""Loading a TensorRT engine from its file, on the GPU of this machine."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from runtimes.backends.engines.cuda import Cuda, Stream, import_cuda
from runtimes.backends.engines.library import get_logger, import_library
from runtimes.backends.engines.trust import is_trusted
from runtimes.bundle.manifest import DEBUG_PREFIX
from runtimes.errors import UserError
from runtimes.session import SessionOptions

GPU = "cuda"


@dataclass(frozen=True)
class LoadedEngine:
    """A loaded engine and the stream that it runs on."""

    trt: ModuleType
    cuda: Cuda
    runtime: Any
    engine: Any
    stream: Stream
    file: Path


def load_engine(library: str, file: Path, options: SessionOptions) -> LoadedEngine:
    """Load the engine in the folder of an artifact's ONNX file.

    Args:
        library: ``tensorrt`` or ``tensorrt_rtx``.
        file: the ONNX file.
        options: options of the session.

    Raises:
        UserError: there is no GPU or no engine, or TensorRT cannot load the engine.
    """
    if options.device not in (None, GPU):
        raise UserError(
            f"The backend {library} runs on {GPU}, or its ONNX files on cpu, not on {options.device}."
        )
    try:
        cuda = Cuda(import_cuda())
        cuda.gpu()
    except UserError as error:
        raise UserError(
            f"The engines of {library} need an NVIDIA GPU ({str(error).rstrip('.')}); use --device cpu to"
            " run their ONNX files in ONNX Runtime."
        ) from error
    plan = file.with_suffix(".engine")
    if not plan.is_file() and any(part.startswith(DEBUG_PREFIX) for part in plan.parts):
        raise UserError(
            "Engines have no taps, but their ONNX files do; run: dsvl-export parity --device cpu --taps."
        )
    if not plan.is_file():
        raise UserError(f"The engine {plan} does not exist; run: dsvl-export build-engine BUNDLE.")
    trt = import_library(library)
    logger = get_logger(trt)
    logger.messages.clear()
    try:
        runtime = trt.Runtime(logger)
    except TypeError as error:  # raised by the bindings if TensorRT returns null
        raise UserError(f"TensorRT cannot start: {logger.errors()}; check that the GPU is free.") from error
    trusted = is_trusted(plan)
    runtime.engine_host_code_allowed = trusted  # a version-compatible engine contains its runtime
    engine = runtime.deserialize_cuda_engine(_mapped(plan))
    if engine is None and not trusted:
        raise UserError(
            f"TensorRT cannot load {plan}: {logger.errors()}; host code in it is not run, because it was not"
            " built on this machine: build it again here, or use --trust-engine if you trust its author."
        )
    if engine is None:
        short = "memory" in logger.errors().lower()
        again = (
            "close other programs, or use a smaller precision" if short else "build it again on this machine"
        )
        raise UserError(f"TensorRT cannot load {plan}: {logger.errors()}; {again}.")
    if engine.streamable_weights_size:
        engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
    return LoadedEngine(trt, cuda, runtime, engine, Stream(cuda), plan)


def _mapped(plan: Path) -> mmap.mmap:
    """Map an engine's file instead of copying it to memory, which the GPU of a Jetson shares."""
    try:
        with plan.open("rb") as handle:
            return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise UserError(f"The engine {plan} is not readable: {error}.") from error
