"""A KV cache whose states are as long as the tokens in use, for graphs that read whole states."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtimes.bundle.contracts import TensorSpec
from runtimes.cache import KVCache

STEP = 256  # tokens by which the states get longer


class _Memory:
    """The states ``[B, Hkv, length, Dh]`` of all rows.

    The length is that of the longest row, rounded up to ``STEP``, and gets shorter when a row
    begins anew. When it changes, each state moves to a new array; an interruption leaves every
    state complete, in its old or its new length.
    """

    def __init__(self, specs: tuple[TensorSpec, ...], batch: int, capacity: int, lengths: np.ndarray) -> None:
        self.capacity, self.lengths = capacity, lengths
        sizes = {"batch": batch, "capacity": 0}
        self.arrays = [spec.allocate(sizes) for spec in specs]

    @property
    def length(self) -> int:
        return max(int(array.shape[2]) for array in self.arrays)

    def resize(self, tokens: int = 0, shrink: bool = False) -> None:
        """Make the states long enough for all rows and a number of tokens.

        Args:
            tokens: number of tokens that a row will have.
            shrink: make them shorter if they are more than twice as long.
        """
        tokens = max(tokens, int(self.lengths.max()))
        needed = min(-(-tokens // STEP) * STEP, self.capacity)
        length = self.length
        if needed > length or (shrink and 2 * needed <= length):
            length = needed
        for index, old in enumerate(self.arrays):
            kept = min(old.shape[2], length)
            if old.shape[2] != length:
                new = np.zeros((*old.shape[:2], length, old.shape[3]), old.dtype)
                new[:, :, :kept] = old[:, :, :kept]
                self.arrays[index] = new


class GrowingCache(KVCache):
    """A KV cache in host memory whose states are as long as the tokens in use need."""

    def __init__(
        self,
        specs: tuple[TensorSpec, ...],
        batch: int,
        capacity: int,
        memory: _Memory | None = None,
        first_row: int = 0,
    ) -> None:
        """Use or make the memory of states without tokens.

        Args:
            specs: states of the decoder's contract.
            batch: number of rows.
            capacity: tokens per row.
            memory: memory of all rows; None makes it.
            first_row: the first row of the memory that belongs to this cache.
        """
        super().__init__(specs, batch, capacity)
        self._memory = memory or _Memory(specs, batch, capacity, self.lengths)
        self._first_row = first_row

    def states(self, begins: bool = False) -> list[np.ndarray]:
        """Return the contiguous states ``[batch, Hkv, length, Dh]``, as long as the tokens need.

        Args:
            begins: whether a row begins anew; then the states may get shorter.
        """
        self._memory.resize(shrink=begins)
        return self._rows()

    def write(self, rows: Sequence[np.ndarray], positions: np.ndarray) -> None:
        """Write the new rows of a step.

        Args:
            rows: of each state, ``[batch, Hkv, S, Dh]``.
            positions: ``[batch, S]``, consecutive in each row.
        """
        for array, new in zip(self.states(), rows, strict=True):
            for state, part, places in zip(array, new, positions, strict=True):
                state[:, places[0] : places[0] + len(places)] = part

    @property
    def arrays(self) -> list[np.ndarray]:
        """The states ``[batch, Hkv, capacity, Dh]``; the memory becomes as long as the capacity."""
        self._memory.resize(self.capacity)
        return self._rows()

    @property
    def addresses(self) -> list[int]:
        """Host address of each state."""
        return [array.ctypes.data for array in self.arrays]

    def _rows(self) -> list[np.ndarray]:
        rows = slice(self._first_row, self._first_row + self.batch)
        return [array[rows] for array in self._memory.arrays]

    def _view(self, start: int, stop: int) -> GrowingCache:
        first = self._first_row + start
        return GrowingCache(self.specs, stop - start, self.capacity, self._memory, first)

    def _read(self, length: int) -> list[np.ndarray]:
        self._memory.resize(length)
        return [array[:, :, :length] for array in self._rows()]

    def _write(self, states: Sequence[np.ndarray]) -> None:
        length = states[0].shape[2]
        self._memory.resize(length)
        for array, part in zip(self._rows(), states, strict=True):
            array[:, :, :length] = part
