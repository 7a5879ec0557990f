"""Compiler ``openvino``: OpenVINO's IR of each component, by way of our ONNX file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import openvino

from dsvl_export.compilers.onnx.check import check_file
from dsvl_export.compilers.onnx.writer import write_model
from dsvl_export.compilers.openvino_ir.taps import TAPS, debug_build, run_layers
from dsvl_export.compilers.protocol import Compiled
from dsvl_export.targets.options import CompileOptions
from runtimes.backends.openvino import DIALECT, INFERENCE_PRECISION, reason, release
from runtimes.bundle.contracts import Contract, appended_state
from runtimes.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from dsvl_export.compilers.onnx.builder import Graph
    from reference.trace import TracedComponent

PRECISIONS: tuple[str, ...] = ("fp32", "fp16", "bf16")
LAYER_PRECISIONS: tuple[str, ...] = ("int8", "int8-weights", "int4")
CACHE_PRECISIONS: tuple[str, ...] = ()
RECIPE_BASE = "fp32"
OPTIONS: tuple[str, ...] = ()
# Base precision → OpenVINO's name of the type in which floats are computed.
ELEMENTS = {"torch.float32": "f32", "torch.float16": "f16", "torch.bfloat16": "bf16"}
XML_PER_ONNX = 6.5  # bytes of an IR's graph for each byte of the ONNX graph; 4.7 to 8.5 were measured
__all__ = [
    "CACHE_PRECISIONS", "LAYER_PRECISIONS", "OPTIONS", "PRECISIONS", "RECIPE_BASE",
    "artifact_bytes", "compile_component", "debug_build", "run_layers", "settings",
]  # fmt: skip


def settings(options: CompileOptions) -> dict[str, Any]:
    """See ``Compiler.settings``."""
    return {}


def compile_component(
    traced: TracedComponent,
    load: Callable[[str], Tensor],
    folder: Path,
    on_bytes: Callable[[int], None],
    options: CompileOptions,
) -> Compiled:
    """Write ``<component>.xml`` and ``<component>.bin``.

    The ONNX file is written first, so that an interrupted export resumes at the tensor, and is
    deleted at the end. Both are on the disk for a moment, and neither is in memory as a whole.

    Raises:
        ValueError: the written file breaks the contract.
        UserError: OpenVINO cannot read or compile the file.
    """
    graph, dialect = _lower(traced, load)
    source = folder / f"{traced.contract.component}.onnx"
    written = write_model(graph, source, on_bytes)
    check_file(source, traced.contract, dialect.state_output)
    file = source.with_suffix(".xml")
    try:
        core = openvino.Core()
        model = core.read_model(source)
        model.set_rt_info(_element(traced), INFERENCE_PRECISION)
        model.set_rt_info(json.dumps(graph.taps), TAPS)
        _check(model, traced.contract)
        _name_operators(model)
        openvino.save_model(model, file, compress_to_fp16=False)
    except RuntimeError as error:
        raise UserError(f"OpenVINO {release()} cannot read {source.name}: {reason(error)}.") from error
    del model  # it maps the ONNX file
    for leftover in written:
        leftover.unlink()
    tools = {"onnx": onnx.__version__, "openvino": release()}
    return Compiled((file, file.with_suffix(".bin")), "cpu", DIALECT, tools)


def artifact_bytes(traced: TracedComponent, options: CompileOptions) -> int:
    """Compute the bytes of weights, and estimate those of the graph."""
    from dsvl_export.compilers.lowering import without_weights  # deferred: imports torch

    graph, _ = _lower(traced, without_weights)
    weights = sum(item.nbytes for item in graph.initializers.values())
    return weights + int(XML_PER_ONNX * graph.model().ByteSize())


def _lower(traced: TracedComponent, load: Callable[[str], Tensor]) -> tuple[Graph, Any]:
    """Return the ONNX graph of a component, and its dialect."""
    # Deferred: imports torch, which a debug build does without.
    from dsvl_export.compilers.onnx.dialect_openvino import OpenVinoDialect
    from dsvl_export.compilers.onnx.lower import lower

    dialect = OpenVinoDialect(traced)
    return lower(traced, load, dialect), dialect


def _element(traced: TracedComponent) -> str:
    """Return OpenVINO's name of the type in which a program computes its floats."""
    import torch  # deferred: a debug build does without

    values = (node.meta.get("val") for node in traced.program.graph.nodes if node.op == "placeholder")
    dtypes = {str(value.dtype) for value in values if isinstance(value, torch.Tensor)}
    return next(
        ELEMENTS[name] for name in ("torch.bfloat16", "torch.float16", "torch.float32") if name in dtypes
    )


def _name_operators(model: Any) -> None:
    """Number the operators that have no name in the ONNX file, so that exports are the same bytes.

    OpenVINO numbers them by a counter of the process.
    """
    for place, operator in enumerate(model.get_ordered_ops()):
        kind, _, number = operator.get_friendly_name().rpartition("_")
        if kind == operator.get_type_name() and number.isdigit():
            operator.set_friendly_name(f"{kind}_{place}")


def _check(model: Any, contract: Contract) -> None:
    """Check the names of a model's inputs and outputs.

    Raises:
        ValueError: they are not the contract's.
    """
    states = tuple(appended_state(spec) for spec in contract.states)
    for kind, ports, specs in (
        ("inputs", model.inputs, contract.inputs + contract.states),
        ("outputs", model.outputs, contract.outputs + states),
    ):
        names = [port.any_name for port in ports]
        if sorted(names) != sorted(spec.name for spec in specs):
            raise ValueError(f"the {kind} of {contract.component} break its contract: found {names}")
