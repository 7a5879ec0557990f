"""The protocol that every compiler implements, and the capabilities that only some compilers have.

A capability is a protocol of its own. Callers ask for it with ``isinstance``, which works for the
modules of this package and for whatever object a third party registers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from dsvl_export.targets.options import CompileOptions
from runtimes.bundle.contracts import Contract
from runtimes.bundle.manifest import Engine
from runtimes.preprocess import PreprocessSpec
from runtimes.session import SessionOptions
from runtimes.text.tokenizer import PromptSpec

if TYPE_CHECKING:
    from calibration.precision_plan import PrecisionPlan
    from dsvl_export.compilers.onnx.builder import Graph
    from reference.model.config import ModelConfig
    from reference.trace import TracedComponent

# Component → its program, and what loads one of its parameters by name, as a torch tensor.
Parts = Mapping[str, tuple["TracedComponent", Callable[[str], Any]]]


@dataclass(frozen=True)
class Compiled:
    """Files that a compiler has written, and what they were made for and with.

    Args:
        files: the main file first.
        target: name of the device, or the compiler's own word where no device was given.
        dialect: operators and conventions of the files, as the manifest names them.
        tools: name → version of the libraries that made the files.
        engine: the engine, where one was built; its file is a bare name.
        capacity: tokens of a decoder's KV cache, where that is fixed when compiling.
    """

    files: tuple[Path, ...]
    target: str
    dialect: str
    tools: dict[str, str]
    engine: Engine | None = None
    capacity: int | None = None


@dataclass(frozen=True)
class App:
    """What an app that uses the artifacts of one precision has to know.

    Args:
        embedding: the bundle's file of the token embeddings.
        tokenizer: the bundle's tokenizer file.
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
    """Describe the artifacts of a model in a precision; see ``App``."""
    # Deferred: imports torch, which a debug build does without.
    from reference.trace import TRACED_COMPONENTS, component_contract

    contracts = {
        component: component_contract(config, component, plan.base, plan.kv_cache)
        for component in TRACED_COMPONENTS
    }
    return App(contracts, preprocessing, prompt, embedding, tokenizer, capacity, model, plan.name)


class Compiler(Protocol):
    """A module ``dsvl_export/compilers/<backend>.py``, or what an entry point names.

    It also has one of ``CompilesComponents`` and ``CompilesProgram``.

    Attributes:
        PRECISIONS: the float precisions that it compiles.
        LAYER_PRECISIONS: precisions that a plan may give to single layers.
        CACHE_PRECISIONS: precisions that a plan may give to the KV cache.
        RECIPE_BASE: the float precision of the layers that a recipe does not quantize.
    """

    PRECISIONS: tuple[str, ...]
    LAYER_PRECISIONS: tuple[str, ...]
    CACHE_PRECISIONS: tuple[str, ...]
    RECIPE_BASE: str

    def settings(self, options: CompileOptions) -> dict[str, Any]:
        """Return the options that the artifacts depend on, as JSON values.

        If a value changes, the artifacts are compiled again.

        Raises:
            UserError: the options are impossible.
        """
        ...

    def artifact_bytes(self, traced: TracedComponent, options: CompileOptions) -> int:
        """Compute the bytes of a component's files from shapes alone; engines are not counted."""
        ...

    def debug_build(self, artifact: Path, contract: Contract, folder: Path) -> Path:
        """Write the artifact's program into ``folder`` with the contract's taps as further outputs.

        The runtime opens it under ``contract.with_taps()``. It is built from the shipped artifact
        where the format allows that, so that a fault in the file is also in the debug build.
        Imports no torch.

        Raises:
            UserError: the debug build cannot be made here.
        """
        ...


