"""Sessions on TensorRT engines: buffers allocated once, the cache in place, a CUDA graph for decode."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from runtimes.backends.engines.cache import DeviceCache
from runtimes.backends.engines.cuda import Cuda, DeviceMemory, PinnedArray, Stream, import_cuda
from runtimes.backends.engines.layout import (
    DECODE,
    PREFILL,
    Sizes,
    aliases,
    append_copies,
    buffer_bytes,
    bytes_of,
    profile_of,
    shape_of,
)
from runtimes.backends.engines.library import import_library, logger_of
from runtimes.backends.engines.trust import is_trusted
from runtimes.bundle.contracts import Contract, TensorSpec, appended_state
from runtimes.bundle.manifest import DEBUG_PREFIX
from runtimes.cache import CapacityError, KVCache
from runtimes.decode_call import CallLimits, Piece, split_call, validated_call
from runtimes.errors import UserError
from runtimes.session import SessionOptions

GPU = "cuda"
# TensorRT's names of dtypes, in numpy's.
DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64"}


@dataclass(frozen=True)
class LoadedEngine:
    """An engine in a process, and the stream that it runs on."""

    trt: ModuleType
    cuda: Cuda
    runtime: Any
    engine: Any
    stream: Stream
    file: Path


def load_engine(library: str, file: Path, options: SessionOptions) -> LoadedEngine:
    """The engine that lies beside an artifact's ONNX file.

    Raises:
        UserError: there is no GPU, no engine, or TensorRT cannot load it.
    """
    if options.device not in (None, GPU):
        raise UserError(
            f"The backend {library} runs on {GPU}, or its ONNX files on cpu, not on {options.device}."
        )
    try:
        cuda = Cuda(import_cuda())
        cuda.gpu()
    except UserError as error:
        raise UserError(
            f"The engines of {library} need an NVIDIA GPU ({str(error).rstrip('.')}); --device cpu runs their"
            " ONNX files in ONNX Runtime instead."
        ) from error
    plan = file.with_suffix(".engine")
    if not plan.is_file() and any(part.startswith(DEBUG_PREFIX) for part in plan.parts):
        raise UserError(
            "engines give no taps, but their ONNX files do: dsvl-export parity --device cpu --taps"
        )
    if not plan.is_file():
        raise UserError(f"There is no engine {plan}; run: dsvl-export build-engine BUNDLE.")
    trt = import_library(library)
    logger = logger_of(trt)
    logger.messages.clear()
    try:
        runtime = trt.Runtime(logger)
    except TypeError as error:  # how the bindings say that TensorRT gave none
        raise UserError(f"TensorRT cannot start here: {logger.errors()}; is the GPU free?") from error
    trusted = is_trusted(plan)
    runtime.engine_host_code_allowed = trusted  # a version-compatible engine brings its own runtime
    engine = runtime.deserialize_cuda_engine(_mapped(plan))
    if engine is None and not trusted:
        raise UserError(
            f"TensorRT cannot load {plan}: {logger.errors()}; it was not built on this machine, so that code"
            " in it is not run: build it again here, or give --trust-engine if you trust who made it."
        )
    if engine is None:
        short = "memory" in logger.errors().lower()
        again = (
            "close other programs, or take a smaller precision" if short else "build it again on this machine"
        )
        raise UserError(f"TensorRT cannot load {plan}: {logger.errors()}; {again}.")
    if engine.streamable_weights_size:
        engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
    return LoadedEngine(trt, cuda, runtime, engine, Stream(cuda), plan)


def _mapped(plan: Path) -> mmap.mmap:
    """An engine's file without a copy of it in memory, which the GPU of a Jetson shares."""
    try:
        with plan.open("rb") as handle:
            return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise UserError(f"The engine {plan} cannot be read: {error}.") from error


