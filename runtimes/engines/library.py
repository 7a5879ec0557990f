"""The TensorRT libraries by name, and the log of each."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

from runtimes.errors import UserError

EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
_LOGGERS: dict[str, Any] = {}


def import_library(name: str) -> ModuleType:
    """``tensorrt`` or ``tensorrt_rtx``.

    Raises:
        UserError: it is not installed, or cannot be loaded here.
    """
    try:
        return import_module(name)
    except (ImportError, OSError) as error:
        raise UserError(
            f"The backend {name} is not installed; run: pip install 'dsvl-export[{EXTRAS[name]}]'."
        ) from error


def logger_of(trt: ModuleType) -> Any:
    """The one logger of a process for a TensorRT library; ``messages`` holds the log."""
    if trt.__name__ not in _LOGGERS:

        class Recorder(trt.ILogger):  # type: ignore[misc, name-defined]
            """Keeps warnings and errors as (is an error, text)."""

            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.messages: list[tuple[bool, str]] = []

            def log(self, severity: Any, message: str) -> None:
                if severity <= trt.ILogger.WARNING:
                    self.messages.append((severity < trt.ILogger.WARNING, message))

        _LOGGERS[trt.__name__] = Recorder()
    return _LOGGERS[trt.__name__]
