"""Backend ``onnxruntime``: ONNX files in ONNX Runtime, on a CPU or a GPU (``onnxruntime-gpu``)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtimes.backends.onnxruntime_adapters import ADAPTED, adapted_file, read_adapter
from runtimes.backends.onnxruntime_releases import release_for_artifact, upgrade_message
from runtimes.bundle.contracts import Contract, TensorSpec, appended_state, updated_state
from runtimes.cache import HostCache, KVCache
from runtimes.decode_call import UNLIMITED, validated_call
from runtimes.errors import UserError, first_line
from runtimes.installation import install_command
from runtimes.memory import available_memory, widening
from runtimes.session import EntryPoints, Execution, SessionOptions

if TYPE_CHECKING:
    from runtimes.bundle.manifest import Artifact
    from runtimes.chain import Chain

# Device → execution provider.
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
CPU, CUDA = "cpu", "cuda"  # kinds of memory
# Dialects; integer matmuls with a scale per token have kernels only on a CPU.
ORT, ORT_TOKENS = "ort", "ort_tokens"
CONCURRENT = True  # sessions may run at the same time in different threads
PREFILL_FROM = 32  # shortest call that uses the prefill graph; calls with speculative tokens are shorter


def _import() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(
            f"The backend onnxruntime is not installed; run: {install_command('onnxruntime')}."
        ) from error
    return onnxruntime


def devices() -> list[str]:
    """List the devices that this machine supports; see ``Backend.devices``."""
    available = _import().get_available_providers()
    return [device for device, provider in PROVIDERS.items() if provider in available]


def execution(artifact: Artifact, device: str | None = None) -> Execution:
    """Determine whether an artifact can run here; see ``Backend.execution``."""
    device = device or CPU
    if artifact.dialect not in (ORT, ORT_TOKENS):
        return Execution("not run", f"its dialect is {artifact.dialect}, but this release runs {ORT}")
    if artifact.dialect == ORT_TOKENS and device != CPU:
        return Execution("not run", f"{artifact.precision} runs only on a CPU, not on {device}")
    try:
        available = devices()
    except UserError as error:
        return Execution("not run", str(error).rstrip("."))
    if artifact.target not in available:
        reason = f"it was built for {artifact.target}, but only {', '.join(available)} is available"
        return Execution("not run", reason)
    if device not in available:
        return Execution("not run", f"this ONNX Runtime has no {device}, only {', '.join(available)}")
    reason = release_problem(artifact)
    if reason:
        return Execution("not run", reason)
    return Execution("ran", f"{device} with onnxruntime {release()}", device=device)


def release() -> str:
    """Return the version of the installed ONNX Runtime.

    Raises:
        UserError: it is not installed.
    """
    return str(_import().__version__)


def release_problem(artifact: Artifact) -> str:
    """Explain why the installed release cannot run an artifact; empty if it can."""
    return upgrade_message(release_for_artifact(artifact), release())


def _open(file: Path, contract: Contract, options: SessionOptions) -> Any:
    ort = _import()
    device = options.device or CPU
    provider = PROVIDERS.get(device)
    if provider not in ort.get_available_providers():
        install = "; run: pip uninstall onnxruntime, pip install 'dsvl-export[onnxruntime-gpu]'"
        gpu = install if provider and device != CPU else ""
        raise UserError(
            f"This ONNX Runtime cannot run on {device!r};"
            f" it has {', '.join(ort.get_available_providers())}{gpu}."
        )
    if device == CPU:
        _check_memory(file, contract)
    elif hasattr(ort, "preload_dlls"):  # finds CUDA's libraries in pip's packages
        ort.preload_dlls()
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    # Multiply weights after DequantizeLinear in float; the default rounds activations to int8.
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if options.threads:
        settings.intra_op_num_threads = options.threads
    try:
        session = ort.InferenceSession(str(file), settings, providers=_providers(device))
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        reason = first_line(error)
        raise UserError(f"ONNX Runtime cannot load {file}: {reason}.") from error
    if session.get_providers()[0] != provider:
        # It falls back to the CPU silently if a provider's library, driver or GPU is missing.
        raise UserError(
            f"ONNX Runtime could not start {provider} and fell back to {session.get_providers()[0]};"
            " fix CUDA and its driver (see the log of ONNX Runtime), or use --device cpu."
        )
    states = tuple(spec.name for spec in contract.states)
    expected = {spec.name for spec in contract.inputs} | set(states)
    if {item.name for item in session.get_inputs()} != expected:
        raise UserError(f"The inputs of {file} differ from its contract; export it again.")
    return session


def _providers(device: str) -> list[str]:
    """Return the providers of a device; CUDA runs the nodes that TensorRT does not support."""
    chain = {"cpu": ["cpu"], "cuda": ["cuda"], "tensorrt": ["tensorrt", "cuda"]}[device]
    return [PROVIDERS[name] for name in chain]


def _check_memory(file: Path, contract: Contract) -> None:
    """Raise UserError if the weights exceed the free memory; loading needs at least that."""
    weights = file.with_stem(file.stem.replace(ADAPTED, ""))  # a graph for adapters has no others
    stored = sum(part.stat().st_size for part in file.parent.glob(f"{weights.name}*"))
    needed = stored * widening("onnxruntime", contract)
    free = available_memory()
    if needed > free:
        raise UserError(
            f"Loading the {contract.component} into ONNX Runtime on a CPU takes at least"
            f" {needed / 1e9:.1f} GB of memory, but only {free / 1e9:.1f} GB are free."
        )


def prefill_file(file: Path) -> Path:
    """Return the path of a decoder's prefill graph; not every decoder has one."""
    return file.with_stem(f"{file.stem}_prefill")


