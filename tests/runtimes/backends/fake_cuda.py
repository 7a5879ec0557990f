"""Stand-ins for cuda-python and TensorRT at the level of their calls: they record, check and really compute.

Device memory is memory of the host whose bounds are checked at every access; streams run at once, graphs
when they are launched; an engine runs its ONNX file in ONNX Runtime, from and to the addresses it was given.
What they cannot show is TensorRT's own behavior; the tests marked ``gpu`` do.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from dsvl_export.compilers.engines.build import EngineSettings, profiles
from runtimes.backends.engines.cuda import Cuda, Stream
from runtimes.backends.engines.load import LoadedEngine
from runtimes.bundle.contracts import Contract, updated_state

OK, OUT_OF_MEMORY, NO_DRIVER = 0, 2, 35
NAMES = {
    OUT_OF_MEMORY: b"cudaErrorMemoryAllocation",
    NO_DRIVER: b"cudaErrorInsufficientDriver",
    1: b"cudaErrorInvalidValue",
}
STREAM = 7


class FakeCuda:
    """``cuda.bindings.runtime`` with ``calls`` of (function, arguments); ``memory_bytes`` is all there is."""

    cudaMemcpyKind = SimpleNamespace(
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(
        self, memory_bytes: int = 1 << 30, gpus: int = 1, name: str = "Fake GPU", sm: tuple[int, int] = (8, 9)
    ) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.free, self.gpus, self.name, self.sm = memory_bytes, gpus, name, sm
        self.device: dict[int, Any] = {}
        self.host: dict[int, Any] = {}
        self.capturing: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.streams = 0
        self.fail: dict[str, int] = {}  # function → error

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.startswith("cuda") or not callable(found):
            return found

        def call(*arguments: Any) -> Any:
            self.calls.append((name, arguments))
            if name in self.fail:
                return (self.fail[name], None)
            return found(*arguments)

        return call

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def enqueue(self, work: Callable[[], None]) -> None:
        if self.capturing is not None:
            self.capturing.append(work)
        else:
            work()

    def check(self, address: int, size: int) -> None:
        """The bytes lie inside one allocation of the device."""
        inside = any(
            start <= address and address + size <= start + len(block) for start, block in self.device.items()
        )
        assert inside, f"{size} bytes at {address:#x} are no memory of the device"

    def cudaGetErrorName(self, error: int) -> Any:
        return OK, NAMES.get(int(error), b"cudaErrorUnknown")

    def cudaGetDeviceCount(self) -> Any:
        return (OK, self.gpus) if self.gpus else (NO_DRIVER, None)

    def cudaGetDeviceProperties(self, index: int) -> Any:
        major, minor = self.sm
        return OK, SimpleNamespace(name=self.name.encode(), major=major, minor=minor, multiProcessorCount=16)

    def cudaDriverGetVersion(self) -> Any:
        return OK, 12060

    def cudaMalloc(self, size: int) -> Any:
        if size > self.free:
            return OUT_OF_MEMORY, None
        self.free -= size
        block = (ctypes.c_ubyte * size)(*([0xAB] * min(size, 64)))  # not zero: nobody may rely on it
        self.device[ctypes.addressof(block)] = block
        return OK, ctypes.addressof(block)

    def cudaFree(self, address: int) -> Any:
        self.free += len(self.device.pop(address))
        return (OK,)

    def cudaHostAlloc(self, size: int, flags: int) -> Any:
        block = (ctypes.c_ubyte * size)()
        self.host[ctypes.addressof(block)] = block
        return OK, ctypes.addressof(block)

    def cudaFreeHost(self, address: int) -> Any:
        self.host.pop(address)
        return (OK,)

    def cudaStreamCreate(self) -> Any:
        self.streams += 1
        return OK, STREAM

    def cudaStreamDestroy(self, stream: int) -> Any:
        assert stream == STREAM
        self.streams -= 1
        return (OK,)

    def cudaStreamSynchronize(self, stream: int) -> Any:
        assert self.capturing is None, "a stream that captures cannot be waited for"
        return (OK,)

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: int) -> Any:
        self.check(address, size)
        self.enqueue(lambda: ctypes.memset(address, value, size) and None)
        return (OK,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> Any:
        return self.copied(target, size, source, size, size, 1, kind)

    def cudaMemcpy2DAsync(self, *arguments: int) -> Any:
        return self.copied(*arguments[:-1])

    def copied(
        self,
        target: int,
        target_pitch: int,
        source: int,
        source_pitch: int,
        width: int,
        height: int,
        kind: int,
    ) -> Any:
        kinds = self.cudaMemcpyKind
        if width > min(target_pitch, source_pitch):
            return (1,)
        for row in range(height):
            if kind in (kinds.cudaMemcpyHostToDevice, kinds.cudaMemcpyDeviceToDevice):
                self.check(target + row * target_pitch, width)
            if kind in (kinds.cudaMemcpyDeviceToHost, kinds.cudaMemcpyDeviceToDevice):
                self.check(source + row * source_pitch, width)

        def copy() -> None:
            for row in range(height):
                ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)

        self.enqueue(copy)
        return (OK,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> Any:
        assert self.capturing is None
        self.capturing = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: int) -> Any:
        assert self.capturing is not None
        graph = 100 + len(self.graphs)
        self.graphs[graph], self.capturing = self.capturing, None
        return OK, graph

    def cudaGraphInstantiate(self, graph: int, flags: int) -> Any:
        return OK, graph

    def cudaGraphDestroy(self, graph: int) -> Any:
        return (OK,)

    def cudaGraphExecDestroy(self, graph: int) -> Any:
        del self.graphs[graph]
        return (OK,)

    def cudaGraphLaunch(self, graph: int, stream: int) -> Any:
        for work in self.graphs[graph]:
            work()
        return (OK,)


ORT_TYPES = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64"}


class FakeEngine:
    """An engine of an ONNX file: profiles as ``build_engine`` makes them, TensorRT's rules checked."""

    streamable_weights_size = 0

    def __init__(self, cuda: FakeCuda, file: Path, contract: Contract, settings: EngineSettings) -> None:
        self.cuda, self.contract, self.settings = cuda, contract, settings
        self.session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        self.inputs = {item.name: item for item in self.session.get_inputs()}
        self.outputs = {item.name: item for item in self.session.get_outputs()}
        self.profiles = profiles(contract, settings)
        self.names = [*self.inputs, *self.outputs]
        self.num_io_tensors, self.num_optimization_profiles = len(self.names), len(self.profiles)
        self.updates = {updated_state(spec).name: spec.name for spec in contract.states}
        self.updates = {name: state for name, state in self.updates.items() if name in self.outputs}
        self.contexts: list[FakeContext] = []

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> str:
        return "output" if name in self.outputs else "input"

    def get_tensor_dtype(self, name: str) -> Any:
        item = self.inputs.get(name) or self.outputs[name]
        return SimpleNamespace(name=ORT_TYPES[item.type])

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.updates.get(name)

    def get_tensor_profile_shape(self, name: str, profile: int) -> tuple[tuple[int, ...], ...]:
        ranges = self.profiles[profile]
        fixed = self.settings.capacity if self.updates else None
        dims = self.inputs[name].shape
        return tuple(
            tuple(
                dim if isinstance(dim, int) else fixed if fixed and dim == "capacity" else ranges[dim][which]
                for dim in dims
            )
            for which in range(3)
        )

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return 1000 * (profile + 1)

    def create_execution_context(self, strategy: str) -> FakeContext:
        assert strategy == "user managed"
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]


