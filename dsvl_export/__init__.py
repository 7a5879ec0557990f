"""dsvl-export: DeepSeek-VL to ONNX Runtime, TensorRT, Core ML, Core AI and ExecuTorch, with proof.

``from dsvl_export import Pipeline, export, parity``; nothing heavy is imported before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsvl_export.version import __version__

if TYPE_CHECKING:
    from dsvl_export.exporting import export
    from dsvl_export.ladder import parity
    from runtimes.errors import UserError
    from runtimes.pipeline import Pipeline
    from runtimes.prompt import Message
    from runtimes.sampling import GenerationOptions

_HOMES = {
    "export": "dsvl_export.exporting",
    "parity": "dsvl_export.ladder",
    "Pipeline": "runtimes.pipeline",
    "Message": "runtimes.prompt",
    "GenerationOptions": "runtimes.sampling",
    "UserError": "runtimes.errors",
}

__all__ = ["GenerationOptions", "Message", "Pipeline", "UserError", "__version__", "export", "parity"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'dsvl_export' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