def open_component(file: Path, contract: Contract, options: SessionOptions) -> OrtComponent:
    """Open a component; see ``Backend.open_component``."""
    return OrtComponent(_open(file, contract, options), contract)


def open_decoder(file: Path, contract: Contract, options: SessionOptions) -> OrtDecoder:
    """Open the decoder; see ``Backend.open_decoder``."""
    memory, prefill = CPU if options.device in (None, CPU) else CUDA, prefill_file(file)
    with_prefill = memory == CPU and prefill.exists()
    return OrtDecoder(
        _open(file, contract, options),
        contract,
        memory,
        _open(prefill, contract, options) if with_prefill else None,
    )


def is_switchable(files: Sequence[str]) -> bool:
    """Return whether a decoder has a graph for adapters; see ``SwitchesAdapters.is_switchable``."""
    return str(adapted_file(Path(files[0]))) in files


def open_adaptable_decoder(file: Path, contract: Contract, options: SessionOptions) -> OrtDecoder:
    """Open the decoder's graph for adapters; see ``SwitchesAdapters.open_adaptable_decoder``."""
    return open_decoder(adapted_file(file), contract, options)


def entry_points(chain: Chain, own: Collection[str], capacity: int) -> EntryPoints:
    """Return the main graph of a decoder with a prefill graph: it also runs short prompts."""
    decoder = chain.decoder
    if isinstance(decoder, OrtDecoder) and decoder.has_prefill:
        return EntryPoints(decoders={"decoder without its graph for prompts": decoder.without_prefill()})
    return EntryPoints()


