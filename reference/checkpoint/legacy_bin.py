"""PyTorch's file format before version 1.6, pickles followed by raw storages, as a memory map.

``torch.load`` reads such a file into memory. This reader loads only the pickles, with an allow-list
of names; each tensor is a view of the mapped file. The format is that of
``torch.serialization._legacy_save``.
"""

from __future__ import annotations

import mmap
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
PROTOCOL_VERSION = 1001
STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class _Storage:
    """A storage by its key, before its position in the file is known."""

    key: str
    dtype: torch.dtype
    start: int  # elements


@dataclass(frozen=True)
class LegacyTensor:
    """A tensor whose values are still in the file."""

    storage: _Storage
    offset: int  # elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values."""
        return self.storage.dtype


class LegacyFile:
    """A ``.bin`` file in the legacy format; ``content`` has a ``LegacyTensor`` for each tensor."""

    def __init__(self, file: Path) -> None:
        """Read the pickles and locate the storages.

        Args:
            file: read through a private memory map.

        Raises:
            ValueError: the file has another format or is cut short.
            pickle.UnpicklingError: a pickle names what plain weights do not need.
            Exception: any other type that unpickling a damaged file raises.
        """
        with file.open("rb") as handle:
            if _Unpickler(handle).load() != MAGIC_NUMBER or _Unpickler(handle).load() != PROTOCOL_VERSION:
                raise ValueError("it does not start with PyTorch's magic number")
            _Unpickler(handle).load()  # integer sizes and byte order of the system that wrote it
            self.content: Any = _Unpickler(handle).load()
            keys = _Unpickler(handle).load()
            start = handle.tell()
            self._bytes = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        self._starts = self._locate(keys, start)

    def _locate(self, keys: Sequence[str], start: int) -> dict[str, int]:
        """Return the byte offset of each storage's values, which follow an int64 count."""
        sizes = {tensor.storage.key: tensor.storage.dtype.itemsize for tensor in _tensors(self.content)}
        starts: dict[str, int] = {}
        for key in keys:
            (count,) = struct.unpack_from("<q", self._bytes, start)
            starts[key] = start + 8
            start += 8 + count * sizes[key]
            if count < 0 or start > len(self._bytes):
                raise ValueError("it is cut short")
        return starts

    def load(self, tensor: LegacyTensor) -> Tensor:
        """Return a tensor as a view of the mapped file."""
        storage = tensor.storage
        last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride, strict=True))
        if 0 in tensor.shape:
            return torch.empty(tensor.shape, dtype=storage.dtype)
        begin = self._starts[storage.key] + (storage.start + tensor.offset) * storage.dtype.itemsize
        flat = torch.frombuffer(self._bytes, dtype=storage.dtype, count=last + 1, offset=begin)
        return flat.as_strided(tensor.shape, tensor.stride)


class _Unpickler(pickle.Unpickler):
    """Unpickler of plain tables of tensors; any other name in the pickle is an error."""

    def __init__(self, handle: IO[bytes]) -> None:
        super().__init__(handle, encoding="utf-8")

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _rebuild_parameter
        if module == "torch" and name in STORAGE_DTYPES:
            return _StorageType(STORAGE_DTYPES[name])
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not part of plain weights")

    def persistent_load(self, saved: Any) -> _Storage:
        kind, storage_type, key, _, _, view = saved
        if kind != "storage":
            raise pickle.UnpicklingError(f"it refers to a {kind!r}")
        return _Storage(str(key), storage_type.dtype, int(view[1]) if view else 0)


@dataclass(frozen=True)
class _StorageType:
    dtype: torch.dtype

    def __call__(self) -> None:
        raise pickle.UnpicklingError("it creates a storage that is not in the file")


def _rebuild_tensor(
    storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *rest: Any
) -> LegacyTensor:
    return LegacyTensor(storage, offset, tuple(shape), tuple(stride))


def _rebuild_parameter(tensor: LegacyTensor, *rest: Any) -> LegacyTensor:
    return tensor


def _tensors(content: Any) -> list[LegacyTensor]:
    """Return all tensors of nested tables."""
    if isinstance(content, LegacyTensor):
        return [content]
    if isinstance(content, dict):
        return [tensor for value in content.values() for tensor in _tensors(value)]
    if isinstance(content, (list, tuple)):
        return [tensor for value in content for tensor in _tensors(value)]
    return []