class _Runner:
    """One engine with its execution contexts, one for each profile, and buffers for all but the states.

    The contexts never run at the same time and share their scratch memory.
    """

    def __init__(self, loaded: LoadedEngine, contract: Contract) -> None:
        self.loaded, self.contract = loaded, contract
        engine, trt = loaded.engine, loaded.trt
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        is_output = {name: engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT for name in names}
        aliased = getattr(engine, "get_aliased_input_tensor", lambda name: None)  # since TensorRT 10.15
        outputs = {name: aliased(name) for name in names if is_output[name]}
        self.aliases = aliases(contract, outputs)
        self.appended = [spec for spec in map(appended_state, contract.states) if spec.name in outputs]
        self._check([*contract.inputs, *contract.states, *contract.outputs, *self.appended], names)
        self.limits = [self._limits(index) for index in range(engine.num_optimization_profiles)]
        sizes = buffer_bytes((*contract.inputs, *contract.outputs, *self.appended), self.limits)
        cuda = loaded.cuda
        self.device = {name: DeviceMemory(cuda, size, name) for name, size in sizes.items()}
        hosted = [spec.name for spec in (*contract.inputs, *contract.outputs)]
        self.host = {name: PinnedArray(cuda, sizes[name], name) for name in hosted}
        self.contexts = self._contexts()
        self._bound: list[Any] = [None] * len(self.contexts)

    def _check(self, specs: list[TensorSpec], names: list[str]) -> None:
        """The engine has the contract's tensors in the contract's dtypes; buffers are sized by them."""
        for spec in specs:
            if spec.name not in names:
                raise UserError(f"The engine {self.loaded.file} has no {spec.name}; build it again.")
            found = DTYPES.get(self.loaded.engine.get_tensor_dtype(spec.name).name)
            if found != spec.dtype:
                raise UserError(
                    f"{spec.name} is {found} in the engine {self.loaded.file} and {spec.dtype} in its"
                    " contract; build it again."
                )

    def _limits(self, profile: int) -> dict[str, int]:
        """Largest size of each named dim under a profile."""
        sizes: dict[str, int] = {}
        for spec in (*self.contract.inputs, *self.contract.states):
            *_, largest = self.loaded.engine.get_tensor_profile_shape(spec.name, profile)
            for dim, size in zip(spec.shape, tuple(largest), strict=True):
                if isinstance(dim, str):
                    sizes[dim] = int(size)
        return sizes

    def _contexts(self) -> list[Any]:
        engine, cuda, trt = self.loaded.engine, self.loaded.cuda, self.loaded.trt
        count = engine.num_optimization_profiles
        scratch = max(engine.get_device_memory_size_for_profile_v2(index) for index in range(count))
        self._scratch = DeviceMemory(cuda, scratch, "scratch memory of the engine")
        contexts = []
        for index in range(count):
            context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            if context is None:
                raise UserError(
                    f"TensorRT cannot make an execution context for {self.loaded.file}:"
                    f" {logger_of(trt).errors()}; close other programs, or take a smaller precision."
                )
            context.set_device_memory(self._scratch.address, self._scratch.size)
            if not context.set_optimization_profile_async(index, int(self.loaded.stream)):
                raise UserError(
                    f"TensorRT refuses the profile {index} of {self.loaded.file}; build it again."
                )
            contexts.append(context)
        return contexts

    def bind(self, profile: int, sizes: Sizes, cache: DeviceCache | None) -> tuple[Any, ...]:
        """Give a context its shapes and addresses, where they changed; the key that says which they are."""
        key = (tuple(sorted(sizes.items())), cache.key if cache else None)
        if self._bound[profile] == key:
            return key
        context = self.contexts[profile]
        self._bound[profile] = None
        for spec in (*self.contract.inputs, *self.contract.states):
            self._accepted(context.set_input_shape(spec.name, shape_of(spec, sizes)), spec, sizes)
        addresses = {name: memory.address for name, memory in self.device.items()}
        if cache:
            names = [spec.name for spec in self.contract.states]
            addresses |= dict(zip(names, cache.addresses, strict=True))
            addresses |= {output: addresses[state] for output, state in self.aliases.items()}
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise UserError(f"TensorRT refuses an address for {name} of {self.loaded.file}.")
        self._bound[profile] = key
        return key

    def _accepted(self, accepted: bool, spec: TensorSpec, sizes: Sizes) -> None:
        if not accepted:
            raise UserError(
                f"{spec.name} {list(shape_of(spec, sizes))} lies beyond the profiles of {self.loaded.file};"
                " build the engine for a larger capacity or batch."
            )

    def enqueue(self, profile: int, sizes: Sizes) -> None:
        """Queue the copies to the device, the engine, and the copies back."""
        cuda, stream = self.loaded.cuda, self.loaded.stream
        for spec in self.contract.inputs:
            name, size = spec.name, bytes_of(spec, sizes)
            arguments = (self.device[name].address, self.host[name].address, size, cuda.to_device, stream)
            cuda.call("cudaMemcpyAsync", *arguments, what=name)
        logger = logger_of(self.loaded.trt)
        logger.messages.clear()
        if not self.contexts[profile].execute_async_v3(int(stream)):
            raise UserError(f"TensorRT failed in the {self.contract.component}: {logger.errors()}.")
        for spec in self.contract.outputs:
            name, size = spec.name, bytes_of(spec, sizes)
            arguments = (self.host[name].address, self.device[name].address, size, cuda.to_host, stream)
            cuda.call("cudaMemcpyAsync", *arguments, what=name)

    def put(self, spec: TensorSpec, array: np.ndarray) -> None:
        self.host[spec.name].view(spec.dtype, array.shape)[...] = array

    def results(self, sizes: Sizes) -> dict[str, np.ndarray]:
        """Copies of the outputs, once the stream is done."""
        self.loaded.cuda.call("cudaStreamSynchronize", self.loaded.stream, what=self.contract.component)
        return {
            spec.name: self.host[spec.name].view(spec.dtype, shape_of(spec, sizes)).copy()
            for spec in self.contract.outputs
        }


