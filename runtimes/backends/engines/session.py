"""Sessions on TensorRT engines, with preallocated buffers and a CUDA graph for decode steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from runtimes.backends.engines.cache import DeviceCache
from runtimes.backends.engines.cuda import DeviceMemory, PinnedArray
from runtimes.backends.engines.layout import (
    DECODE,
    PREFILL,
    Sizes,
    aliases,
    append_copies,
    buffer_bytes,
    profile_for_tokens,
    tensor_bytes,
)
from runtimes.backends.engines.library import get_logger
from runtimes.backends.engines.load import LoadedEngine
from runtimes.bundle.contracts import Contract, TensorSpec, appended_state
from runtimes.cache import CapacityError, KVCache
from runtimes.decode_call import CallLimits, Piece, split_call, validated_call
from runtimes.errors import UserError

# TensorRT's dtype → numpy's.
DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64"}


class _Runner:
    """An engine with one execution context per profile, and buffers for all tensors but states.

    The contexts never run at the same time and share scratch memory.
    """

    def __init__(self, loaded: LoadedEngine, contract: Contract) -> None:
        self.loaded, self.contract = loaded, contract
        engine, trt = loaded.engine, loaded.trt
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        is_output = {name: engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT for name in names}
        # Since TensorRT 10.15.
        aliased = getattr(engine, "get_aliased_input_tensor", lambda name: None)
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
        """Check the engine's tensors and dtypes against the contract, which sizes the buffers."""
        for spec in specs:
            if spec.name not in names:
                raise UserError(f"The engine {self.loaded.file} has no tensor {spec.name}; build it again.")
            dtype = DTYPES.get(self.loaded.engine.get_tensor_dtype(spec.name).name)
            if dtype != spec.dtype:
                raise UserError(
                    f"{spec.name} is {dtype} in the engine {self.loaded.file} and {spec.dtype} in its"
                    " contract; build it again."
                )

    def _limits(self, profile: int) -> dict[str, int]:
        """Return the largest size of each named dim under a profile."""
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
                    f"TensorRT cannot create an execution context for {self.loaded.file}:"
                    f" {get_logger(trt).errors()}; close other programs, or use a smaller precision."
                )
            context.set_device_memory(self._scratch.address, self._scratch.size)
            if not context.set_optimization_profile_async(index, int(self.loaded.stream)):
                raise UserError(f"TensorRT rejects profile {index} of {self.loaded.file}; build it again.")
            contexts.append(context)
        return contexts

    def bind(self, profile: int, sizes: Sizes, cache: DeviceCache | None) -> tuple[Any, ...]:
        """Set the shapes and addresses of a context if they changed; return a key of them."""
        key = (tuple(sorted(sizes.items())), cache.key if cache else None)
        if self._bound[profile] == key:
            return key
        context = self.contexts[profile]
        self._bound[profile] = None
        for spec in (*self.contract.inputs, *self.contract.states):
            self._check_shape(context.set_input_shape(spec.name, spec.sized(sizes)), spec, sizes)
        addresses = {name: memory.address for name, memory in self.device.items()}
        if cache:
            names = [spec.name for spec in self.contract.states]
            addresses |= dict(zip(names, cache.addresses, strict=True))
            addresses |= {output: addresses[state] for output, state in self.aliases.items()}
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise UserError(f"TensorRT rejects the address of {name} of {self.loaded.file}.")
        self._bound[profile] = key
        return key

    def _check_shape(self, accepted: bool, spec: TensorSpec, sizes: Sizes) -> None:
        if not accepted:
            raise UserError(
                f"{spec.name} {list(spec.sized(sizes))} is outside the profiles of"
                f" {self.loaded.file}; build the engine for a larger capacity or batch."
            )

    def enqueue(self, profile: int, sizes: Sizes) -> None:
        """Queue the copies to the device, the engine, and the copies back."""
        cuda, stream = self.loaded.cuda, self.loaded.stream
        for spec in self.contract.inputs:
            name, size = spec.name, tensor_bytes(spec, sizes)
            arguments = (self.device[name].address, self.host[name].address, size, cuda.to_device, stream)
            cuda.call("cudaMemcpyAsync", *arguments, what=name)
        logger = get_logger(self.loaded.trt)
        logger.messages.clear()
        if not self.contexts[profile].execute_async_v3(int(stream)):
            raise UserError(f"TensorRT failed in the {self.contract.component}: {logger.errors()}.")
        for spec in self.contract.outputs:
            name, size = spec.name, tensor_bytes(spec, sizes)
            arguments = (self.host[name].address, self.device[name].address, size, cuda.to_host, stream)
            cuda.call("cudaMemcpyAsync", *arguments, what=name)

    def put(self, spec: TensorSpec, array: np.ndarray) -> None:
        """Write an input to its host buffer."""
        self.host[spec.name].view(spec.dtype, array.shape)[...] = array

    def results(self, sizes: Sizes) -> dict[str, np.ndarray]:
        """Wait for the stream and return copies of the outputs."""
        self.loaded.cuda.call("cudaStreamSynchronize", self.loaded.stream, what=self.contract.component)
        return {
            spec.name: self.host[spec.name].view(spec.dtype, spec.sized(sizes)).copy()
            for spec in self.contract.outputs
        }


