"""Registry of backends: modules of this package and third parties' entry points."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, cast

from runtimes.errors import UserError, first_line
from runtimes.session import Backend

BUILT_IN = ("coreai", "coreml", "executorch", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx")
GROUP = "dsvl_export.runtimes"


if TYPE_CHECKING:  # mypy compares the modules with the protocols
    from runtimes.backends import coreai, coreml, executorch, onnxruntime, openvino, tensorrt, tensorrt_rtx
    from runtimes.backends.capabilities import DeclaresConcurrency, ProvidesEntryPoints, SwitchesAdapters

    _backends: tuple[Backend, ...] = (
        coreai, coreml, executorch, onnxruntime, openvino, tensorrt, tensorrt_rtx,
    )  # fmt: skip
    _provide_entry_points: tuple[ProvidesEntryPoints, ...] = (coreai, coreml, executorch, onnxruntime)
    _declare_concurrency: tuple[DeclaresConcurrency, ...] = (onnxruntime, openvino)
    _switch_adapters: tuple[SwitchesAdapters, ...] = (onnxruntime,)


def backend_names() -> list[str]:
    """List the names of all backends."""
    return sorted({*BUILT_IN, *(entry.name for entry in entry_points(group=GROUP))})


def load_backend(name: str) -> Backend:
    """Import the module of a backend; its library is imported when a session is opened.

    Raises:
        UserError: there is no such backend.
    """
    if name in BUILT_IN:
        return cast(Backend, import_module(f"runtimes.backends.{name}"))
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            return cast(Backend, load_entry(entry))
    raise UserError(f"There is no backend {name!r}; use one of {', '.join(backend_names())}.")


def load_entry(entry: EntryPoint) -> Any:
    """Load the object of a third party's entry point.

    Raises:
        UserError: it cannot be imported.
    """
    try:
        return entry.load()
    except Exception as error:  # the import of a third party's module can raise anything
        owner = entry.dist.name if entry.dist else entry.value
        reason = first_line(error)
        raise UserError(f"The backend {entry.name!r} of {owner} cannot be loaded: {reason}.") from error
