"""Compiler ``executorch``: one ``.pte`` of all components, for phones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from calibration.precision_plan import component_layers
from dsvl_export.compilers.executorch_program import suppress_warnings
from dsvl_export.compilers.lowering import parameter_bytes
from dsvl_export.compilers.protocol import App, Compiled, Parts
from dsvl_export.targets.options import DELEGATES, CompileOptions
from runtimes.backends.executorch import DIALECT, SUFFIX, load_program
from runtimes.backends.executorch_tokenizer import FILE as TOKENIZER_FILE
from runtimes.backends.executorch_tokenizer import RUNNER_TOKENIZER
from runtimes.errors import UserError

if TYPE_CHECKING:
    from calibration.precision_plan import PrecisionPlan
    from reference.model.config import ModelConfig
    from reference.trace import TracedComponent
    from runtimes.bundle.contracts import Contract

if find_spec("executorch") is None:
    raise ModuleNotFoundError("there is no executorch", name="executorch")

PRECISIONS: tuple[str, ...] = ("fp32", "fp16")
LAYER_PRECISIONS: tuple[str, ...] = ("8da4w", "8da8w")
CACHE_PRECISIONS: tuple[str, ...] = ()
RECIPE_BASE = "fp32"
OPTIONS: tuple[str, ...] = ("executorch.delegate",)
TARGET = "phone"
MIN_CAPACITY = 3  # torch.export makes a fixed length of 2 of the range from 1 to 2


def find_delegate(options: CompileOptions) -> str:
    """Return the delegate that runs the encoders.

    Raises:
        UserError: there is no such delegate.
    """
    delegate = options.executorch.delegate or DIALECT
    if delegate not in DELEGATES:
        raise UserError(f"There is no ExecuTorch delegate {delegate!r}; use one of {', '.join(DELEGATES)}.")
    return delegate


def check(plans: Sequence[PrecisionPlan], config: ModelConfig, options: CompileOptions) -> None:
    """Refuse a small capacity, and quantized encoders for Core ML's and Vulkan's delegates.

    Raises:
        UserError: names the smallest capacity, or the first layer that a plan quantizes.
    """
    delegate = find_delegate(options)
    if options.capacity < MIN_CAPACITY:
        raise UserError(
            f"ExecuTorch's programs need a --capacity of at least {MIN_CAPACITY} tokens, got"
            f" {options.capacity}."
        )
    layers = [layer for name in ("vision_encoder", "adaptor") for layer in component_layers(config, name)]
    for plan in plans:
        quantized = [layer.name for layer in layers if plan.precision_of(layer).family != "float"]
        if quantized and delegate != DIALECT:
            raise UserError(
                f"ExecuTorch's delegate {delegate} supports only float encoders, {plan.name}"
                f" quantizes {quantized[0]}; use fp16, a plan that quantizes only the decoder, or"
                f" the delegate {DIALECT}."
            )


def settings(options: CompileOptions) -> dict[str, Any]:
    """See ``Compiler.settings``."""
    target, delegate = options.target_name(TARGET), find_delegate(options)
    return {"capacity": options.capacity, "target": target, "delegate": delegate}


def compile_program(
    app: App,
    parts: Parts,
    folder: Path,
    on_bytes: Callable[[int], None],
    options: CompileOptions,
) -> Compiled:
    """Write ``model.pte`` and load it once; write the stock runner's tokenizer beside it.

    Raises:
        UserError: ExecuTorch refuses a program.
    """
    with suppress_warnings():  # deferred: imports executorch and torchao
        from dsvl_export.compilers.executorch_program.program import write_program
        from dsvl_export.compilers.executorch_program.tokenizer import write_runner_tokenizer

    file = folder / f"model{SUFFIX}"
    delegate = find_delegate(options)
    pieces = write_program(file, parts, app, delegate)
    on_bytes(file.stat().st_size)
    load_program(file)
    tools = {name: version(name) for name in ("executorch", "torchao")}
    tools["partitions"] = ", ".join(f"{name} {count}" for name, count in pieces.items())
    tokenizer = folder / TOKENIZER_FILE
    tools[RUNNER_TOKENIZER] = write_runner_tokenizer(tokenizer, app.tokenizer)
    files = (file, tokenizer) if tokenizer.exists() else (file,)
    target = options.target_name(TARGET)
    return Compiled(files, target, delegate, tools, capacity=options.capacity)


def artifact_bytes(traced: TracedComponent, options: CompileOptions) -> int:
    """See ``Compiler.artifact_bytes``."""
    return parameter_bytes(traced)


def debug_build(artifact: Path, contract: Contract, folder: Path) -> NoReturn:
    """Raise UserError: ExecuTorch programs cannot have taps.

    Raises:
        UserError: always.
    """
    raise UserError(
        "ExecuTorch programs cannot have taps, so the first layer that differs cannot be located."
    )
