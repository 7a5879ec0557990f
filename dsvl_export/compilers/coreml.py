"""Compiler ``coreml``: a ``.mlpackage`` per component for iOS 18 and macOS 15."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsvl_export.compilers.mil.check import check_package
from dsvl_export.compilers.mil.debug import debug_build
from dsvl_export.compilers.mil.layers import run_layers
from dsvl_export.compilers.mil.listing import FILE, render_listing
from dsvl_export.compilers.protocol import App, Compiled
from dsvl_export.targets.options import CompileOptions
from runtimes.backends.mil.package import package_files

if TYPE_CHECKING:
    from torch import Tensor

    from reference.trace import TracedComponent

if find_spec("coremltools") is None:
    raise ModuleNotFoundError("there is no coremltools", name="coremltools")

PRECISIONS: tuple[str, ...] = ("fp16",)
LAYER_PRECISIONS: tuple[str, ...] = ("int8", "int8-weights", "int4", "palette4")
CACHE_PRECISIONS: tuple[str, ...] = ()  # states are half precision
RECIPE_BASE = "fp16"
OPTIONS: tuple[str, ...] = ()
TARGET = "apple"
__all__ = [
    "CACHE_PRECISIONS", "LAYER_PRECISIONS", "OPTIONS", "PRECISIONS", "RECIPE_BASE",
    "artifact_bytes", "compile_component", "debug_build", "run_layers", "settings", "write_listing",
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
    """Write ``<component>.mlpackage``; its specification is the main file.

    Raises:
        ValueError: the written package breaks the contract.
    """
    # Deferred: imports torch, which a debug build does without, and coremltools.
    from dsvl_export.compilers.mil.context import Weights
    from dsvl_export.compilers.mil.functions import build_functions
    from dsvl_export.compilers.mil.package import write_package

    weights = Weights()
    functions = build_functions(traced, load, weights, options.capacity, options.preprocessing)
    package = write_package(folder, traced, functions, weights, options.preprocessing, on_bytes)
    check_package(package, traced.contract)
    tools = {"coremltools": version("coremltools")}
    capacity = options.capacity if traced.contract.states else None
    target, files = options.target_name(TARGET), tuple(package_files(package))
    return Compiled(files, target, "mil", tools, capacity=capacity)


def write_listing(folder: Path, app: App) -> None:
    """Write the decode loop in Swift."""
    (folder / FILE).write_text(render_listing(app), encoding="utf-8")


def artifact_bytes(traced: TracedComponent, options: CompileOptions) -> int:
    """See ``Compiler.artifact_bytes``."""
    from dsvl_export.compilers.lowering import parameter_bytes  # deferred: imports torch

    return parameter_bytes(traced)
