"""Compiler ``onnxruntime``: an ONNX file per component, checked by onnx.checker and by loading."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnxruntime

from dsvl_export.compilers.onnx import debug, layers
from dsvl_export.compilers.onnx.check import check_file
from dsvl_export.compilers.onnx.release import needed_release
from dsvl_export.compilers.onnx.writer import EXTERNAL_ABOVE, Places, weight_bytes, write_model
from dsvl_export.compilers.protocol import Compiled
from dsvl_export.targets.options import CompileOptions
from runtimes.backends.onnxruntime import ORT, ORT_TOKENS, prefill_file
from runtimes.backends.onnxruntime_adapters import adapted_file
from runtimes.backends.onnxruntime_releases import FEATURES, NEEDED, OLDEST, newest_release, upgrade_message
from runtimes.errors import UserError, first_line

if TYPE_CHECKING:
    from torch import Tensor

    from calibration.precision_plan import PrecisionPlan
    from dsvl_export.compilers.onnx.builder import Graph
    from reference.model.config import ModelConfig
    from reference.trace import TracedComponent
    from runtimes.bundle.contracts import Contract

PRECISIONS: tuple[str, ...] = ("fp32", "fp16")
LAYER_PRECISIONS: tuple[str, ...] = ("int8", "fp8", "int8-weights", "int4", "8da4w", "8da8w")
CACHE_PRECISIONS: tuple[str, ...] = ("int8",)
RECIPE_BASE = "fp32"
OPTIONS: tuple[str, ...] = ("onnxruntime.prefill", "onnxruntime.switchable")


def settings(options: CompileOptions) -> dict[str, Any]:
    """See ``Compiler.settings``."""
    prefill, switchable = options.onnxruntime.prefill, options.onnxruntime.switchable
    return ({} if prefill else {"prefill": False}) | ({"switchable": True} if switchable else {})


def check(plans: Sequence[PrecisionPlan], config: ModelConfig, options: CompileOptions) -> None:
    """Refuse unsupported plans, and ``--no-prefill`` if there is no prefill decoder.

    Activations that are quantized per token need a base of fp32.

    Raises:
        UserError: the base is not fp32, there is no prefill decoder to leave out, or the installed
            ONNX Runtime is too old to load the artifacts.
    """
    from calibration.precision_plan import component_layers  # deferred: imports torch

    two_decoders = False
    for plan in plans:
        too_old = upgrade_message(newest_release(_releases(plan)), onnxruntime.__version__)
        if too_old:
            raise UserError(f"{plan.name} cannot be exported here: {too_old}.")
        dynamic = [str(rule.precision) for rule in plan.rules if rule.precision.dynamic]
        if dynamic and plan.base != "fp32":
            raise UserError(
                f"ONNX Runtime computes {dynamic[0]} only on a base of fp32, {plan.name} has {plan.base}."
            )
        decoder = (plan.precision_of(layer) for layer in component_layers(config, "decoder"))
        two_decoders |= any(layer.dynamic and layer.kind == "int4" for layer in decoder)
    if not options.onnxruntime.prefill and not two_decoders:
        names = " and ".join(plan.name for plan in plans)
        raise UserError(f"There is no second decoder for prompts in {names}; leave out --no-prefill.")


def _releases(plan: PrecisionPlan) -> Iterator[str]:
    """List the ONNX Runtime releases that introduced what a plan uses.

    ``release.features`` reads the same from a written file.
    """
    yield OLDEST
    if plan.kv_cache != "float":
        yield FEATURES["int8-cache"].since
    kinds = {rule.precision.kind for rule in plan.rules}
    if "fp8" in kinds and plan.base == "fp32":
        yield FEATURES["float8"].since
    if "int8" in kinds and plan.base == "fp16":
        yield FEATURES["float16-quantize"].since


def compile_component(
    traced: TracedComponent,
    load: Callable[[str], Tensor],
    folder: Path,
    on_bytes: Callable[[int], None],
    options: CompileOptions,
) -> Compiled:
    """Write ``<component>.onnx``, with ``.data`` beside it above 64 MB of weights.

    A decoder with per-token activations gets a second graph for prefill. It has the 4-bit weights
    in 8 bits and reads all other weights from the first graph's file. A switchable decoder gets
    its graphs once more with inputs for adapters; all of them read the same weights, which are in
    ``.data`` whatever their size.

    Raises:
        ValueError: the written file breaks the contract or a rule of quantization.
        UserError: ONNX Runtime has no kernel for the decoder's head size.
    """
    from dsvl_export.compilers.onnx.quantization import TOKENS  # deferred: imports torch

    written: list[Path] = []
    places: Places = {}
    main = folder / f"{traced.contract.component}.onnx"
    by_tokens = TOKENS in _operators(traced)
    limit = _inline_limit(traced, options)
    for file, graph in _graphs_by_file(traced, load, options, main).items():
        written += write_model(graph, file, on_bytes, limit, places)
        check_file(file, traced.contract, tensorrt_rules=not by_tokens)
        _load_once(file)
    tools = {
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        NEEDED: needed_release(written),
    }
    return Compiled(tuple(written), "cpu", ORT_TOKENS if by_tokens else ORT, tools)


def artifact_bytes(traced: TracedComponent, options: CompileOptions) -> int:
    """Compute the bytes of weights and graphs, without alignment and protobuf's overhead."""
    from dsvl_export.compilers.lowering import without_weights  # deferred: imports torch

    made = graphs(traced, without_weights, options)
    return weight_bytes(made, _inline_limit(traced, options)) + sum(
        graph.model().ByteSize() for graph in made
    )


