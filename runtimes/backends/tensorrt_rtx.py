"""Backend ``tensorrt_rtx``: engines of TensorRT-RTX; otherwise like ``tensorrt``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from runtimes.backends.engines import backend
from runtimes.bundle.contracts import Contract
from runtimes.session import ComponentSession, DecoderSession, Execution, SessionOptions

if TYPE_CHECKING:
    from runtimes.bundle.manifest import Artifact

LIBRARY = "tensorrt_rtx"


def devices() -> list[str]:
    """List the devices that this machine supports; see ``Backend.devices``."""
    return backend.devices(LIBRARY)


def execution(artifact: Artifact, device: str | None = None) -> Execution:
    """Determine whether an artifact can run here; see ``Backend.execution``."""
    return backend.execution(LIBRARY, artifact, device)


def open_component(file: Path, contract: Contract, options: SessionOptions) -> ComponentSession:
    """Open a component; see ``Backend.open_component``."""
    return backend.open_component(LIBRARY, file, contract, options)


def open_decoder(file: Path, contract: Contract, options: SessionOptions) -> DecoderSession:
    """Open the decoder; see ``Backend.open_decoder``."""
    return backend.open_decoder(LIBRARY, file, contract, options)
