"""Compiler ``openvino``: OpenVINO's IR of each component, converted from an ONNX file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openvino

from dsvl_export.compilers.openvino_ir.files import write_ir
from dsvl_export.compilers.openvino_ir.taps import TAPS, debug_build, run_layers
from dsvl_export.compilers.protocol import Compiled
from dsvl_export.targets.options import CompileOptions
from runtimes.backends.openvino import (
    BFLOAT16,
    DIALECT,
    FLOAT16,
    FLOAT32,
    INFERENCE_PRECISION,
    release,
)
from runtimes.backends.openvino_requests import reason
from runtimes.bundle.contracts import Contract, appended_state
from runtimes.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from dsvl_export.compilers.onnx.builder import Graph
    from dsvl_export.compilers.openvino_ir.dialect import OpenVinoDialect
    from reference.trace import TracedComponent

PRECISIONS: tuple[str, ...] = ("fp32", "fp16", "bf16")
LAYER_PRECISIONS: tuple[str, ...] = ("int8", "int8-weights", "int4")
CACHE_PRECISIONS: tuple[str, ...] = ("int8",)
RECIPE_BASE = "fp32"
OPTIONS: tuple[str, ...] = ()
XML_PER_ONNX = 6.5  # bytes of an IR's graph for each byte of the ONNX graph; 4.7 to 8.5 were measured
__all__ = [
    "CACHE_PRECISIONS", "LAYER_PRECISIONS", "OPTIONS", "PRECISIONS", "RECIPE_BASE",
    "artifact_bytes", "compile_component", "debug_build", "run_layers", "scratch_bytes", "settings",
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

    The ONNX file is written first, so that an interrupted export resumes at the tensor. It is
    deleted once the IR is written and read again. OpenVINO maps its weights from the disk.

    Raises:
        ValueError: the written file breaks the contract.
        UserError: OpenVINO cannot read the ONNX file, or run an operator of it.
        OSError: the disk is full.
    """
    import onnx  # deferred: a debug build does without

    from dsvl_export.compilers.onnx.check import check_file
    from dsvl_export.compilers.onnx.writer import write_model

    graph, dialect = _lower(traced, load)
    source = folder / f"{traced.contract.component}.onnx"
    file = source.with_suffix(".xml")
    written = write_model(graph, source, on_bytes)
    check_file(source, traced.contract, dialect.state_output)
    core = openvino.Core()
    try:
        model = core.read_model(source)
    except RuntimeError as error:
        raise UserError(f"OpenVINO {release()} cannot read {source.name}: {reason(error)}.") from error
    model.set_rt_info(_inference_type(traced), INFERENCE_PRECISION)
    model.set_rt_info(json.dumps(graph.taps), TAPS)
    _name_operators(model)
    write_ir(model, file)
    del model  # it maps the ONNX file
    _check_ir(core, file, traced.contract)
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


def scratch_bytes(artifact_bytes: int) -> int:
    """Return the bytes of the ONNX file, which has the same weights; see ``NeedsScratch``."""
    return artifact_bytes


def _lower(traced: TracedComponent, load: Callable[[str], Tensor]) -> tuple[Graph, OpenVinoDialect]:
    """Return the ONNX graph of a component, and its dialect."""
    # Deferred: imports torch, which a debug build does without.
    from dsvl_export.compilers.onnx.lower import lower
    from dsvl_export.compilers.openvino_ir.dialect import OpenVinoDialect

    dialect = OpenVinoDialect(traced)
    return lower(traced, load, dialect), dialect


def _inference_type(traced: TracedComponent) -> str:
    """Return OpenVINO's name of the type in which a program computes its floats."""
    import torch  # deferred: a debug build does without

    values = (node.meta.get("val") for node in traced.program.graph.nodes if node.op == "placeholder")
    dtypes = {value.dtype for value in values if isinstance(value, torch.Tensor)}
    if torch.bfloat16 in dtypes:
        return BFLOAT16
    return FLOAT16 if torch.float16 in dtypes else FLOAT32


def _name_operators(model: Any) -> None:
    """Number the operators that have no name in the ONNX file, so that exports are the same bytes.

    OpenVINO numbers them by a counter of the process.
    """
    for place, operator in enumerate(model.get_ordered_ops()):
        kind, _, number = operator.get_friendly_name().rpartition("_")
        if kind == operator.get_type_name() and number.isdigit():
            operator.set_friendly_name(f"{kind}_{place}")


def _check_ir(core: Any, file: Path, contract: Contract) -> None:
    """Read a written IR, and compare its inputs and outputs with the contract.

    Raises:
        ValueError: a name, dtype or shape is not the contract's.
        UserError: the file cannot be read, or has an operator that OpenVINO cannot run on a CPU.
    """
    try:
        model = core.read_model(file)
        supported = core.query_model(model, "CPU")
    except RuntimeError as error:
        raise UserError(f"OpenVINO {release()} cannot read {file.name}: {reason(error)}.") from error
    if missing := {op.get_type_name() for op in model.get_ops() if op.get_friendly_name() not in supported}:
        raise UserError(f"OpenVINO {release()} cannot run {', '.join(sorted(missing))} of {file.name}.")
    states = tuple(appended_state(spec) for spec in contract.states)
    for kind, ports, specs in (
        ("inputs", model.inputs, contract.inputs + contract.states),
        ("outputs", model.outputs, contract.outputs + states),
    ):
        found = sorted((port.any_name, *_describe(port)) for port in ports)
        expected = sorted(
            (spec.name, spec.dtype, tuple(d if isinstance(d, int) else -1 for d in spec.shape))
            for spec in specs
        )
        if found != expected:
            raise ValueError(
                f"the {kind} of {contract.component} break its contract: found {found}, expected {expected}"
            )


def _describe(port: Any) -> tuple[str, tuple[int, ...]]:
    """Return the dtype and the shape of an input or output; -1 stands for a named dimension."""
    shape = port.get_partial_shape()
    return port.get_element_type().to_dtype().name, tuple(
        dim.get_length() if dim.is_static else -1 for dim in shape
    )
