"""Reader of a package's weight file: a header, then a 64-byte record and the values of each weight.

The layout is that of coremltools' ``MILBlob``, in ``mlmodel/src/MILBlob/Blob/StorageFormat.hpp``.
It is private to coremltools. Only this module knows it, and the test ``test_mil_blob.py`` compares
it with the writer and the reader of the installed coremltools.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.errors import UserError

SENTINEL = 0xDEADBEEF
HEADER = 64
RECORD = np.dtype([("sentinel", "<u4"), ("kind", "<u4"), ("bytes", "<u8"), ("offset", "<u8")])
# Data type in the file → bits per value, and the numpy dtype that stores one value.
KINDS: dict[int, tuple[int, np.dtype[Any]]] = {
    1: (16, np.dtype(np.float16)), 2: (32, np.dtype(np.float32)), 3: (8, np.dtype(np.uint8)),
    4: (8, np.dtype(np.int8)), 6: (16, np.dtype(np.int16)), 7: (16, np.dtype(np.uint16)),
    8: (4, np.dtype(np.int8)), 9: (1, np.dtype(np.uint8)), 10: (2, np.dtype(np.uint8)),
    11: (4, np.dtype(np.uint8)), 12: (3, np.dtype(np.uint8)), 13: (6, np.dtype(np.uint8)),
    14: (32, np.dtype(np.int32)), 15: (32, np.dtype(np.uint32)),
}  # fmt: skip
INT4 = 8


class WeightFile:
    """A weight file, mapped into memory.

    Raises:
        UserError: the file cannot be read or is not a weight file.
    """

    def __init__(self, file: Path) -> None:
        """Map ``file`` into memory and check its header."""
        self._file = file
        try:
            self._bytes = np.memmap(file, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise UserError(f"The weights {file} cannot be read: {error}.") from error
        if len(self._bytes) < HEADER or self._bytes[4:8].view("<u4")[0] != 2:
            raise UserError(f"{file} is not a Core ML weight file.")

    def check(self, offset: int, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return data type, offset and size in bytes of the weight whose record is at ``offset``.

        Args:
            offset: byte of the record in the file.
            shape: shape that the package declares for the weight.

        Raises:
            UserError: there is no record, the weight has another size, or the file is too short.
        """
        if offset < HEADER or offset + RECORD.itemsize > len(self._bytes):
            raise UserError(f"The weights {self._file} are too short for a weight at byte {offset}.")
        record = self._bytes[offset : offset + RECORD.itemsize].view(RECORD)[0]
        kind, size, begin = (int(record[key]) for key in ("kind", "bytes", "offset"))
        if record["sentinel"] != SENTINEL or kind not in KINDS:
            raise UserError(f"{self._file} has no weight at byte {offset}; the package is damaged.")
        bits, _ = KINDS[kind]
        if size != -(-prod(shape) * bits // 8):
            raise UserError(
                f"The weight at byte {offset} of {self._file} has {size} bytes,"
                f" {list(shape)} values of {bits} bits were expected."
            )
        if begin + size > len(self._bytes):
            raise UserError(
                f"The weights {self._file} end at byte {len(self._bytes)}, {begin + size} were expected."
            )
        return kind, begin, size

    def read(self, offset: int, shape: tuple[int, ...]) -> np.ndarray:
        """Return the values of the weight whose record is at ``offset``.

        Raises:
            UserError: as in ``check``.
        """
        kind, begin, size = self.check(offset, shape)
        bits, dtype = KINDS[kind]
        stored = self._bytes[begin : begin + size]
        if bits >= 8:
            return np.asarray(stored.view(dtype).reshape(shape))
        values = _unpack(stored, bits, prod(shape))
        if kind == INT4:
            values = ((values ^ 8).astype(np.int8) - 8).astype(np.int8)
        return values.reshape(shape)


def _unpack(stored: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return ``count`` unsigned values of fewer than 8 bits, packed from the lowest bit on."""
    if bits == 4:
        pairs = np.empty((len(stored), 2), np.uint8)
        np.bitwise_and(stored, 15, out=pairs[:, 0])
        np.right_shift(stored, 4, out=pairs[:, 1])
        return pairs.reshape(-1)[:count]
    unpacked = np.unpackbits(stored, bitorder="little")[: count * bits].reshape(count, bits)
    return np.packbits(unpacked, axis=1, bitorder="little").reshape(-1)