class EngineComponent:
    """Session of a stateless component on an engine, one image at a time."""

    def __init__(self, loaded: LoadedEngine, contract: Contract) -> None:
        """Allocate the buffers.

        Raises:
            UserError: the engine does not implement the contract, or the GPU has too little memory.
        """
        self.contract, self._runner = contract, _Runner(loaded, contract)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute the outputs by name; see ``ComponentSession.run``."""
        for spec in self.contract.inputs:
            spec.check(inputs[spec.name])
        count, sizes = len(inputs[self.contract.inputs[0].name]), {"batch": 1}
        results = []
        for index in range(count):
            for spec in self.contract.inputs:
                self._runner.put(spec, inputs[spec.name][index : index + 1])
            self._runner.bind(0, sizes, None)
            self._runner.enqueue(0, sizes)
            results.append(self._runner.results(sizes))
        return {
            spec.name: np.concatenate([result[spec.name] for result in results])
            for spec in self.contract.outputs
        }


class EngineDecoder:
    """Session of the decoder on an engine with a prefill and a decode profile.

    Repeated decode steps with the same cache and batch are a CUDA graph. It is captured in the
    second step, because TensorRT requires a plain run after every change of shapes.
    """

    def __init__(self, loaded: LoadedEngine, contract: Contract) -> None:
        """Allocate the buffers.

        Raises:
            UserError: the engine does not implement the contract, or the GPU has too little memory.
        """
        self.contract, self._loaded = contract, loaded
        self._runner = _Runner(loaded, contract)
        self._graph: Any = None
        self._graph_key: tuple[Any, ...] | None = None  # of the last decode step
        self.no_graph_reason: str | None = None  # why decode steps cannot be captured, if so
        self.tapped: Mapping[str, np.ndarray] = {}
        # An engine that returns new rows allows any capacity; one that updates states does not.
        self._max_capacity = self._runner.limits[PREFILL]["capacity"]
        self.max_logit_rows = self._runner.limits[PREFILL]["rows"]
        self.max_batch = self._runner.limits[DECODE]["batch"]

    def new_cache(self, batch: int, capacity: int) -> DeviceCache:
        """Create an empty cache on the device.

        Raises:
            CapacityError: the engine was built for a smaller capacity.
            UserError: the engine was built for a smaller batch, or the GPU has too little memory.
        """
        if capacity > self._max_capacity:
            raise CapacityError(
                f"The engine {self._loaded.file} holds {self._max_capacity} tokens, but a KV cache of"
                f" {capacity} was requested; use at most {self._max_capacity}, or build the engine with a"
                " larger --capacity."
            )
        if batch > self.max_batch:
            raise UserError(
                f"The engine {self._loaded.file} decodes at most {self.max_batch} sequences together,"
                f" not {batch}; build it for a larger batch."
            )
        slots = capacity if self._runner.appended else self._max_capacity
        loaded = self._loaded
        return DeviceCache(self.contract.states, batch, capacity, slots, loaded.cuda, loaded.stream)

    def decode(self, inputs_embeds: np.ndarray, logit_rows: np.ndarray, cache: KVCache) -> np.ndarray:
        """Append tokens to the cache and compute logits; see ``DecoderSession.decode``."""
        call = validated_call(self.contract, DeviceCache, inputs_embeds, logit_rows, cache)
        with call as (own, rows, positions):
            length = inputs_embeds.shape[1]
            sizes = self._runner.limits[profile_for_tokens(length)]
            limits = CallLimits(sizes["sequence"], sizes["rows"])
            pieces = split_call(length, rows.tolist(), 0, limits)
            results = [self._run(piece, inputs_embeds, positions, own) for piece in pieces]
        outputs = {
            spec.name: np.concatenate([result[spec.name] for result in results], axis=1)
            for spec in self.contract.outputs
        }
        logits = outputs.pop("logits")
        self.tapped = outputs
        computed = [row for piece in pieces for row in piece.rows]
        return logits[:, np.searchsorted(computed, rows)]

    def _run(
        self, piece: Piece, embeds: np.ndarray, positions: np.ndarray, cache: DeviceCache
    ) -> dict[str, np.ndarray]:
        """Run the engine for the tokens of a piece."""
        profile, tokens = profile_for_tokens(piece.length), slice(piece.start, piece.stop)
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
        if self._graph_key != key:  # TensorRT needs a plain run after a change of shapes
            self._forget_graph()
            self._runner.enqueue(DECODE, sizes)
            self._graph_key = key
            return
        if self._graph is None and self.no_graph_reason is None:
            self._capture(sizes)
        if self._graph is None:
            self._runner.enqueue(DECODE, sizes)
        else:
            cuda.call("cudaGraphLaunch", self._graph, stream, what="a decode step")

    def _capture(self, sizes: Sizes) -> None:
        """Capture a decode step as a graph; streamed weights or a DLA cannot be captured."""
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
            self.no_graph_reason = str(error)
            return
        try:
            self._graph = cuda.call("cudaGraphInstantiate", graph, 0)
        except UserError as error:
            self.no_graph_reason = str(error)
        finally:
            cuda.call("cudaGraphDestroy", graph)

    def _forget_graph(self) -> None:
        if self._graph is not None:
            self._loaded.cuda.call("cudaGraphExecDestroy", self._graph)
        self._graph = self._graph_key = None

    def __del__(self) -> None:
        """Destroy the graph."""
        if getattr(self, "_graph", None) is not None:
            self._loaded.cuda.api.cudaGraphExecDestroy(self._graph)