class FakeContext:
    """An execution context that insists on what TensorRT insists on."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.profile = engine, -1
        self.scratch: tuple[int, int] | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.runs, self.fails, self.refuses_capture = 0, False, False

    def set_device_memory(self, address: int, size: int) -> None:
        self.scratch = (address, size)

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream == STREAM
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.engine.get_tensor_profile_shape(name, self.profile)
        if len(shape) != len(least) or not all(
            a <= size <= b for a, size, b in zip(least, shape, most, strict=True)
        ):
            return False
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        engine = self.engine
        assert stream == STREAM and self.profile >= 0
        assert self.scratch and self.scratch[1] >= engine.get_device_memory_size_for_profile_v2(self.profile)
        assert self.addresses.keys() == {*engine.inputs, *engine.outputs}, "every tensor has an address"
        for output, state in engine.updates.items():
            assert self.addresses[output] == self.addresses[state], (
                f"{output} must share the memory of {state}"
            )
        if self.fails or (self.refuses_capture and engine.cuda.capturing is not None):
            return False
        self.runs += 1
        addresses, shapes = dict(self.addresses), dict(self.shapes)
        engine.cuda.enqueue(lambda: self._compute(addresses, shapes))
        return True

    def _compute(self, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
        engine = self.engine
        feeds = {
            name: self._at(addresses[name], engine.get_tensor_dtype(name).name, shapes[name]).copy()
            for name in engine.inputs
        }
        for name, array in zip(engine.outputs, engine.session.run(list(engine.outputs), feeds), strict=True):
            self._at(addresses[name], engine.get_tensor_dtype(name).name, array.shape)[...] = array

    def _at(self, address: int, kind: str, shape: tuple[int, ...]) -> np.ndarray:
        dtype = np.dtype({"FLOAT": "f4", "HALF": "f2", "INT64": "i8"}[kind])
        size = int(np.prod(shape)) * dtype.itemsize
        self.engine.cuda.check(address, size)
        return np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(address)).view(dtype).reshape(shape)


class FakeTensorRT:
    """The module: an engine's plan is JSON that names its ONNX file and settings."""

    __name__ = "tensorrt"
    TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")

    class ILogger:
        WARNING = 2

    def __init__(self, cuda: FakeCuda, contracts: dict[str, Contract], version: str = "11.4.0") -> None:
        self.cuda, self.contracts, self.__version__ = cuda, contracts, version
        self.engines: list[FakeEngine] = []

    def Runtime(self, logger: Any) -> Any:
        def deserialize(plan: bytes) -> FakeEngine | None:
            try:
                raw = json.loads(bytes(plan))
            except ValueError:
                logger.messages.append((True, "the plan's magic tag does not match"))
                return None
            if raw["host_code"] and not runtime.engine_host_code_allowed:
                logger.messages.append((True, "the plan has host code, which is not allowed"))
                return None
            settings = EngineSettings(raw["capacity"], raw["max_batch"])
            self.engines.append(
                FakeEngine(self.cuda, Path(raw["onnx"]), self.contracts[raw["component"]], settings)
            )
            return self.engines[-1]

        runtime = SimpleNamespace(deserialize_cuda_engine=deserialize, engine_host_code_allowed=False)
        return runtime


def fake_plan(
    onnx: Path, component: str, capacity: int, max_batch: int = 4, host_code: bool = False
) -> bytes:
    """What stands for an engine's file; ``host_code`` is what a version-compatible one brings."""
    values = {"capacity": capacity, "max_batch": max_batch, "host_code": host_code}
    return json.dumps({"onnx": str(onnx), "component": component, **values}).encode()


def loaded(
    file: Path, contract: Contract, capacity: int, max_batch: int = 4, cuda: FakeCuda | None = None
) -> LoadedEngine:
    """An engine in the process, on a fake GPU of its own."""
    cuda = cuda or FakeCuda()
    trt = FakeTensorRT(cuda, {contract.component: contract})
    engine = FakeEngine(cuda, file, contract, EngineSettings(capacity, max_batch))
    return LoadedEngine(trt, Cuda(cuda), None, engine, Stream(Cuda(cuda)), file.with_suffix(".engine"))  # type: ignore[arg-type]
