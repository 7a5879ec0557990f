"""A KV cache whose states are as long as the tokens in use, for graphs that read whole states."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtimes.bundle.contracts import TensorSpec
from runtimes.cache import KVCache

STEP = 256  # tokens by which the states get longer


class _Memory:
    """One buffer for each state, of which the first part is a state ``[B, Hkv, length, Dh]``.

    The length is that of the tokens in use, rounded up to ``STEP``. If it changes, the states move
    within their buffers.
    """

    def __init__(self, specs: tuple[TensorSpec, ...], batch: int, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        sizes = {"batch": batch, "capacity": capacity}
        self._arrays = [spec.allocate(sizes) for spec in specs]

    def states(self) -> list[np.ndarray]:
        """Return the states ``[B, Hkv, length, Dh]``, contiguous views of the buffers."""
        return [self._view(array, self.length) for array in self._arrays]

    def grow(self, length: int) -> None:
        """Make the states as long as ``length`` tokens need."""
        if length <= self.length:
            return
        new = min(-(-length // STEP) * STEP, self.capacity)
        for array in self._arrays:
            old = self._view(array, self.length).copy()
            self._view(array, new)[:, :, : self.length] = old
        self.length = new

    @staticmethod
    def _view(array: np.ndarray, length: int) -> np.ndarray:
        batch, heads, _, head_dim = array.shape
        return array.reshape(-1)[: batch * heads * length * head_dim].reshape(batch, heads, length, head_dim)


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
        """Use or allocate the memory.

        Args:
            specs: states of the decoder's contract.
            batch: number of rows.
            capacity: tokens per row.
            memory: memory to use; None allocates zeros.
            first_row: the first row of the memory that belongs to this cache.
        """
        super().__init__(specs, batch, capacity)
        self._memory = memory or _Memory(specs, batch, capacity)
        self._first_row = first_row

    def states(self) -> list[np.ndarray]:
        """Return the contiguous states ``[batch, Hkv, length, Dh]``, as long as the tokens need."""
        rows = slice(self._first_row, self._first_row + self.batch)
        return [array[rows] for array in self._memory.states()]

    def write(self, rows: Sequence[np.ndarray], positions: np.ndarray) -> None:
        """Write the new rows of a step.

        Args:
            rows: of each state, ``[batch, Hkv, S, Dh]``.
            positions: ``[batch, S]``, consecutive in each row.
        """
        self._memory.grow(int(positions[:, -1].max()) + 1)
        for array, new in zip(self.states(), rows, strict=True):
            for state, part, places in zip(array, new, positions, strict=True):
                state[:, places[0] : places[0] + len(places)] = part

    @property
    def arrays(self) -> list[np.ndarray]:
        """The states ``[batch, Hkv, capacity, Dh]`` themselves."""
        self._memory.grow(self.capacity)
        return self.states()

    @property
    def addresses(self) -> list[int]:
        """Host address of each state."""
        return [array.ctypes.data for array in self.arrays]

    def _view(self, start: int, stop: int) -> GrowingCache:
        first = self._first_row + start
        return GrowingCache(self.specs, stop - start, self.capacity, self._memory, first)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Set row ``target`` to the first ``length`` tokens of row ``source``."""
        self._memory.grow(length)
        states = self.row(source).states()  # type: ignore[attr-defined]
        self.row(target)._write([array[:, :, :length] for array in states])
        self.lengths[target] = length

    def _write(self, states: Sequence[np.ndarray]) -> None:
        self._memory.grow(states[0].shape[2])
        for array, part in zip(self.states(), states, strict=True):
            array[:, :, : part.shape[2]] = part
