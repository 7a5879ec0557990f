"""Compilers by name: modules of this package, or third parties' entry points."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from dsvl_export.targets.options import CompileOptions
from runtimes.backends.registry import load_entry
from runtimes.bundle.bundle import Engine
from runtimes.bundle.contracts import Contract
from runtimes.errors import UserError
from runtimes.installation import install_command
from runtimes.preprocess import PreprocessSpec
from runtimes.text.tokenizer import PromptSpec

if TYPE_CHECKING:
    from calibration.precision_plan import PrecisionPlan
    from reference.model.config import ModelConfig
    from reference.trace import TracedComponent

BUILT_IN = ("coreai", "coreml", "executorch", "onnxruntime", "tensorrt", "tensorrt_rtx")
GROUP = "dsvl_export.compilers"
# The extras that exporting takes; an engine of ``tensorrt`` is built by what its device has.
EXTRAS = {
    "coreai": "coreai",
    "coreml": "coreml",
    "executorch": "executorch",
    "onnxruntime": "export,onnxruntime",
    "tensorrt": "export",
    "tensorrt_rtx": "export,tensorrt-rtx",
}
# Options that only some backends have, as paths in CompileOptions, and their flags.
FLAGS = {
    "onnxruntime.prefill": "--no-prefill",
    "tensorrt.version": "--tensorrt",
    "tensorrt.capabilities": "--sm",
    "executorch.delegate": "--delegate",
}


@dataclass(frozen=True)
class Compiled:
    """What a compiler made of one component: its files (the main one first) and how.

    ``engine``, where one was built, names its file by the bare name. ``capacity`` is that of a decoder whose
    KV cache was fixed when it was compiled.
    """

    files: tuple[Path, ...]
    target: str
    dialect: str
    tools: dict[str, str]
    engine: Engine | None = None
    capacity: int | None = None


@dataclass(frozen=True)
class App:
    """What an app that uses a bundle's artifacts has to know.

    ``embedding`` and ``tokenizer`` are the bundle's files of the token embeddings and of the tokenizer.
    """

    contracts: dict[str, Contract]
    preprocessing: PreprocessSpec
    prompt: PromptSpec
    embedding: Path
    tokenizer: Path
    capacity: int
    model: str
    precision: str


def describe_app(
    config: ModelConfig,
    plan: PrecisionPlan,
    preprocessing: PreprocessSpec,
    prompt: PromptSpec,
    embedding: Path,
    tokenizer: Path,
    capacity: int,
    model: str,
) -> App:
    """What an app has to know of a model's artifacts in a precision; see ``App``."""
    from reference.trace import TRACED_COMPONENTS, component_contract  # here, as a debug build needs no torch

    contracts = {
        component: component_contract(config, component, plan.base, plan.kv_cache)
        for component in TRACED_COMPONENTS
    }
    return App(contracts, preprocessing, prompt, embedding, tokenizer, capacity, model, plan.name)


# Component → its program, and what loads its parameters by name.
Parts = Mapping[str, tuple["TracedComponent", Callable[[str], Any]]]
CompileProgram = Callable[[Parts, Path, Callable[[int], None], CompileOptions], Compiled]


class Compiler(Protocol):
    """A module ``dsvl_export/compilers/<backend>.py``.

    ``PRECISIONS`` are the float precisions that it compiles, ``LAYER_PRECISIONS`` and ``CACHE_PRECISIONS``
    what a precision plan may give single layers and the KV cache. Recipes are taken on ``RECIPE_BASE``.
    ``OPTIONS`` are those of ``FLAGS`` that it has; without it, all are let through.
    A compiler may also have ``check(plans, config, options)``, which refuses before any work what its options
    and plans cannot have together, ``write_listing(folder, app)``, which writes source code for those who
    build an app on the artifacts of a precision, ``graphs(traced, load, options)``, the ONNX graphs that a
    component's files hold, which ``verify`` compares them with, and, in place of ``compile_component``,
    ``compile_program(app, parts, folder, on_bytes, options)``, which writes all components into the same
    files.
    """

    PRECISIONS: tuple[str, ...]
    LAYER_PRECISIONS: tuple[str, ...]
    CACHE_PRECISIONS: tuple[str, ...]
    RECIPE_BASE: str
    OPTIONS: tuple[str, ...]

    def settings(self, options: CompileOptions) -> dict[str, Any]:
        """JSON-able: what of the options the artifacts depend on; where it changes, they are made anew.

        Raises:
            UserError: the options are impossible.
        """
        ...

    def compile_component(
        self,
        traced: TracedComponent,
        load: Callable[[str], Any],
        folder: Path,
        on_bytes: Callable[[int], None],
        options: CompileOptions,
    ) -> Compiled:
        """Compile into ``folder``, check the result against the contract, and load it once.

        Args:
            load: gives a parameter of the component by name, as a torch tensor.
            on_bytes: called with the bytes of weights written, for progress.
        """
        ...

    def artifact_bytes(self, traced: TracedComponent, options: CompileOptions) -> int:
        """Bytes of what ``compile_component`` would write, from shapes alone; engines are not counted."""
        ...

    def debug_build(self, artifact: Path, contract: Contract, folder: Path) -> Path:
        """Write into ``folder`` the artifact's program with the contract's taps as further outputs.

        The runtime opens it under ``contract.with_taps()``. Built from the shipped artifact where the
        format allows that, so that a fault in the file is in the debug build as well.

        Raises:
            UserError: it cannot be built here.
        """
        ...


def compiler_names() -> list[str]:
    """All backends that can be exported to."""
    return sorted({*BUILT_IN, *(entry.name for entry in entry_points(group=GROUP))})


def load_compiler(name: str, debug_build: bool = False) -> Compiler:
    """The compiler of a backend.

    Args:
        debug_build: it is needed for that alone, which takes no torch.

    Raises:
        UserError: there is none of that name, or what it needs is not installed.
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
    raise UserError(f"There is no backend {name!r}; there are {', '.join(compiler_names())}.")


def check_options(backend: str, compiler: Compiler, options: CompileOptions) -> None:
    """Refuse an option that would change nothing.

    Raises:
        UserError: it was given, and the backend does not have it.
    """
    usual, taken = CompileOptions(), getattr(compiler, "OPTIONS", FLAGS)
    for name, flag in FLAGS.items():
        value_of = attrgetter(name)
        if name not in taken and value_of(options) != value_of(usual):
            raise UserError(f"{backend} has no {flag}; see 'dsvl-export export --help' for whose it is.")
