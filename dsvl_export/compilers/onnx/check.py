"""Check written ONNX files against their contract. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx

from dsvl_export.compilers.onnx.builder import element_type
from dsvl_export.lint.quantization import quantization_problems
from runtimes.bundle.contracts import Contract, TensorSpec, updated_state


def check_file(
    file: Path,
    contract: Contract,
    state_output: Callable[[TensorSpec], TensorSpec] = updated_state,
    tensorrt_rules: bool = True,
) -> None:
    """Check that a written file is valid ONNX and keeps the contract and the rules of quantization.

    Args:
        file: the ONNX file.
        contract: the component's contract.
        state_output: maps a state to the output in which the dialect returns it.
        tensorrt_rules: whether to check TensorRT's rules of quantization.

    Raises:
        ValueError: a check fails.
    """
    onnx.checker.check_model(str(file), full_check=True)
    broken = quantization_problems(file) if tensorrt_rules else []
    if broken:
        raise ValueError(f"{file.name} breaks TensorRT's rules of quantization: {' '.join(broken)}")
    check_contract(onnx.load(str(file), load_external_data=False), contract, state_output)


def check_contract(
    model: onnx.ModelProto,
    contract: Contract,
    state_output: Callable[[TensorSpec], TensorSpec] = updated_state,
) -> None:
    """Check that inputs and outputs are the contract's, in order, and that every input is used.

    Raises:
        ValueError: a check fails.
    """
    graph = model.graph
    optional = {item.name for item in graph.initializer}
    required = [value for value in graph.input if value.name not in optional]
    states = tuple(state_output(state) for state in contract.states)
    for kind, values, specs in (
        ("inputs", required, contract.inputs + contract.states),
        ("outputs", graph.output, contract.outputs + states),
    ):
        described = [_describe(value) for value in values]
        expected = [(spec.name, element_type(spec.dtype), spec.shape) for spec in specs]
        if described != expected:
            raise ValueError(
                f"the {kind} of {contract.component} break its contract: found {described},"
                f" expected {expected}"
            )
    used = {name for node in graph.node for name in node.input}
    unused = [value.name for value in graph.input if value.name not in used]
    if unused:
        raise ValueError(f"{contract.component} never uses its inputs {', '.join(unused)}")


def _describe(value: onnx.ValueInfoProto) -> tuple[str, int, tuple[int | str, ...]]:
    tensor = value.type.tensor_type
    shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    return value.name, tensor.elem_type, shape
