"""Backends by name: modules of this package, or third parties' entry points."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

from runtimes.errors import UserError, first_line
from runtimes.session import Backend

BUILT_IN = ("coreai", "coreml", "executorch", "onnxruntime", "tensorrt", "tensorrt_rtx")
GROUP = "dsvl_export.runtimes"


def backend_names() -> list[str]:
    """All backends that can be asked for."""
    return sorted({*BUILT_IN, *(entry.name for entry in entry_points(group=GROUP))})


def load_backend(name: str) -> Backend:
    """The module of a backend; its own library is imported when a session is opened.

    Raises:
        UserError: there is no such backend.
    """
    if name in BUILT_IN:
        return cast(Backend, import_module(f"runtimes.backends.{name}"))
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            return cast(Backend, load_entry(entry))
    raise UserError(f"There is no backend {name!r}; there are {', '.join(backend_names())}.")


def load_entry(entry: EntryPoint) -> Any:
    """What a third party's entry point names.

    Raises:
        UserError: it cannot be imported.
    """
    try:
        return entry.load()
    except Exception as error:  # whatever a foreign module raises while it is imported
        owner = entry.dist.name if entry.dist else entry.value
        reason = first_line(error)
        raise UserError(f"The backend {entry.name!r} of {owner} cannot be loaded: {reason}.") from error
