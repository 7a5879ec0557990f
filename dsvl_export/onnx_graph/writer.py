"""Write a graph to disk, its initializers streamed one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from dsvl_export.onnx_graph.builder import Graph, Initializer, element_type

EXTERNAL_ABOVE = 64 << 20  # bytes of weights; a file beside the graph is mapped, what is in it is copied
INLINE_UP_TO = 1024  # bytes; shape inference reads shapes and axes, which must stand in the file itself
ALIGNMENT = 4096  # lets runtimes map tensors straight from the file


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: a file beside the graph, and the offset in it."""

    file: str
    offset: int


Places = dict[tuple[str, str, tuple[int, ...]], Place]  # by name, dtype and shape


def write_model(
    graph: Graph,
    file: Path,
    on_bytes: Callable[[int], None],
    external_above: int = EXTERNAL_ABOVE,
    places: Places | None = None,
) -> list[Path]:
    """Write ``file`` and, above ``external_above`` bytes of weights, ``file.data`` beside it.

    Args:
        on_bytes: called with the size of each initializer once it is written.
        places: tensors that other graphs in the folder have written and that are not written again; those
            of this graph are added.

    Returns:
        The files written. At most one initializer is in memory with external data.
    """
    model = graph.model()
    initializers = list(graph.initializers.values())
    if sum(item.nbytes for item in initializers) <= external_above:
        for item in initializers:
            model.graph.initializer.append(_inline(item))
            on_bytes(item.nbytes)
        file.write_bytes(model.SerializeToString())
        return [file]
    places = {} if places is None else places
    data = file.with_name(file.name + ".data")
    with data.open("wb") as handle:
        for item in initializers:
            if item.nbytes <= INLINE_UP_TO:
                model.graph.initializer.append(_inline(item))
                on_bytes(item.nbytes)
                continue
            if item.key not in places:
                handle.write(b"\0" * (-handle.tell() % ALIGNMENT))
                places[item.key] = Place(data.name, handle.tell())
                handle.write(_bytes(item))
                on_bytes(item.nbytes)
            model.graph.initializer.append(_external(item, places[item.key]))
    file.write_bytes(model.SerializeToString())
    return [file, data]


def weight_bytes(graphs: Sequence[Graph]) -> int:
    """Bytes of what graphs of one folder hold, where those with a file beside them share it."""
    inside, beside = 0, dict[tuple[str, str, tuple[int, ...]], int]()
    for graph in graphs:
        items = list(graph.initializers.values())
        total = sum(item.nbytes for item in items)
        if total <= EXTERNAL_ABOVE:
            inside += total
        else:
            beside |= {item.key: item.nbytes for item in items}
    return inside + sum(beside.values())


def _values(item: Initializer) -> np.ndarray:
    array = np.asarray(item.load(), order="C")
    if array.dtype != item.dtype or array.shape != item.shape:
        raise ValueError(
            f"initializer {item.name} is {array.dtype}{list(array.shape)},"
            f" expected {item.dtype}{list(item.shape)}"
        )
    return array


def _inline(item: Initializer) -> TensorProto:
    return helper.make_tensor(item.name, element_type(item.dtype), item.shape, _bytes(item), raw=True)


def _bytes(item: Initializer) -> bytes:
    """The values as ONNX stores them; of two 4-bit numbers in a byte, the first is the lower half."""
    values = _values(item)
    if item.dtype.name == "int4":
        codes = values.reshape(-1).astype(np.int8).view(np.uint8) & 15
        codes = np.append(codes, np.zeros(len(codes) % 2, np.uint8))
        values = codes[::2] | (codes[1::2] << 4)
    return values.tobytes()


def _external(item: Initializer, place: Place) -> TensorProto:
    tensor = TensorProto(
        name=item.name, data_type=element_type(item.dtype), dims=item.shape,
        data_location=TensorProto.EXTERNAL,
    )  # fmt: skip
    for key, value in (("location", place.file), ("offset", place.offset), ("length", item.nbytes)):
        tensor.external_data.append(onnx.StringStringEntryProto(key=key, value=str(value)))
    return tensor