class OrtComponent:
    """Session of a stateless component in ONNX Runtime."""

    def __init__(self, session: Any, contract: Contract) -> None:
        """Run an ``InferenceSession`` under its contract."""
        self.contract, self._session = contract, session

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute the outputs by name; see ``ComponentSession.run``."""
        for spec in self.contract.inputs:
            spec.check(inputs[spec.name])
        names = [spec.name for spec in self.contract.outputs]
        try:
            outputs = self._session.run(names, dict(inputs))
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            raise _failed(self.contract, error) from error
        return dict(zip(names, outputs, strict=True))


class OrtCache(HostCache):
    """A KV cache in host memory, with the I/O bindings of its decoders."""

    memory = CPU

    def __init__(self, *arguments: Any) -> None:
        """Allocate the memory; see ``HostCache`` for the arguments."""
        super().__init__(*arguments)
        self.bindings: dict[Any, Any] = {}  # by decoder and session


class OrtDeviceCache(OrtCache):
    """A KV cache in device memory, with the I/O bindings of its decoders."""

    writes_parts = False

    def __init__(
        self,
        specs: tuple[TensorSpec, ...],
        batch: int,
        capacity: int,
        memory: str,
        values: list[Any] | None = None,
        first_row: int = 0,
    ) -> None:
        """Use or allocate the memory.

        Args:
            specs: states of the decoder's contract.
            batch: number of rows.
            capacity: tokens per row.
            memory: ONNX Runtime's name of the device.
            values: OrtValues ``[rows, Hkv, capacity, Dh]`` to use; None allocates zeros.
            first_row: the first row of ``values`` that belongs to this cache.
        """
        KVCache.__init__(self, specs, batch, capacity)
        self.memory = memory
        sizes = {"batch": batch, "capacity": capacity}
        self._first_row = first_row
        self.bindings = {}
        self._values = values or [self._value(spec.allocate(sizes)) for spec in specs]

    def _value(self, array: np.ndarray) -> Any:
        return _import().OrtValue.ortvalue_from_numpy(array, self.memory, 0)

    @property
    def arrays(self) -> list[np.ndarray]:
        """Copies of the states on the host."""
        rows = slice(self._first_row, self._first_row + self.batch)
        return [value.numpy()[rows].copy() for value in self._values]

    @property
    def addresses(self) -> list[int]:
        """Device address of each state."""
        addresses = []
        for spec, value in zip(self.specs, self._values, strict=True):
            _, *row = value.shape()
            size = int(np.prod(row)) * np.dtype(spec.dtype).itemsize
            addresses.append(value.data_ptr() + self._first_row * size)
        return addresses

    def _view(self, start: int, stop: int) -> OrtDeviceCache:
        first, count = self._first_row + start, stop - start
        return OrtDeviceCache(self.specs, count, self.capacity, self.memory, self._values, first)

    def _write(self, states: Sequence[np.ndarray]) -> None:
        rows = slice(self._first_row, self._first_row + self.batch)
        for value, part in zip(self._values, states, strict=True):
            array = value.numpy().copy()
            array[rows, :, : part.shape[2]] = part
            value.update_inplace(array)


class OrtDecoder:
    """Session of the decoder in ONNX Runtime; the cache is bound once per session.

    If the graph updates its states, inputs and outputs are bound to the same memory. If it returns
    the new rows of a step, they are copied into the cache after the step.
    """

    max_logit_rows = max_batch = UNLIMITED

    def __init__(
        self,
        session: Any,
        contract: Contract,
        memory: str = CPU,
        prefill: Any | None = None,
        adapter: Mapping[str, Any] | None = None,
    ) -> None:
        """Run one or two ``InferenceSession`` objects under their contract.

        Args:
            session: session of the main graph.
            contract: the decoder's contract.
            memory: ONNX Runtime's name of the device.
            prefill: session of the prefill graph, which is faster for many tokens; None if there
                is none.
            adapter: tensors of a LoRA adapter in that memory, by their inputs; None computes
                without one.
        """
        self.contract, self._session, self._memory = contract, session, memory
        self._adapter = adapter or {}
        self._prefill = prefill or session
        self.tapped: Mapping[str, np.ndarray] = {}
        outputs = {item.name for item in session.get_outputs()}
        appended = [appended_state(spec) for spec in contract.states]
        self._appended = [spec for spec in appended if spec.name in outputs]

    @property
    def has_prefill(self) -> bool:
        """Whether there is a prefill graph."""
        return self._prefill is not self._session

    def without_prefill(self) -> OrtDecoder:
        """Return the same decoder without its prefill graph."""
        return OrtDecoder(self._session, self.contract, self._memory, adapter=self._adapter)

    def with_adapter(self, file: Path) -> OrtDecoder:
        """Return a decoder on the same sessions that adds an adapter's change."""
        values = read_adapter(file, self._session)
        if self._memory != CPU:
            place = _import().OrtValue.ortvalue_from_numpy
            values = {name: place(value.numpy(), self._memory, 0) for name, value in values.items()}
        return OrtDecoder(self._session, self.contract, self._memory, self._prefill, values)

    def new_cache(self, batch: int, capacity: int) -> OrtCache:
        """Create an empty cache in the memory of the session."""
        if self._memory != CPU:
            return OrtDeviceCache(self.contract.states, batch, capacity, self._memory)
        return OrtCache(self.contract.states, batch, capacity)

    def decode(self, inputs_embeds: np.ndarray, logit_rows: np.ndarray, cache: KVCache) -> np.ndarray:
        """Append tokens to the cache and compute logits; see ``DecoderSession.decode``."""
        embeds = np.ascontiguousarray(inputs_embeds)
        with validated_call(self.contract, OrtCache, embeds, logit_rows, cache) as (own, rows, positions):
            batch, length, _ = embeds.shape
            session = self._session if length < PREFILL_FROM else self._prefill
            if (self, session) not in own.bindings:
                own.bindings[self, session] = self._bind_once(session, own)
            binding = own.bindings[self, session]
            for spec, array in zip(self.contract.inputs, (embeds, positions, rows), strict=True):
                _bind(binding.bind_input, spec, array)
            sizes = {"batch": batch, "sequence": length, "rows": len(rows)}
            specs = (*self.contract.outputs, *self._appended)
            outputs = {spec.name: spec.allocate(sizes) for spec in specs}
            for spec in specs:
                _bind(binding.bind_output, spec, outputs[spec.name])
            try:
                session.run_with_iobinding(binding)
            except Exception as error:  # ONNX Runtime's exceptions share no public base class
                raise _failed(self.contract, error) from error
        if self._appended:  # only in host memory: arrays of a device cache are copies
            for spec, array in zip(self._appended, own.arrays, strict=True):
                write_rows(array, outputs.pop(spec.name), positions)
        logits = outputs.pop("logits")
        self.tapped = outputs
        return logits

    def _bind_once(self, session: Any, cache: OrtCache) -> Any:
        """Bind the adapter, and the memory of the cache, which keeps it alive."""
        binding = session.io_binding()
        for name, value in self._adapter.items():
            binding.bind_ortvalue_input(name, value)
        sizes = {"batch": cache.batch, "capacity": cache.capacity}
        for spec, address in zip(self.contract.states, cache.addresses, strict=True):
            shape = spec.sized(sizes)
            place = (cache.memory, 0, np.dtype(spec.dtype), shape, address)
            binding.bind_input(spec.name, *place)
            if not self._appended:
                binding.bind_output(updated_state(spec).name, *place)
        return binding


def write_rows(cache: np.ndarray, rows: np.ndarray, positions: np.ndarray) -> None:
    """Write the new rows of a step into a state.

    Args:
        cache: a state ``[B, Hkv, C, Dh]``.
        rows: ``[B, Hkv, S, Dh]``.
        positions: ``[B, S]``, consecutive in each row.
    """
    for states, new, places in zip(cache, rows, positions, strict=True):
        states[:, places[0] : places[0] + len(places)] = new


def _failed(contract: Contract, error: Exception) -> UserError:
    reason = first_line(error)
    return UserError(f"ONNX Runtime failed in the {contract.component}: {reason}.")


def _bind(bind: Any, spec: TensorSpec, array: np.ndarray) -> None:
    """Bind the memory of an array; the caller keeps it alive until the run is over."""
    bind(spec.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
