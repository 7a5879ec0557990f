"""Import of the TensorRT libraries by name, and their logs."""

from __future__ import annotations

import re
from importlib import import_module
from types import ModuleType
from typing import Any

from runtimes.errors import UserError, first_line
from runtimes.installation import install_command

_LOGGERS: dict[str, Any] = {}


def import_library(name: str) -> ModuleType:
    """Import ``tensorrt`` or ``tensorrt_rtx``.

    Raises:
        UserError: it is not installed, or cannot be loaded here.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"The backend {name} is not installed; run: {install_command(name)}.") from error
    except (ImportError, OSError) as error:
        reason = first_line(error)
        raise UserError(f"The library {name} cannot be loaded here: {reason}; install it again.") from error


def first_log_line(text: str) -> str:
    """Return the first line of a log message, without source files and line numbers."""
    first = next((line for line in text.strip().splitlines() if line.strip()), "")
    return " ".join(re.sub(r"\[\w+\.\w+:[\w:]+\]|\S+\.cpp:\d+:?", "", first).split()).rstrip(".")


def get_logger(trt: ModuleType) -> Any:
    """Return the process's only logger of a TensorRT library; ``messages`` holds the log."""
    if trt.__name__ not in _LOGGERS:

        class Recorder(trt.ILogger):  # type: ignore[misc, name-defined]
            """Logger that keeps warnings and errors as (is an error, text)."""

            def __init__(self) -> None:
                """Start with an empty log."""
                trt.ILogger.__init__(self)
                self.messages: list[tuple[bool, str]] = []

            def errors(self) -> str:
                """Return the errors since the log was cleared, without source locations."""
                errors = [first_log_line(text) for error, text in self.messages if error]
                return "; ".join(dict.fromkeys(errors)) or "it gives no reason"

            def log(self, severity: Any, message: str) -> None:
                """Keep a message; called by TensorRT."""
                if severity <= trt.ILogger.WARNING:
                    self.messages.append((severity < trt.ILogger.WARNING, message))

        _LOGGERS[trt.__name__] = Recorder()
    return _LOGGERS[trt.__name__]
