"""Compiler ``onnxruntime``: an ONNX file per component, checked by onnx.checker and by loading."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnxruntime
from onnx import helper

from dsvl_export.compilers import Compiled
from dsvl_export.onnx_graph.builder import TAPS, element_type, value_info
from runtimes.contracts import Contract, updated_state
from runtimes.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from reference.trace import TracedComponent

PRECISIONS = ("fp32", "fp16")
LAYER_PRECISIONS = ("int8", "fp8", "int8-weights", "int4")
CACHE_PRECISIONS = ("int8",)


def compile_component(
    traced: TracedComponent,
    load: Callable[[str], Tensor],
    folder: Path,
    on_bytes: Callable[[int], None],
) -> Compiled:
    """Write ``<component>.onnx`` (with ``.data`` beside it above 1 GB of weights).

    Raises:
        ValueError: the written file breaks the contract or a rule of quantization.
        UserError: ONNX Runtime has no kernel for the decoder's head size.
    """
    # Here, so that a debug build needs no torch.
    from dsvl_export.onnx_graph.dialect_ort import OrtDialect
    from dsvl_export.onnx_graph.lower import lower
    from dsvl_export.onnx_graph.qdq_rules import problems as qdq_problems
    from dsvl_export.onnx_graph.writer import write_model

    graph = lower(traced, load, OrtDialect())
    file = folder / f"{traced.contract.component}.onnx"
    files = write_model(graph, file, on_bytes)
    onnx.checker.check_model(str(file), full_check=True)
    broken = qdq_problems(file)
    if broken:
        raise ValueError(f"{file.name} breaks TensorRT's rules of quantization: {' '.join(broken)}")
    check_contract(onnx.load(str(file), load_external_data=False), traced.contract)
    _load_once(file)
    tools = {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
    return Compiled(tuple(files), "cpu", "ort", tools)


def artifact_bytes(traced: TracedComponent) -> int:
    """Weights and graph; alignment and protobuf's own bytes per weight are left out."""
    from dsvl_export.onnx_graph.dialect_ort import OrtDialect
    from dsvl_export.onnx_graph.lower import lower, without_weights

    graph = lower(traced, without_weights, OrtDialect())
    return sum(item.nbytes for item in graph.initializers.values()) + graph.model().ByteSize()


def debug_build(artifact: Path, contract: Contract, folder: Path) -> Path:
    """The same file with the contract's taps as further outputs."""
    model = onnx.load(str(artifact), load_external_data=False)
    try:
        values = json.loads({item.key: item.value for item in model.metadata_props}[TAPS])
        sources = [values[spec.name] for spec in contract.taps]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{artifact} does not say where its taps are; export it again.") from error
    for spec, source in zip(contract.taps, sources, strict=True):
        model.graph.node.append(helper.make_node("Identity", [source], [spec.name], name=f"tap/{spec.name}"))
        model.graph.output.append(value_info(spec.name, spec.dtype, spec.shape))
    debug = folder / artifact.name
    debug.write_bytes(model.SerializeToString())
    for data in artifact.parent.glob(f"{artifact.name}.data"):
        try:
            (folder / data.name).hardlink_to(data)  # ONNX Runtime refuses symbolic links
        except OSError:  # another file system
            shutil.copyfile(data, folder / data.name)
    return debug


def _load_once(file: Path) -> None:
    """Every kernel is there. Unoptimised, so that half precision is not widened to check a big file."""
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.add_session_config_entry("session.disable_prepacking", "1")
    settings.log_severity_level = 3
    try:
        onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {file.name}: {reason}."
        ) from error


def check_contract(model: onnx.ModelProto, contract: Contract) -> None:
    """The file's inputs and outputs are the contract's, in order, and no input is unused."""
    graph = model.graph
    updated = tuple(updated_state(state) for state in contract.states)
    for what, values, specs in (
        ("inputs", graph.input, contract.inputs + contract.states),
        ("outputs", graph.output, contract.outputs + updated),
    ):
        found = [_describe(value) for value in values]
        expected = [(spec.name, element_type(spec.dtype), spec.shape) for spec in specs]
        if found != expected:
            raise ValueError(
                f"the {what} of {contract.component} break its contract: found {found}, expected {expected}"
            )
    used = {name for node in graph.node for name in node.input}
    unused = [value.name for value in graph.input if value.name not in used]
    if unused:
        raise ValueError(f"{contract.component} never uses its inputs {', '.join(unused)}")


def _describe(value: onnx.ValueInfoProto) -> tuple[str, int, tuple[int | str, ...]]:
    tensor = value.type.tensor_type
    shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    return value.name, tensor.elem_type, shape
