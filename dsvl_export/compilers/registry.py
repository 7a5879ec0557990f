"""Compilers by name: modules of this package, or third parties' entry points."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from operator import attrgetter
from typing import TYPE_CHECKING, cast

from dsvl_export.compilers.protocol import Compiler, DeclaresOptions
from dsvl_export.targets.options import CompileOptions
from runtimes.backends.registry import load_entry
from runtimes.errors import UserError
from runtimes.installation import install_command

BUILT_IN = ("coreai", "coreml", "executorch", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx")
GROUP = "dsvl_export.compilers"
# The extras that an export needs. ``tensorrt`` builds engines with the device's own TensorRT.
EXTRAS = {
    "coreai": "coreai",
    "coreml": "coreml",
    "executorch": "executorch",
    "onnxruntime": "export,onnxruntime",
    "openvino": "export,openvino",
    "tensorrt": "export",
    "tensorrt_rtx": "export,tensorrt-rtx",
}
# Options of some backends, as paths in ``CompileOptions`` → their names on the command line.
FLAGS = {
    "onnxruntime.prefill": "--no-prefill",
    "onnxruntime.switchable": "--switchable",
    "tensorrt.version": "--tensorrt",
    "tensorrt.capabilities": "--sm",
    "executorch.delegate": "--delegate",
}

if TYPE_CHECKING:  # mypy compares the modules with the protocols
    from dsvl_export.compilers import (
        coreai,
        coreml,
        executorch,
        onnxruntime,
        openvino,
        tensorrt,
        tensorrt_rtx,
    )
    from dsvl_export.compilers.protocol import (
        BuildsGraphs,
        ChecksPlans,
        CompilesComponents,
        CompilesProgram,
        NeedsScratch,
        RunsLayers,
        WritesListing,
    )

    _compilers: tuple[Compiler, ...] = (
        coreai, coreml, executorch, onnxruntime, openvino, tensorrt, tensorrt_rtx,
    )  # fmt: skip
    _declare_options: tuple[DeclaresOptions, ...] = (
        coreai, coreml, executorch, onnxruntime, openvino, tensorrt, tensorrt_rtx,
    )  # fmt: skip
    _compile_components: tuple[CompilesComponents, ...] = (
        coreai, coreml, onnxruntime, openvino, tensorrt, tensorrt_rtx,
    )  # fmt: skip
    _compile_programs: tuple[CompilesProgram, ...] = (executorch,)
    _check_plans: tuple[ChecksPlans, ...] = (executorch, onnxruntime)
    _build_graphs: tuple[BuildsGraphs, ...] = (onnxruntime, tensorrt, tensorrt_rtx)
    _run_layers: tuple[RunsLayers, ...] = (coreml, onnxruntime, openvino, tensorrt, tensorrt_rtx)
    _need_scratch: tuple[NeedsScratch, ...] = (openvino,)
    _write_listings: tuple[WritesListing, ...] = (coreml,)


def compiler_names() -> list[str]:
    """List all backends that a checkpoint can be exported to."""
    return sorted({*BUILT_IN, *(entry.name for entry in entry_points(group=GROUP))})


def load_compiler(name: str, debug_build: bool = False) -> Compiler:
    """Load the compiler of a backend.

    Args:
        name: name of the backend.
        debug_build: the compiler is needed for ``debug_build`` alone, which needs no torch.

    Raises:
        UserError: there is no backend of that name, or a package that it needs is not installed.
    """
    if name in BUILT_IN:
        try:
            return cast(Compiler, import_module(f"dsvl_export.compilers.{name}"))
        except ImportError as error:
            if debug_build:
                missing = error.name or str(error)
                raise UserError(f"A debug build needs {missing}; run: {install_command(missing)}.") from error
            raise UserError(
                f"Exporting to {name} needs {error.name}; run: pip install 'dsvl-export[{EXTRAS[name]}]'."
            ) from error
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            return cast(Compiler, load_entry(entry))
    raise UserError(f"There is no backend {name!r}; use one of {', '.join(compiler_names())}.")


def check_options(compilers: Mapping[str, Compiler], options: CompileOptions) -> None:
    """Refuse an option that none of the backends of an export has.

    Args:
        compilers: backend → compiler.
        options: the options of the export.

    Raises:
        UserError: the option differs from its default.
    """
    usual = CompileOptions()
    for name, flag in FLAGS.items():
        value_of = attrgetter(name)
        has = any(
            not isinstance(item, DeclaresOptions) or name in item.OPTIONS for item in compilers.values()
        )
        if not has and value_of(options) != value_of(usual):
            raise UserError(
                f"{' and '.join(compilers)} has no {flag}; 'dsvl-export export --help' names the backends"
                " that have it."
            )
