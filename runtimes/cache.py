"""The KV cache: allocated once, written in place by the backend.

``KVCache`` counts the tokens of each row; a subclass defines where the states are stored. No step
copies or moves them, except that OpenVINO's get longer now and then (``openvino_cache``). Rows of a
batch may have different lengths.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod

import numpy as np

from runtimes.bundle.contracts import TensorSpec
from runtimes.errors import UserError


class CapacityError(UserError):
    """The sequence does not fit into the cache."""


def cache_bytes(specs: tuple[TensorSpec, ...], batch: int, capacity: int) -> int:
    """Return the bytes of the states of a cache."""
    sizes = {"batch": batch, "capacity": capacity}
    return sum(prod(spec.sized(sizes)) * np.dtype(spec.dtype).itemsize for spec in specs)


class KVCache(ABC):
    """Keys and values of all layers for ``batch`` sequences of at most ``capacity`` tokens.

    Attributes:
        writes_parts: whether writing the first tokens of a row leaves the rest of the memory alone;
            otherwise it copies all states, which takes longer than computing a short prefix.
    """

    writes_parts: bool = True

    def __init__(self, specs: tuple[TensorSpec, ...], batch: int, capacity: int) -> None:
        """Start with empty rows.

        Args:
            specs: states of the decoder's contract, each ``[batch, Hkv, capacity, Dh]``.
            batch: number of rows.
            capacity: tokens per row.
        """
        self.specs, self.batch, self.capacity = specs, batch, capacity
        self.lengths = np.zeros(batch, dtype=np.int64)
        self._views: dict[tuple[int, int], KVCache] = {}

    @property
    @abstractmethod
    def arrays(self) -> Sequence[np.ndarray]:
        """The states ``[batch, Hkv, capacity, Dh]``; copies if they are not in host memory."""

    @property
    @abstractmethod
    def addresses(self) -> list[int]:
        """Address of each state, on the host or the device."""

    @abstractmethod
    def _view(self, start: int, stop: int) -> KVCache:
        """Return a new cache on the memory of rows ``start`` to ``stop``."""

    @abstractmethod
    def _write(self, states: Sequence[np.ndarray]) -> None:
        """Write ``[batch, Hkv, length, Dh]`` to the start of each state."""

    @property
    def length(self) -> int:
        """Number of tokens in the longest row."""
        return int(max(self.lengths.tolist()))  # ten times as fast as numpy's for a few numbers

    def append(self, count: int) -> np.ndarray:
        """Claim the next ``count`` positions of every row.

        Called before the backend runs, so that no backend writes past the end.

        Returns:
            positions ``[batch, count]`` int64.

        Raises:
            CapacityError: they do not fit; the cache is unchanged.
        """
        if self.length + count > self.capacity:
            raise CapacityError(
                f"The sequence needs {self.length + count} positions but the KV cache holds"
                f" {self.capacity}; shorten the prompt or open the bundle with a larger capacity."
            )
        positions = self.lengths[:, None] + np.arange(count, dtype=np.int64)
        self.lengths += count
        return positions

    def rewind(self, count: int) -> None:
        """Remove the last ``count`` tokens of every row; their memory is overwritten later.

        Raises:
            ValueError: a row has fewer tokens.
        """
        if not 0 <= count <= int(self.lengths.min()):
            raise ValueError(f"cannot rewind {count} tokens, the rows have {self.lengths.tolist()}")
        self.lengths -= count

    def reset(self) -> None:
        """Remove all tokens of every row."""
        self.lengths[:] = 0

    def row(self, index: int) -> KVCache:
        """Return one row as a cache of batch 1 that shares this cache's memory and lengths."""
        return self.rows(index, index + 1)

    def rows(self, start: int, stop: int) -> KVCache:
        """Return rows ``start`` to ``stop`` as a cache that shares this cache's memory and lengths.

        The same rows give the same object, since sessions keep bindings per cache.
        """
        if (start, stop) == (0, self.batch):
            return self
        if (start, stop) not in self._views:
            view = self._views[start, stop] = self._view(start, stop)
            view.lengths = self.lengths[start:stop]
        return self._views[start, stop]

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Set row ``target`` to the first ``length`` tokens of row ``source``."""
        self.row(target)._write(self.row(source)._read(length))
        self.lengths[target] = length

    def load_prefix(self, states: Sequence[np.ndarray]) -> None:
        """Set all rows to tokens whose keys and values were computed before.

        Args:
            states: ``[batch, Hkv, length, Dh]`` for each state, in its dtype.

        Raises:
            CapacityError: they do not fit; the cache is empty then.
        """
        self.reset()
        length = states[0].shape[2]
        self.append(length)
        self._write(states)

    def save_prefix(self, length: int) -> list[np.ndarray]:
        """Return what ``load_prefix`` takes: the first tokens of each state."""
        return [np.array(array) for array in self._read(length)]

    def _read(self, length: int) -> list[np.ndarray]:
        """Return the first tokens of each state, ``[batch, Hkv, length, Dh]``."""
        return [array[:, :, :length] for array in self.arrays]


class HostCache(KVCache):
    """A KV cache in numpy arrays."""

    def __init__(
        self,
        specs: tuple[TensorSpec, ...],
        batch: int,
        capacity: int,
        arrays: list[np.ndarray] | None = None,
    ) -> None:
        """Use or allocate the memory.

        Args:
            specs: states of the decoder's contract.
            batch: number of rows.
            capacity: tokens per row.
            arrays: memory to use; None allocates zeros.
        """
        super().__init__(specs, batch, capacity)
        sizes = {"batch": batch, "capacity": capacity}
        self._arrays = arrays if arrays is not None else [spec.allocate(sizes) for spec in specs]

    @property
    def arrays(self) -> list[np.ndarray]:
        """The states ``[batch, Hkv, capacity, Dh]`` themselves."""
        return self._arrays

    @property
    def addresses(self) -> list[int]:
        """Host address of each state."""
        return [array.ctypes.data for array in self.arrays]

    def _view(self, start: int, stop: int) -> KVCache:
        arrays = [array[start:stop] for array in self.arrays]
        return type(self)(self.specs, stop - start, self.capacity, arrays)

    def _write(self, states: Sequence[np.ndarray]) -> None:
        for array, part in zip(self.arrays, states, strict=True):
            array[:, :, : part.shape[2]] = part
