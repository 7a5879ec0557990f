"""Run the layers of an ONNX file one by one on recorded taps. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from dsvl_export.compilers.onnx.builder import element_type, value_info
from dsvl_export.compilers.onnx.debug import tap_values, write_build
from runtimes.backends.registry import load_backend
from runtimes.bundle.contracts import Contract
from runtimes.session import SessionOptions

GIVEN = "given/"  # before the name of a tap: the input that layers read in its place


def run_layers(
    artifact: Path,
    contract: Contract,
    inputs: Mapping[str, np.ndarray],
    taps: Mapping[str, np.ndarray],
    folder: Path,
    options: SessionOptions,
) -> dict[str, np.ndarray]:
    """See ``RunsLayers.run_layers``; the layers run in ONNX Runtime."""
    file, cut = layer_build(artifact, contract, folder)
    session = load_backend("onnxruntime").open_component(file, cut, options)
    arrays = {**inputs, **{f"{GIVEN}{name}": array for name, array in taps.items()}}
    return session.run({spec.name: arrays[spec.name].astype(spec.dtype) for spec in cut.inputs})


def layer_build(artifact: Path, contract: Contract, folder: Path) -> tuple[Path, Contract]:
    """Write the file with its taps as outputs and, where nodes read taps, as new inputs.

    Returns:
        The file, and its contract: states are inputs, and so is ``given/<tap>`` for every tap.
    """
    model = onnx.load(str(artifact), load_external_data=False)
    sources = tap_values(model, artifact, contract)
    of_value = {value: spec for spec, value in zip(contract.taps, sources, strict=True)}
    nodes = list(model.graph.node)
    del model.graph.node[:], model.graph.output[:]
    for node in nodes:
        for index, value in enumerate(node.input):
            if value in of_value:
                node.input[index] = f"{value}/given"
        model.graph.node.append(node)
        for value in node.output:
            if spec := of_value.get(value):
                name = f"{GIVEN}{spec.name}"
                handed = helper.make_node("CastLike", [name, value], [f"{value}/given"], name=f"{name}/cast")
                tap = helper.make_node(
                    "Cast", [value], [spec.name], name=f"tap/{spec.name}", to=element_type(spec.dtype)
                )
                model.graph.node.extend([handed, tap])
                model.graph.input.append(value_info(name, spec.dtype, spec.shape))
                model.graph.output.append(value_info(spec.name, spec.dtype, spec.shape))
    given = tuple(replace(spec, name=f"{GIVEN}{spec.name}") for spec in contract.taps)
    inputs = contract.inputs + contract.states + given
    return write_build(model, artifact, folder), Contract(contract.component, inputs, contract.taps)
