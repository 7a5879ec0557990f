"""LoRA adapters that ONNX Runtime switches at run time: their files, and the inputs that take them.

A switchable decoder has a second graph, whose linear layers take the two matrices of an adapter as
optional inputs. Both graphs read the same weights. A file of an adapter has the format of ONNX
Runtime's ``AdapterFormat``, so that apps can use its ``LoraAdapter`` with the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.errors import UserError, first_line

SUFFIX = ".onnx_adapter"
ADAPTED = "_adapted"  # in the names of graphs that take adapters
VERSION = 1  # of the files' content: names and layout of the tensors


def adapted_file(file: Path) -> Path:
    """Return the path of a decoder's graph for adapters; only a switchable decoder has one."""
    return file.with_stem(f"{file.stem}{ADAPTED}")


def down_name(layer: str) -> str:
    """Return the input ``[inputs, r]`` of a layer, LoRA's matrix A transposed."""
    return f"{layer}.lora_A"


def up_name(layer: str) -> str:
    """Return the input ``[r, outputs]`` of a layer: LoRA's matrix B, scaled and transposed."""
    return f"{layer}.lora_B"


def write_adapter(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write the tensors of an adapter, by the names of the graph's inputs; the order is fixed.

    Raises:
        OSError: the file cannot be written.
    """
    import onnxruntime

    content = onnxruntime.AdapterFormat()
    content.set_adapter_version(VERSION)
    content.set_model_version(VERSION)
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(tensors[name]) for name in sorted(tensors)}
    content.set_parameters(values)
    try:
        content.export_adapter(str(file))
    except RuntimeError as error:  # ONNX Runtime's, for a full disk too
        raise OSError(f"{file} cannot be written ({first_line(error)})") from error


def read_adapter(file: Path, session: Any) -> dict[str, Any]:
    """Read the tensors of an adapter as ``OrtValue`` objects.

    Args:
        file: the file.
        session: the ``InferenceSession`` that gets them.

    Raises:
        UserError: the file cannot be read, or does not fit the graph of the session.
    """
    import onnxruntime

    try:
        values = dict(onnxruntime.AdapterFormat.read_adapter(str(file)).get_parameters())
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        raise UserError(
            f"{file} is not an adapter that ONNX Runtime can read: {first_line(error)}."
        ) from error
    inputs = {item.name: item for item in session.get_overridable_initializers()}
    for name, value in values.items():
        item = inputs.get(name)
        if item is None or not _fits(item, value):
            found = f"{value.data_type()}{value.shape()}"
            expected = f"{item.type}{item.shape}" if item else "no such input"
            raise UserError(
                f"The adapter {file} does not fit the decoder: {name} is {found}, expected {expected}; add"
                " the adapter again."
            )
    for layer in {name.rpartition(".")[0] for name in values}:
        down, up = values.get(down_name(layer)), values.get(up_name(layer))
        if down is None or up is None or down.shape()[1] != up.shape()[0]:
            raise UserError(
                f"The adapter {file} has matrices of {layer} that do not fit each other; add the adapter"
                " again."
            )
    return values


def _fits(item: Any, value: Any) -> bool:
    """Return whether a value has the type and the fixed sizes of an input."""
    shape = value.shape()
    return (
        value.data_type() == item.type
        and len(shape) == len(item.shape)
        and all(
            not isinstance(size, int) or size == found or size == 0
            for size, found in zip(item.shape, shape, strict=True)
        )
    )
