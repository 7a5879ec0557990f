"""Compiler ``coreai``: an ``.aimodel`` per component for iOS 27 and macOS 27."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dsvl_export.compilers.protocol import Compiled
from dsvl_export.targets.options import CompileOptions
from runtimes.backends.coreai import PROGRAM, open_asset
from runtimes.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from reference.trace import TracedComponent
    from runtimes.bundle.contracts import Contract

if find_spec("coreai_torch") is None:
    raise ModuleNotFoundError("there is no coreai_torch", name="coreai_torch")

PRECISIONS: tuple[str, ...] = ("fp16", "fp32")
LAYER_PRECISIONS: tuple[str, ...] = ("int8", "int8-weights", "int4", "palette4")
CACHE_PRECISIONS: tuple[str, ...] = ()
RECIPE_BASE = "fp16"
OPTIONS: tuple[str, ...] = ()
TARGET = "apple"
__all__ = [
    "CACHE_PRECISIONS", "LAYER_PRECISIONS", "OPTIONS", "PRECISIONS", "RECIPE_BASE",
    "artifact_bytes", "compile_component", "debug_build", "settings",
]  # fmt: skip


def settings(options: CompileOptions) -> dict[str, Any]:
    """See ``Compiler.settings``."""
    return {"capacity": options.capacity, "target": options.target_name(TARGET)}


def compile_component(
    traced: TracedComponent,
    load: Callable[[str], Tensor],
    folder: Path,
    on_bytes: Callable[[int], None],
    options: CompileOptions,
) -> Compiled:
    """Write ``<component>.aimodel`` and load it once in Apple's runtime.

    Raises:
        UserError: Core AI refuses the program.
    """
    # Deferred: imports coreai_torch.
    from dsvl_export.compilers.coreai_asset.asset import write_asset

    asset = write_asset(folder, traced, load, options.capacity)
    files = sorted(file for file in asset.rglob("*") if file.is_file() and file.name != PROGRAM)
    on_bytes(sum(file.stat().st_size for file in (asset / PROGRAM, *files)))
    open_asset(asset / PROGRAM, traced.contract).close()
    tools = {name: version(name) for name in ("coreai-core", "coreai-torch")}
    capacity = options.capacity if traced.contract.states else None
    target = options.target_name(TARGET)
    return Compiled((asset / PROGRAM, *files), target, "coreai", tools, capacity=capacity)


def artifact_bytes(traced: TracedComponent, options: CompileOptions) -> int:
    """See ``Compiler.artifact_bytes``."""
    from dsvl_export.compilers.lowering import parameter_bytes  # deferred: imports torch

    return parameter_bytes(traced)


def debug_build(artifact: Path, contract: Contract, folder: Path) -> NoReturn:
    """Raise UserError: Core AI assets cannot have taps.

    Raises:
        UserError: always.
    """
    raise UserError("Core AI assets cannot have taps, so the first layer that differs cannot be located.")
