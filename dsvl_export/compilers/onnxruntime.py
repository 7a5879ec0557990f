"""Compiler ``onnxruntime``: an ONNX file per component, checked by onnx.checker and by loading."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnxruntime

from dsvl_export.compilers import Compiled
from dsvl_export.compilers.onnx import debug, layers
from dsvl_export.compilers.onnx.check import check_file
from dsvl_export.compilers.onnx.release import needed_release
from dsvl_export.targets.options import CompileOptions
from runtimes.backends.onnxruntime import ORT, ORT_TOKENS, prefill_file
from runtimes.backends.onnxruntime_releases import FEATURES, NEEDED, OLDEST, newest, refusal
from runtimes.errors import UserError, first_line

if TYPE_CHECKING:
    from torch import Tensor

    from calibration.precision_plan import PrecisionPlan
    from dsvl_export.compilers.onnx.builder import Graph
    from reference.model.config import ModelConfig
    from reference.trace import TracedComponent
    from runtimes.bundle.contracts import Contract

PRECISIONS = ("fp32", "fp16")
LAYER_PRECISIONS = ("int8", "fp8", "int8-weights", "int4", "8da4w", "8da8w")
CACHE_PRECISIONS = ("int8",)
RECIPE_BASE = "fp32"
OPTIONS = ("onnxruntime.prefill",)


def settings(options: CompileOptions) -> dict[str, Any]:
    return {} if options.onnxruntime.prefill else {"prefill": False}


def check(plans: Sequence[PrecisionPlan], config: ModelConfig, options: CompileOptions) -> None:
    """Activations that are rounded token by token want a base of fp32; few plans have two decoders.

    Raises:
        UserError: the base is another, there is no second decoder to leave out, or the installed ONNX Runtime
            is too old to load what would be written.
    """
    from calibration.precision_plan import component_layers  # here, as a debug build needs no torch

    two_decoders = False
    for plan in plans:
        too_old = refusal(newest(_releases(plan)), onnxruntime.__version__)
        if too_old:
            raise UserError(f"{plan.name} cannot be exported here: {too_old}.")
        dynamic = [str(rule.precision) for rule in plan.rules if rule.precision.dynamic]
        if dynamic and plan.base != "fp32":
            raise UserError(
                f"ONNX Runtime computes {dynamic[0]} on a base of fp32 alone, {plan.name} has {plan.base}."
            )
        decoder = (plan.of(layer) for layer in component_layers(config, "decoder"))
        two_decoders |= any(layer.dynamic and layer.kind == "int4" for layer in decoder)
    if not options.onnxruntime.prefill and not two_decoders:
        names = " and ".join(plan.name for plan in plans)
        raise UserError(f"There is no second decoder for prompts in {names}; leave out --no-prefill.")


def _releases(plan: PrecisionPlan) -> Iterator[str]:
    """Releases of ONNX Runtime since which the parts of a plan load; ``release.features`` reads files."""
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
    """Write ``<component>.onnx`` (with ``.data`` beside it above 64 MB of weights).

    A decoder whose activations are rounded token by token gets a second graph for prompts, which has the
    4-bit weights in 8 bits and all others from the first one's file.

    Raises:
        ValueError: the written file breaks the contract or a rule of quantization.
        UserError: ONNX Runtime has no kernel for the decoder's head size.
    """
    # Here, so that a debug build needs no torch.
    from dsvl_export.compilers.onnx.quantization import TOKENS
    from dsvl_export.compilers.onnx.writer import Places, write_model

    written: list[Path] = []
    places: Places = {}
    main = folder / f"{traced.contract.component}.onnx"
    by_tokens = TOKENS in _operators(traced)
    for file, graph in zip((main, prefill_file(main)), graphs(traced, load, options), strict=False):
        written += write_model(graph, file, on_bytes, places=places)
        check_file(file, traced.contract, tensorrt_rules=not by_tokens)
        _load_once(file)
    tools = {
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        NEEDED: needed_release(written),
    }
    return Compiled(tuple(written), "cpu", ORT_TOKENS if by_tokens else ORT, tools)


def artifact_bytes(traced: TracedComponent, options: CompileOptions) -> int:
    """Weights and graphs; alignment and protobuf's own bytes per weight are left out."""
    from dsvl_export.compilers.lowering import without_weights
    from dsvl_export.compilers.onnx.writer import weight_bytes

    made = graphs(traced, without_weights, options)
    return weight_bytes(made) + sum(graph.model().ByteSize() for graph in made)


def debug_build(artifact: Path, contract: Contract, folder: Path) -> Path:
    """See ``onnx_graph.debug``; a graph for prompts is built as well."""
    prefill = prefill_file(artifact)
    if prefill.exists():
        debug.debug_build(prefill, contract, folder)
    return debug.debug_build(artifact, contract, folder)


run_layers = layers.run_layers


def graphs(traced: TracedComponent, load: Callable[[str], Tensor], options: CompileOptions) -> list[Graph]:
    """The component's graph, and that for prompts where there is one."""
    from dsvl_export.compilers.onnx.dialect_ort import OrtDialect, OrtPrefillDialect
    from dsvl_export.compilers.onnx.lower import lower
    from dsvl_export.compilers.onnx.quantization import FOUR_BIT, TOKENS

    dialects = [OrtDialect()]
    if traced.contract.states and options.onnxruntime.prefill and {TOKENS, FOUR_BIT} <= _operators(traced):
        dialects.append(OrtPrefillDialect())
    return [lower(traced, load, dialect) for dialect in dialects]


def _operators(traced: TracedComponent) -> set[Any]:
    return {node.target for node in traced.program.graph.nodes}


def _load_once(file: Path) -> None:
    """Every kernel is there. Unoptimised, so that half precision is not widened to check a big file."""
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
