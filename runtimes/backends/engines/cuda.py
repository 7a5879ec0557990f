"""The CUDA runtime through cuda-python, every result checked; memory with an owner."""

from __future__ import annotations

import ctypes
import platform
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtimes.errors import UserError
from runtimes.installation import install_command

ALLOCATIONS = ("cudaMalloc", "cudaHostAlloc")  # whose first argument is the size


class CudaError(UserError):
    """A call of the CUDA runtime failed; the sentence has CUDA's name for it."""


def import_cuda() -> Any:
    """``cuda.bindings.runtime``.

    Raises:
        UserError: cuda-python is not installed.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise UserError(
            f"Running TensorRT engines needs cuda-python; run: {install_command('cuda')}."
        ) from error
    return runtime


@dataclass(frozen=True)
class Gpu:
    """The first GPU of this machine.

    Args:
        name: CUDA's, with the number of its multiprocessors: all Jetsons with an Orin share one name.
        sm: compute capability, as in 87.
        driver: the CUDA version that the driver knows.
        platform: the machine's, as in ``aarch64``.
    """

    name: str
    sm: int
    driver: str
    platform: str


class Cuda:
    """Checked calls of the CUDA runtime.

    Args:
        api: ``cuda.bindings.runtime``, or what stands for it in tests.
    """

    def __init__(self, api: Any) -> None:
        self.api = api
        kinds = api.cudaMemcpyKind
        self.to_device, self.to_host = kinds.cudaMemcpyHostToDevice, kinds.cudaMemcpyDeviceToHost
        self.on_device = kinds.cudaMemcpyDeviceToDevice

    def call(self, name: str, *arguments: Any, what: str = "") -> Any:
        """A function of the runtime by its name; its result, without the error code.

        Args:
            what: what the call is for, where that helps in a sentence.

        Raises:
            CudaError: it failed.
        """
        handles = (item.handle if isinstance(item, Stream) else item for item in arguments)
        error, *results = getattr(self.api, name)(*handles)
        if int(error) != 0:
            named = self.api.cudaGetErrorName(error)[1]
            title = named.decode() if isinstance(named, bytes) else str(named)
            if title == "cudaErrorMemoryAllocation":
                size = f"{arguments[0] / 1e6:.0f} MB" if name in ALLOCATIONS else "memory"
                raise CudaError(
                    f"The GPU has no {size} left{f' for {what}' if what else ''} ({title});"
                    " take a smaller capacity or precision, or close other programs."
                )
            raise CudaError(f"CUDA failed in {name}{f' for {what}' if what else ''}: {title}.")
        return results[0] if results else None

    def gpu(self) -> Gpu:
        """The GPU that is used.

        Raises:
            CudaError: there is none, or its driver does not fit this cuda-python.
        """
        try:
            self.call("cudaGetDeviceCount", what="finding a GPU")
        except CudaError as error:
            if "InsufficientDriver" not in str(error):
                raise
            raise CudaError(
                f"{str(error).rstrip('.')}: there is no driver, or it is older than this cuda-python;"
                " take that of the driver's own CUDA, as cuda-python==12.6.* on JetPack 6."
            ) from error
        found = self.call("cudaGetDeviceProperties", 0)
        version = int(self.call("cudaDriverGetVersion"))
        name = found.name.decode() if isinstance(found.name, bytes) else str(found.name)
        driver = f"CUDA {version // 1000}.{version % 1000 // 10}"
        title = f"{name.rstrip(chr(0))} with {int(found.multiProcessorCount)} multiprocessors"
        return Gpu(title, 10 * int(found.major) + int(found.minor), driver, platform.machine())


class Stream:
    """A stream of the device, destroyed with this object; sessions and their caches share one."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.handle: Any = cuda.call("cudaStreamCreate")

    def __int__(self) -> int:
        return int(self.handle)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self.cuda.api.cudaStreamDestroy(self.handle)


class DeviceMemory:
    """Bytes on the device, freed with this object."""

    def __init__(self, cuda: Cuda, size: int, what: str) -> None:
        self.cuda, self.size = cuda, size
        self.address = int(cuda.call("cudaMalloc", max(size, 1), what=what))

    def clear(self, stream: Any) -> None:
        self.cuda.call("cudaMemsetAsync", self.address, 0, self.size, stream)

    def __del__(self) -> None:
        if hasattr(self, "address"):
            self.cuda.api.cudaFree(self.address)


class PinnedArray:
    """Page-locked memory of the host as numpy bytes, freed with this object."""

    def __init__(self, cuda: Cuda, size: int, what: str) -> None:
        self.cuda, self.size = cuda, size
        self.address = int(cuda.call("cudaHostAlloc", max(size, 1), 0, what=what))
        memory = (ctypes.c_ubyte * max(size, 1)).from_address(self.address)
        self.bytes: np.ndarray = np.ctypeslib.as_array(memory)

    def view(self, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        """The beginning as an array."""
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        found: np.ndarray = self.bytes[:count].view(dtype).reshape(shape)
        return found

    def __del__(self) -> None:
        if hasattr(self, "address"):
            self.cuda.api.cudaFreeHost(self.address)