def debug_build(artifact: Path, contract: Contract, folder: Path) -> Path:
    """Write debug builds of a graph and its prefill graph, if any; see ``onnx.debug``."""
    prefill = prefill_file(artifact)
    if prefill.exists():
        debug.debug_build(prefill, contract, folder)
    return debug.debug_build(artifact, contract, folder)


run_layers = layers.run_layers


def graphs(traced: TracedComponent, load: Callable[[str], Tensor], options: CompileOptions) -> list[Graph]:
    """Build the component's graphs, in the order of their files."""
    return list(_graphs_by_file(traced, load, options, Path("component.onnx")).values())


def _graphs_by_file(
    traced: TracedComponent, load: Callable[[str], Tensor], options: CompileOptions, main: Path
) -> dict[Path, Graph]:
    """Build the component's graphs, by their files beside ``main``."""
    # Deferred: imports torch, which a debug build does without.
    from dsvl_export.compilers.onnx.dialect_ort import OrtDialect, OrtPrefillDialect
    from dsvl_export.compilers.onnx.lower import lower
    from dsvl_export.compilers.onnx.quantization import FOUR_BIT, TOKENS

    states = traced.contract.states
    with_prefill = states and options.onnxruntime.prefill and {TOKENS, FOUR_BIT} <= _operators(traced)
    dialects: dict[Path, OrtDialect] = {}
    for takes_adapters in (False, True) if _is_switchable(traced, options) else (False,):
        file = adapted_file(main) if takes_adapters else main
        dialects[file] = OrtDialect(takes_adapters)
        if with_prefill:
            dialects[prefill_file(file)] = OrtPrefillDialect(takes_adapters)
    return {file: lower(traced, load, dialect) for file, dialect in dialects.items()}


def _is_switchable(traced: TracedComponent, options: CompileOptions) -> bool:
    """Return whether a component gets a graph that takes adapters: the decoder can have one."""
    return bool(options.onnxruntime.switchable and traced.contract.states)


def _inline_limit(traced: TracedComponent, options: CompileOptions) -> int:
    """Return the bytes of weights up to which they are in the graph's file, and not beside it."""
    return 0 if _is_switchable(traced, options) else EXTERNAL_ABOVE


def _operators(traced: TracedComponent) -> set[Any]:
    return {node.target for node in traced.program.graph.nodes}


def _load_once(file: Path) -> None:
    """Load a file, to check that every kernel exists.

    Optimizations are off, so that half precision is not widened to check a large file.
    """
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.add_session_config_entry("session.disable_prepacking", "1")
    settings.log_severity_level = 3
    try:
        onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        reason = first_line(error)
        raise UserError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {file.name}: {reason}."
        ) from error
