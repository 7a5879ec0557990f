"""Taps of an IR: a build that returns them, and one whose layers read given ones. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from openvino import opset13 as opset

from dsvl_export.compilers.openvino_ir.files import write_ir
from runtimes.backends.openvino_requests import reason
from runtimes.backends.registry import load_backend
from runtimes.bundle.contracts import Contract, TensorSpec
from runtimes.bundle.files import parse_json
from runtimes.errors import UserError
from runtimes.session import SessionOptions

TAPS = ["dsvl_export", "taps"]  # key of the model's ``rt_info``: tap → name of the tensor, as JSON
GIVEN = "given/"  # before the name of a tap: the input that layers read in its place


def debug_build(artifact: Path, contract: Contract, folder: Path) -> Path:
    """Write the IR with the contract's taps as further outputs; see ``Compiler.debug_build``."""
    model = _read(artifact)
    ports = _tap_ports(model, artifact, contract)
    model.add_results([_result(port, spec) for port, spec in zip(ports, contract.taps, strict=True)])
    write_ir(model, folder / artifact.name)
    return folder / artifact.name


def run_layers(
    artifact: Path,
    contract: Contract,
    inputs: Mapping[str, np.ndarray],
    taps: Mapping[str, np.ndarray],
    folder: Path,
    options: SessionOptions,
) -> dict[str, np.ndarray]:
    """See ``RunsLayers.run_layers``."""
    model = _read(artifact)
    given, results = [], []
    for port, spec in zip(_tap_ports(model, artifact, contract), contract.taps, strict=True):
        handed = _parameter(port, replace(spec, name=f"{GIVEN}{spec.name}"))
        readers = port.get_target_inputs()
        results.append(_result(port, spec))
        converted = opset.convert(handed, port.get_element_type())
        for reader in readers:
            reader.replace_source_output(converted.output(0))
        given.append(handed)
    cut = openvino.Model(results, [*model.get_parameters(), *given], model.get_friendly_name())
    specs = tuple(replace(spec, name=f"{GIVEN}{spec.name}") for spec in contract.taps)
    cut_contract = Contract(contract.component, contract.inputs + contract.states + specs, contract.taps)
    cut.set_rt_info(model.get_rt_info(["dsvl_export"]), ["dsvl_export"])
    file = folder / artifact.name
    write_ir(cut, file)
    session = load_backend("openvino").open_component(file, cut_contract, options)
    arrays = {**inputs, **{f"{GIVEN}{name}": array for name, array in taps.items()}}
    return session.run({spec.name: arrays[spec.name].astype(spec.dtype) for spec in cut_contract.inputs})


def _read(artifact: Path) -> Any:
    try:
        return openvino.Core().read_model(artifact)
    except RuntimeError as error:
        raise UserError(f"OpenVINO cannot load {artifact}: {reason(error)}.") from error


def _tap_ports(model: Any, artifact: Path, contract: Contract) -> list[Any]:
    """Return the outputs of operators that hold the contract's taps, in order.

    Raises:
        UserError: the IR does not list its taps.
    """
    ports = {name: port for node in model.get_ops() for port in node.outputs() for name in port.get_names()}
    try:
        names = parse_json(model.get_rt_info(TAPS).astype(str), "the list of taps")
        return [ports[names[spec.name]] for spec in contract.taps]
    except (KeyError, TypeError, RuntimeError, UserError) as error:
        raise UserError(f"{artifact} does not list its taps; export it again.") from error


def _result(port: Any, spec: TensorSpec) -> Any:
    """Return an output of the model with a tap, in its contract's dtype."""
    converted = opset.convert(port, openvino.Type(np.dtype(spec.dtype)))
    converted.output(0).set_names({spec.name})
    return opset.result(converted)


def _parameter(port: Any, spec: TensorSpec) -> Any:
    """Return an input of the model in place of a tap."""
    parameter = opset.parameter(port.get_partial_shape(), openvino.Type(np.dtype(spec.dtype)), name=spec.name)
    parameter.output(0).set_names({spec.name})
    return parameter