@runtime_checkable
class CompilesComponents(Protocol):
    """A compiler that writes files of their own for each component."""

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
            traced: the program without weights, and its contract.
            load: gives a parameter of the component by name, as a torch tensor.
            folder: an empty folder.
            on_bytes: called with the bytes of weights written, for progress.
            options: options of the export.

        Raises:
            ValueError: the result breaks the contract.
            UserError: the backend refuses the program.
        """
        ...


@runtime_checkable
class CompilesProgram(Protocol):
    """A compiler that writes all components into the same files."""

    def compile_program(
        self,
        app: App,
        parts: Parts,
        folder: Path,
        on_bytes: Callable[[int], None],
        options: CompileOptions,
    ) -> Compiled:
        """Compile all components into ``folder`` and load the result once.

        Args:
            app: contracts and settings that the program contains.
            parts: programs and loaders of all components.
            folder: an empty folder.
            on_bytes: called with the bytes written, for progress.
            options: options of the export.

        Raises:
            UserError: the backend refuses a program.
        """
        ...


@runtime_checkable
class NeedsScratch(Protocol):
    """A compiler that has further files on the disk while it writes an artifact."""

    def scratch_bytes(self, artifact_bytes: int) -> int:
        """Return their bytes for an artifact of a size."""
        ...


@runtime_checkable
class DeclaresOptions(Protocol):
    """A compiler that declares the options of ``registry.FLAGS`` that it takes; others are refused.

    A compiler without this capability takes all options.
    """

    OPTIONS: tuple[str, ...]


@runtime_checkable
class ChecksPlans(Protocol):
    """A compiler that cannot compile every combination of plans and options."""

    def check(self, plans: Sequence[PrecisionPlan], config: ModelConfig, options: CompileOptions) -> None:
        """Refuse, before any work, plans and options that do not go together.

        Raises:
            UserError: names the plan or the option.
        """
        ...


@runtime_checkable
class BuildsGraphs(Protocol):
    """A compiler whose artifacts are ONNX files of this package.

    ``verify`` compares the files with the graphs, tensor by tensor. Artifacts of other compilers
    are compiled again and compared byte for byte.
    """

    def graphs(
        self, traced: TracedComponent, load: Callable[[str], Any], options: CompileOptions
    ) -> list[Graph]:
        """Build the ONNX graphs of a component, in the order of its files."""
        ...


@runtime_checkable
class RunsLayers(Protocol):
    """A compiler whose artifacts can be run layer by layer on this machine."""

    def run_layers(
        self,
        artifact: Path,
        contract: Contract,
        inputs: Mapping[str, np.ndarray],
        taps: Mapping[str, np.ndarray],
        folder: Path,
        options: SessionOptions,
    ) -> dict[str, np.ndarray]:
        """Compute every tap of an artifact from the recorded tap before it.

        Args:
            artifact: the artifact's main file.
            contract: the component's contract, with its taps.
            inputs: inputs and states of the component by name; a decoder reads all tokens at once.
            taps: the recorded taps by name, which layers read in place of the computed ones.
            folder: an empty folder for a changed copy of the artifact.
            options: how to run it.

        Returns:
            The computed taps by name.

        Raises:
            UserError: the layers cannot be separated.
        """
        ...


@runtime_checkable
class WritesListing(Protocol):
    """A compiler that writes source code for those who build an app on its artifacts."""

    def write_listing(self, folder: Path, app: App) -> None:
        """Write the source code into ``folder``."""
        ...


def compile_parts(
    compiler: Compiler,
    app: App,
    parts: Parts,
    folder: Path,
    on_bytes: Callable[[int], None],
    options: CompileOptions,
) -> Compiled:
    """Compile the components of one stage: all of a program, or the single one in ``parts``.

    Raises:
        ValueError: the result breaks the contract.
        UserError: the backend refuses a program.
        TypeError: the compiler has neither ``compile_program`` nor ``compile_component``.
    """
    if isinstance(compiler, CompilesProgram):
        return compiler.compile_program(app, parts, folder, on_bytes, options)
    if not isinstance(compiler, CompilesComponents):
        raise TypeError(f"{compiler} has neither compile_component nor compile_program")
    ((traced, load),) = parts.values()
    return compiler.compile_component(traced, load, folder, on_bytes, options)
