"""Backend ``tensorrt``: engines on an NVIDIA GPU, or on a CPU their ONNX files in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from runtimes.backends.engines import backend
from runtimes.bundle.contracts import Contract
from runtimes.session import ComponentSession, DecoderSession, Execution, SessionOptions

if TYPE_CHECKING:
    from runtimes.bundle.manifest import Artifact

LIBRARY = "tensorrt"


def devices() -> list[str]:
    return backend.devices(LIBRARY)


def execution(artifact: Artifact, device: str | None = None) -> Execution:
    return backend.execution(LIBRARY, artifact, device)


def open_component(file: Path, contract: Contract, options: SessionOptions) -> ComponentSession:
    return backend.open_component(LIBRARY, file, contract, options)


def open_decoder(file: Path, contract: Contract, options: SessionOptions) -> DecoderSession:
    return backend.open_decoder(LIBRARY, file, contract, options)
