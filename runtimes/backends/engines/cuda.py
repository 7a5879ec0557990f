"""The CUDA runtime through cuda-python: checked calls, and memory that is freed automatically."""

from __future__ import annotations

import ctypes
import platform
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtimes.errors import UserError
from runtimes.installation import install_command

ALLOCATIONS = ("cudaMalloc", "cudaHostAlloc")  # their first argument is the size


class CudaError(UserError):
    """A call of the CUDA runtime failed; the message has the name of CUDA's error."""


def import_cuda() -> Any:
    """Import ``cuda.bindings.runtime``.

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
        name: CUDA's name and the number of multiprocessors (all Jetson Orin share one name).
        sm: compute capability, such as 87.
        driver: CUDA version that the driver supports.
        platform: architecture of the machine, such as ``aarch64``.
    """

    name: str
    sm: int
    driver: str
    platform: str


class Cuda:
    """Checked calls of the CUDA runtime."""

    def __init__(self, api: Any) -> None:
        """Use ``cuda.bindings.runtime``, or a replacement in tests."""
        self.api = api
        kinds = api.cudaMemcpyKind
        self.to_device, self.to_host = kinds.cudaMemcpyHostToDevice, kinds.cudaMemcpyDeviceToHost
        self.on_device = kinds.cudaMemcpyDeviceToDevice

    def call(self, name: str, *arguments: Any, what: str = "") -> Any:
        """Call a function of the runtime and return its result without the error code.

        Args:
            name: name of the function.
            arguments: its arguments; a ``Stream`` is replaced by its handle.
            what: purpose of the call, for the error message.

        Raises:
            CudaError: the call failed.
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
                    " use a smaller capacity or precision, or close other programs."
                )
            raise CudaError(f"CUDA failed in {name}{f' for {what}' if what else ''}: {title}.")
        return results[0] if results else None

    def gpu(self) -> Gpu:
        """Return the first GPU.

        Raises:
            CudaError: there is no GPU, or its driver does not support this cuda-python.
        """
        try:
            self.call("cudaGetDeviceCount", what="finding a GPU")
        except CudaError as error:
            if "InsufficientDriver" not in str(error):
                raise
            raise CudaError(
                f"{str(error).rstrip('.')}: there is no driver, or it is older than this cuda-python;"
                " install the cuda-python of the driver's CUDA, such as cuda-python==12.6.* on JetPack 6."
            ) from error
        properties = self.call("cudaGetDeviceProperties", 0)
        version = int(self.call("cudaDriverGetVersion"))
        name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
        driver = f"CUDA {version // 1000}.{version % 1000 // 10}"
        title = f"{name.rstrip(chr(0))} with {int(properties.multiProcessorCount)} multiprocessors"
        sm = 10 * int(properties.major) + int(properties.minor)
        return Gpu(title, sm, driver, platform.machine())


class Stream:
    """A CUDA stream, destroyed with this object; a session and its caches share one."""

    def __init__(self, cuda: Cuda) -> None:
        """Create the stream."""
        self.cuda = cuda
        self.handle: Any = cuda.call("cudaStreamCreate")

    def __int__(self) -> int:
        """Return the handle as a number."""
        return int(self.handle)

    def __del__(self) -> None:
        """Destroy the stream."""
        if hasattr(self, "handle"):
            self.cuda.api.cudaStreamDestroy(self.handle)


class DeviceMemory:
    """Device memory, freed with this object."""

    def __init__(self, cuda: Cuda, size: int, what: str) -> None:
        """Allocate ``size`` bytes; ``what`` is their purpose, for the error message."""
        self.cuda, self.size = cuda, size
        self.address = int(cuda.call("cudaMalloc", max(size, 1), what=what))

    def clear(self, stream: Any) -> None:
        """Queue setting all bytes to zero."""
        self.cuda.call("cudaMemsetAsync", self.address, 0, self.size, stream)

    def __del__(self) -> None:
        """Free the memory."""
        if hasattr(self, "address"):
            self.cuda.api.cudaFree(self.address)


class PinnedArray:
    """Page-locked host memory as numpy bytes, freed with this object."""

    def __init__(self, cuda: Cuda, size: int, what: str) -> None:
        """Allocate ``size`` bytes; ``what`` is their purpose, for the error message."""
        self.cuda, self.size = cuda, size
        self.address = int(cuda.call("cudaHostAlloc", max(size, 1), 0, what=what))
        memory = (ctypes.c_ubyte * max(size, 1)).from_address(self.address)
        self.bytes: np.ndarray = np.ctypeslib.as_array(memory)

    def view(self, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return the start of the memory as an array."""
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        array: np.ndarray = self.bytes[:count].view(dtype).reshape(shape)
        return array

    def __del__(self) -> None:
        """Free the memory."""
        if hasattr(self, "address"):
            self.cuda.api.cudaFreeHost(self.address)
