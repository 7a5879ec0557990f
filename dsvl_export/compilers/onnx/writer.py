"""Write a graph to disk, with its initializers streamed one by one."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from dsvl_export.compilers.onnx.builder import Graph, Initializer, element_type
from runtimes.bundle.files import JOURNAL, parse_json
from runtimes.errors import UserError

EXTERNAL_ABOVE = 64 << 20  # bytes of weights; external data is mapped, inline data is copied
INLINE_UP_TO = 1024  # bytes; shape inference needs inline shapes and axes
ALIGNMENT = 4096  # lets runtimes map tensors straight from the file


@dataclass(frozen=True)
class Place:
    """The location of a tensor: a file beside the graph, and the offset in it."""

    file: str
    offset: int


Key = tuple[str, str, tuple[int, ...]]  # name, dtype and shape
Places = dict[Key, Place]


def write_model(
    graph: Graph,
    file: Path,
    on_bytes: Callable[[int], None],
    external_above: int = EXTERNAL_ABOVE,
    places: Places | None = None,
) -> list[Path]:
    """Write ``file`` and, above ``external_above`` bytes of weights, ``file.data`` beside it.

    A journal beside the data lists what is written, so that a call that was interrupted resumes
    when it is repeated; the export stage removes the journal.

    Args:
        graph: the graph.
        file: the ONNX file.
        on_bytes: called with the size of each initializer once it is written.
        external_above: bytes of weights up to which they are stored in ``file``.
        places: tensors that other graphs in the folder have written and that are not written again;
            this graph's tensors are added.

    Returns:
        The files written. At most one initializer is in memory if the data is external.
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
    journal = data.with_name(data.name + JOURNAL)
    written = _written(data, journal)
    resumed = set(written)
    if resumed:  # at once, so that the speed that progress shows is that of writing
        on_bytes(sum(item.nbytes for item in initializers if item.key in resumed))
    with data.open("r+b" if written else "wb") as handle, journal.open("a") as log:
        handle.seek(0, 2)
        for item in initializers:
            if item.nbytes <= INLINE_UP_TO:
                model.graph.initializer.append(_inline(item))
                on_bytes(item.nbytes)
                continue
            if item.key not in places:
                if item.key not in written:
                    written[item.key] = handle.tell() + -handle.tell() % ALIGNMENT
                    content = stored_bytes(item)
                    handle.write(b"\0" * (written[item.key] - handle.tell()))
                    handle.write(content)
                    handle.flush()
                    log.write(
                        json.dumps([item.key, written[item.key], len(content), zlib.crc32(content)]) + "\n"
                    )
                    log.flush()
                places[item.key] = Place(data.name, written[item.key])
                if item.key not in resumed:
                    on_bytes(item.nbytes)
            model.graph.initializer.append(_external(item, places[item.key]))
    file.write_bytes(model.SerializeToString())
    if not data.stat().st_size:  # other graphs have all tensors
        data.unlink()
        journal.unlink()
        return [file]
    return [file, data]


def _written(data: Path, journal: Path) -> dict[Key, int]:
    """Read the offsets of completed tensors of an interrupted call; cuts off what follows."""
    offsets: dict[Key, int] = {}
    end = lines = 0
    if data.exists() and journal.exists():
        rows = journal.read_bytes().split(b"\n")
        with data.open("r+b") as handle:
            for line in rows:
                try:
                    (name, dtype, shape), offset, size, check = parse_json(line, "a line of the journal")
                except (UserError, TypeError, ValueError):  # an incomplete line
                    break
                if not 0 <= offset <= offset + size <= handle.seek(0, 2):
                    break
                handle.seek(offset)
                if zlib.crc32(handle.read(size)) != check:
                    break
                offsets[name, dtype, tuple(shape)] = offset
                end, lines = offset + size, lines + 1
            handle.truncate(end)
        journal.write_bytes(b"".join(line + b"\n" for line in rows[:lines]))
    else:
        journal.unlink(missing_ok=True)
    return offsets


def weight_bytes(graphs: Sequence[Graph], external_above: int = EXTERNAL_ABOVE) -> int:
    """Compute the bytes of the weights of graphs in one folder, which share external data."""
    internal, external = 0, dict[Key, int]()
    for graph in graphs:
        items = list(graph.initializers.values())
        total = sum(item.nbytes for item in items)
        if total <= external_above:
            internal += total
        else:
            external |= {item.key: item.nbytes for item in items}
    return internal + sum(external.values())


def _values(item: Initializer) -> np.ndarray:
    array = np.asarray(item.load(), order="C")
    if array.dtype != item.dtype or array.shape != item.shape:
        raise ValueError(
            f"initializer {item.name} is {array.dtype}{list(array.shape)},"
            f" expected {item.dtype}{list(item.shape)}"
        )
    return array


def _inline(item: Initializer) -> TensorProto:
    return helper.make_tensor(
        item.name, element_type(item.dtype), item.shape, bytes(stored_bytes(item)), raw=True
    )


def stored_bytes(item: Initializer) -> memoryview:
    """Return the values as ONNX stores them, uint8; the lower half of a byte is first."""
    values = _values(item)
    if item.dtype.name == "int4":
        codes = values.reshape(-1).astype(np.int8).view(np.uint8) & 15
        codes = np.append(codes, np.zeros(len(codes) % 2, np.uint8))
        values = codes[::2] | (codes[1::2] << 4)
    return values.reshape(-1).view(np.uint8).data


def _external(item: Initializer, place: Place) -> TensorProto:
    tensor = TensorProto(
        name=item.name, data_type=element_type(item.dtype), dims=item.shape,
        data_location=TensorProto.EXTERNAL,
    )  # fmt: skip
    for key, value in (("location", place.file), ("offset", place.offset), ("length", item.nbytes)):
        tensor.external_data.append(onnx.StringStringEntryProto(key=key, value=str(value)))
    return tensor
