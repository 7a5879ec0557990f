"""The KV cache on a GPU: one block of memory that an engine updates in place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtimes.backends.engines.cuda import Cuda, DeviceMemory, Stream
from runtimes.backends.engines.layout import align, tensor_bytes
from runtimes.bundle.contracts import TensorSpec
from runtimes.cache import KVCache


class DeviceCache(KVCache):
    """Keys and values in device memory."""

    def __init__(
        self,
        specs: tuple[TensorSpec, ...],
        batch: int,
        capacity: int,
        slots: int,
        cuda: Cuda,
        stream: Stream,
        block: _Block | None = None,
        first_row: int = 0,
    ) -> None:
        """Use or allocate the memory.

        Args:
            specs: states of the decoder's contract.
            batch: number of rows.
            capacity: tokens per row that may be used.
            slots: tokens per row that are allocated.
            cuda: the CUDA runtime.
            stream: stream of all copies.
            block: memory to use; None allocates zeros.
            first_row: the first row of ``block`` that belongs to this cache.
        """
        super().__init__(specs, batch, capacity)
        self.slots = slots
        self._cuda, self._stream, self._first_row = cuda, stream, first_row
        self._block = block or _Block(cuda, specs, batch, slots)
        if block is None:
            self._block.clear(stream)  # masked values are multiplied by 0: must be finite
        self._addresses = [
            self._block.address + offset + first_row * self._row_bytes(index)
            for index, offset in enumerate(self._block.offsets)
        ]
        self.key = (*self._addresses, batch)  # equal for caches with the same memory

    @property
    def addresses(self) -> list[int]:
        """Device address of each state ``[batch, Hkv, slots, Dh]``."""
        return self._addresses

    @property
    def arrays(self) -> list[np.ndarray]:
        """Copies of the states ``[batch, Hkv, capacity, Dh]`` on the host."""
        sizes = {"batch": self.batch, "capacity": self.capacity}
        arrays = [spec.allocate(sizes) for spec in self.specs]
        for index, array in enumerate(arrays):
            self._copy(index, array, to_host=True)
        self._cuda.call("cudaStreamSynchronize", self._stream)
        return arrays

    def _view(self, start: int, stop: int) -> DeviceCache:
        return DeviceCache(
            self.specs, stop - start, self.capacity, self.slots, self._cuda, self._stream, self._block,
            self._first_row + start,
        )  # fmt: skip

    def _write(self, states: Sequence[np.ndarray]) -> None:
        for index, part in enumerate(states):
            self._copy(index, np.ascontiguousarray(part), to_host=False)
        self._cuda.call("cudaStreamSynchronize", self._stream)

    def _copy(self, index: int, array: np.ndarray, to_host: bool) -> None:
        """Copy the start ``[batch, Hkv, length, Dh]`` of a state from or to the host."""
        batch, heads, length, head_dim = array.shape
        width = length * head_dim * array.itemsize
        pitch = self.slots * head_dim * array.itemsize
        device, host = (self.addresses[index], pitch), (array.ctypes.data, width)
        target, source = (host, device) if to_host else (device, host)
        kind = self._cuda.to_host if to_host else self._cuda.to_device
        what = "reading the KV cache" if to_host else "writing the KV cache"
        self._cuda.call(
            "cudaMemcpy2DAsync", *target, *source, width, batch * heads, kind, self._stream, what=what
        )

    def _row_bytes(self, index: int) -> int:
        return tensor_bytes(self.specs[index], {"batch": 1, "capacity": self.slots})


class _Block(DeviceMemory):
    """Memory for all states of all rows, each state aligned."""

    def __init__(self, cuda: Cuda, specs: tuple[TensorSpec, ...], rows: int, slots: int) -> None:
        self.offsets, size = [], 0
        for spec in specs:
            self.offsets.append(size)
            size += align(tensor_bytes(spec, {"batch": rows, "capacity": slots}))
        super().__init__(cuda, size, f"a KV cache of {slots} tokens")