class EngineComponent:
    """A stateless component on an engine, one image at a time."""

    def __init__(self, loaded: LoadedEngine, contract: Contract) -> None:
        self.contract, self._runner = contract, _Runner(loaded, contract)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        for spec in self.contract.inputs:
            spec.check(inputs[spec.name])
        count, sizes = len(inputs[self.contract.inputs[0].name]), {"batch": 1}
        found = []
        for index in range(count):
            for spec in self.contract.inputs:
                self._runner.put(spec, inputs[spec.name][index : index + 1])
            self._runner.bind(0, sizes, None)
            self._runner.enqueue(0, sizes)
            found.append(self._runner.results(sizes))
        return {
            spec.name: np.concatenate([each[spec.name] for each in found]) for spec in self.contract.outputs
        }


class EngineDecoder:
    """The decoder on an engine with a prefill and a decode profile.

    A decode step that runs again with the same cache and batch is a CUDA graph: captured at the second
    time, as TensorRT wants a plain run after every change of shapes.
    """

    def __init__(self, loaded: LoadedEngine, contract: Contract) -> None:
        self.contract, self._loaded = contract, loaded
        self._runner = _Runner(loaded, contract)
        self._graph: Any = None
        self._graph_key: tuple[Any, ...] | None = None  # of the last decode step
        self.no_graph: str | None = None  # why decode steps cannot be captured, where they cannot
        self.tapped: Mapping[str, np.ndarray] = {}
        # Appended rows leave the capacity to the cache; an engine that updates it has a fixed one.
        self._most = self._runner.limits[PREFILL]["capacity"]
        self.most_rows = self._runner.limits[PREFILL]["rows"]
        self.most_batch = self._runner.limits[DECODE]["batch"]

    def new_cache(self, batch: int, capacity: int) -> DeviceCache:
        """A cache on the device.

        Raises:
            CapacityError: the engine was built for a smaller one.
        """
        if capacity > self._most:
            raise CapacityError(
                f"The engine {self._loaded.file} holds {self._most} tokens, a KV cache of {capacity} was"
                f" asked for; take at most {self._most}, or build it with a larger --capacity."
            )
        if batch > self.most_batch:
            raise UserError(
                f"The engine {self._loaded.file} decodes at most {self.most_batch} sequences together,"
                f" not {batch}; build it for a larger batch."
            )
        slots = capacity if self._runner.appended else self._most
        loaded = self._loaded
        return DeviceCache(self.contract.states, batch, capacity, slots, loaded.cuda, loaded.stream)

    def decode(self, inputs_embeds: np.ndarray, logit_rows: np.ndarray, cache: KVCache) -> np.ndarray:
        call = validated_call(self.contract, DeviceCache, inputs_embeds, logit_rows, cache)
        with call as (own, rows, positions):
            length = inputs_embeds.shape[1]
            limits = self._runner.limits[profile_of(length)]
            within = CallLimits(limits["sequence"], limits["rows"])
            pieces = split_call(length, rows.tolist(), 0, within)
            found = [self._run(piece, inputs_embeds, positions, own) for piece in pieces]
        joined = {
            spec.name: np.concatenate([outputs[spec.name] for outputs in found], axis=1)
            for spec in self.contract.outputs
        }
        logits = joined.pop("logits")
        self.tapped = joined
        computed = [row for piece in pieces for row in piece.rows]
        return logits[:, np.searchsorted(computed, rows)]

    def _run(
        self, piece: Piece, embeds: np.ndarray, positions: np.ndarray, cache: DeviceCache
    ) -> dict[str, np.ndarray]:
        """One call of the engine for the tokens of a piece."""
        profile, tokens = profile_of(piece.length), slice(piece.start, piece.stop)
        sizes = {
            "batch": len(embeds), "sequence": piece.length, "rows": len(piece.rows), "capacity": cache.slots,
        }  # fmt: skip
        rows = np.array(piece.rows, np.int64) - piece.start
        feeds = (embeds[:, tokens], positions[:, tokens], rows)
        for spec, array in zip(self.contract.inputs, feeds, strict=True):
            self._runner.put(spec, array)
        key = self._runner.bind(profile, sizes, cache)
        if profile == DECODE:
            self._decode_step(key, sizes)
        else:
            self._runner.enqueue(profile, sizes)
        cuda = self._loaded.cuda
        for index, spec in enumerate(self._runner.appended):
            source = self._runner.device[spec.name].address
            state = self.contract.states[index]
            for copy in append_copies(state, cache.addresses[index], source, feeds[1], cache.slots):
                cuda.call(
                    "cudaMemcpy2DAsync", copy.target, copy.target_pitch, copy.source, copy.source_pitch,
                    copy.width, copy.height, cuda.on_device, self._loaded.stream, what=state.name,
                )  # fmt: skip
        return self._runner.results(sizes)

    def _decode_step(self, key: tuple[Any, ...], sizes: Sizes) -> None:
        cuda, stream = self._loaded.cuda, self._loaded.stream
        if self._graph_key != key:  # TensorRT settles on shapes in a plain run
            self._forget_graph()
            self._runner.enqueue(DECODE, sizes)
            self._graph_key = key
            return
        if self._graph is None and self.no_graph is None:
            self._capture(sizes)
        if self._graph is None:
            self._runner.enqueue(DECODE, sizes)
        else:
            cuda.call("cudaGraphLaunch", self._graph, stream, what="a decode step")

    def _capture(self, sizes: Sizes) -> None:
        """Make a graph of a decode step; what cannot be captured (streamed weights, a DLA) runs without."""
        cuda, stream = self._loaded.cuda, self._loaded.stream
        mode = cuda.api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        cuda.call("cudaStreamBeginCapture", stream, mode)
        try:
            self._runner.enqueue(DECODE, sizes)
            graph = cuda.call("cudaStreamEndCapture", stream)
        except BaseException as error:
            cuda.api.cudaStreamEndCapture(stream.handle)
            if not isinstance(error, UserError):
                raise
            self.no_graph = str(error)
            return
        try:
            self._graph = cuda.call("cudaGraphInstantiate", graph, 0)
        except UserError as error:
            self.no_graph = str(error)
        finally:
            cuda.call("cudaGraphDestroy", graph)

    def _forget_graph(self) -> None:
        if self._graph is not None:
            self._loaded.cuda.call("cudaGraphExecDestroy", self._graph)
        self._graph = self._graph_key = None

    def __del__(self) -> None:
        if getattr(self, "_graph", None) is not None:
            self._loaded.cuda.api.cudaGraphExecDestroy(self._graph)
