"""Backend ``onnxruntime``: ONNX files through ONNX Runtime, on a CPU or, with ``onnxruntime-gpu``, a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtimes.backends.onnxruntime_releases import refusal, release_for_artifact
from runtimes.bundle.contracts import Contract, TensorSpec, appended_state, updated_state
from runtimes.cache import HostCache, KVCache
from runtimes.decode_call import ANY_NUMBER, validated_call
from runtimes.errors import UserError, first_line
from runtimes.installation import install_command
from runtimes.memory import available_memory, widening
from runtimes.session import EntryPoints, Execution, SessionOptions

if TYPE_CHECKING:
    from runtimes.bundle.manifest import Artifact
    from runtimes.chain import Chain

# Devices that can be asked for, and the execution providers that are them.
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
CPU, CUDA = "cpu", "cuda"  # kinds of memory
# What a file is written for; products of integers by tokens have kernels on a CPU alone.
ORT, ORT_TOKENS = "ort", "ort_tokens"
CONCURRENT = True  # sessions may run at the same time, in several threads
PREFILL_FROM = 32  # tokens of a call that the graph for prompts takes; drafts are shorter


def _import() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(
            f"The backend onnxruntime is not installed; run: {install_command('onnxruntime')}."
        ) from error
    return onnxruntime


def devices() -> list[str]:
    there = _import().get_available_providers()
    return [device for device, provider in PROVIDERS.items() if provider in there]


def execution(artifact: Artifact, device: str | None = None) -> Execution:
    device = device or CPU
    if artifact.dialect not in (ORT, ORT_TOKENS):
        return Execution(
            "not run", f"it is written in the dialect {artifact.dialect}, this release runs {ORT}"
        )
    if artifact.dialect == ORT_TOKENS and device != CPU:
        return Execution("not run", f"{artifact.precision} runs on a CPU alone, not on {device}")
    try:
        there = devices()
    except UserError as error:
        return Execution("not run", str(error).rstrip("."))
    if artifact.target not in there:
        return Execution("not run", f"it was built for {artifact.target}, here is only {', '.join(there)}")
    if device not in there:
        return Execution("not run", f"this ONNX Runtime has no {device}, only {', '.join(there)}")
    reason = too_old(artifact)
    if reason:
        return Execution("not run", reason)
    return Execution("ran", f"{device} with onnxruntime {release()}", device=device)


def release() -> str:
    """The version of the installed ONNX Runtime.

    Raises:
        UserError: it is not installed.
    """
    return str(_import().__version__)


def too_old(artifact: Artifact) -> str:
    """Why the installed release cannot run an artifact's files, and what to do; empty where it can."""
    return refusal(release_for_artifact(artifact), release())


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
    elif hasattr(ort, "preload_dlls"):  # finds CUDA's libraries where pip has put them
        ort.preload_dlls()
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    # A weight behind DequantizeLinear is multiplied in float; by default activations are rounded to int8.
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if options.threads:
        settings.intra_op_num_threads = options.threads
    try:
        session = ort.InferenceSession(str(file), settings, providers=_providers(device))
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        reason = first_line(error)
        raise UserError(f"ONNX Runtime cannot load {file}: {reason}.") from error
    if session.get_providers()[0] != provider:
        # It falls back to the CPU without an error where a provider's libraries, driver or GPU are missing.
        raise UserError(
            f"ONNX Runtime could not start {provider} and fell back to {session.get_providers()[0]},"
            " which was not asked for; mend CUDA and its driver (see its log), or give --device cpu."
        )
    states = tuple(spec.name for spec in contract.states)
    expected = {spec.name for spec in contract.inputs} | set(states)
    if {item.name for item in session.get_inputs()} != expected:
        raise UserError(f"The inputs of {file} are not those of its contract; export it again.")
    return session


def _providers(device: str) -> list[str]:
    """What a device's session may use; TensorRT leaves to CUDA what it does not take."""
    chain = {"cpu": ["cpu"], "cuda": ["cuda"], "tensorrt": ["tensorrt", "cuda"]}[device]
    return [PROVIDERS[name] for name in chain]


def _check_memory(file: Path, contract: Contract) -> None:
    """Refuse what cannot fit, before the system kills the process for it; a lower bound."""
    stored = sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*"))
    needed = stored * widening("onnxruntime", contract)
    free = available_memory()
    if needed > free:
        raise UserError(
            f"Loading the {contract.component} into ONNX Runtime on a CPU takes at least"
            f" {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free."
        )


def prefill_file(file: Path) -> Path:
    """Where a decoder's graph for prompts lies, if it has one."""
    return file.with_stem(f"{file.stem}_prefill")


def open_component(file: Path, contract: Contract, options: SessionOptions) -> OrtComponent:
    return OrtComponent(_open(file, contract, options), contract)


def open_decoder(file: Path, contract: Contract, options: SessionOptions) -> OrtDecoder:
    memory, prefill = CPU if options.device in (None, CPU) else CUDA, prefill_file(file)
    with_prefill = memory == CPU and prefill.exists()
    return OrtDecoder(
        _open(file, contract, options),
        contract,
        memory,
        _open(prefill, contract, options) if with_prefill else None,
    )


def entry_points(chain: Chain, capacity: int) -> EntryPoints:
    """The main graph of a decoder that has a second one for prompts: prompts of few tokens go through it."""
    decoder = chain.decoder
    if isinstance(decoder, OrtDecoder) and decoder.has_prefill:
        return EntryPoints(decoders={"decoder without its graph for prompts": decoder.without_prefill()})
    return EntryPoints()


class OrtComponent:
    """A stateless component in ONNX Runtime."""

    def __init__(self, session: Any, contract: Contract) -> None:
        self.contract, self._session = contract, session

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        for spec in self.contract.inputs:
            spec.check(inputs[spec.name])
        names = [spec.name for spec in self.contract.outputs]
        try:
            outputs = self._session.run(names, dict(inputs))
        except Exception as error:  # of whatever kind ONNX Runtime raises
            raise _failed(self.contract, error) from error
        return dict(zip(names, outputs, strict=True))


class OrtCache(HostCache):
    """A cache with the bindings that tie its memory to the inputs and outputs of sessions."""

    memory = CPU

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.bindings: dict[Any, Any] = {}  # by session


class OrtDeviceCache(OrtCache):
    """The same in a device's memory; ``arrays`` are copies on the host.

    Args:
        values: OrtValues ``[rows, Hkv, capacity, Dh]`` to use, of which this cache has ``batch`` rows from
            ``first_row`` on; None allocates zeros.
    """

    def __init__(
        self,
        specs: tuple[TensorSpec, ...],
        batch: int,
        capacity: int,
        memory: str,
        values: list[Any] | None = None,
        first_row: int = 0,
    ) -> None:
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
        rows = slice(self._first_row, self._first_row + self.batch)
        return [value.numpy()[rows].copy() for value in self._values]

    @property
    def addresses(self) -> list[int]:
        found = []
        for spec, value in zip(self.specs, self._values, strict=True):
            _, *row = value.shape()
            size = int(np.prod(row)) * np.dtype(spec.dtype).itemsize
            found.append(value.data_ptr() + self._first_row * size)
        return found

    def _view(self, start: int, stop: int) -> OrtDeviceCache:
        first, count = self._first_row + start, stop - start
        return OrtDeviceCache(self.specs, count, self.capacity, self.memory, self._values, first)

    def _write(self, states: Sequence[np.ndarray]) -> None:
        rows = slice(self._first_row, self._first_row + self.batch)
        for value, part in zip(self._values, states, strict=True):
            whole = value.numpy().copy()
            whole[rows, :, : part.shape[2]] = part
            value.update_inplace(whole)


class OrtDecoder:
    """The decoder in ONNX Runtime; the cache is bound once.

    A graph that updates its states has inputs and outputs bound to the same memory; one that gives a step's
    rows has them copied to their places after the step.

    Args:
        prefill: a session of the same decoder that is faster for many tokens.
    """

    most_rows = most_batch = ANY_NUMBER

    def __init__(
        self, session: Any, contract: Contract, memory: str = CPU, prefill: Any | None = None
    ) -> None:
        self.contract, self._session, self._memory = contract, session, memory
        self._prefill = prefill or session
        self.tapped: Mapping[str, np.ndarray] = {}
        outputs = {item.name for item in session.get_outputs()}
        appended = [appended_state(spec) for spec in contract.states]
        self._appended = [spec for spec in appended if spec.name in outputs]

    @property
    def has_prefill(self) -> bool:
        return self._prefill is not self._session

    def without_prefill(self) -> OrtDecoder:
        """The same decoder, every call of which goes through its main graph."""
        return OrtDecoder(self._session, self.contract, self._memory)

    def new_cache(self, batch: int, capacity: int) -> OrtCache:
        if self._memory != CPU:
            return OrtDeviceCache(self.contract.states, batch, capacity, self._memory)
        return OrtCache(self.contract.states, batch, capacity)

    def decode(self, inputs_embeds: np.ndarray, logit_rows: np.ndarray, cache: KVCache) -> np.ndarray:
        embeds = np.ascontiguousarray(inputs_embeds)
        with validated_call(self.contract, OrtCache, embeds, logit_rows, cache) as (own, rows, positions):
            batch, length, _ = embeds.shape
            session = self._session if length < PREFILL_FROM else self._prefill
            if session not in own.bindings:
                own.bindings[session] = self._bind_states(session, own)
            binding = own.bindings[session]
            for spec, array in zip(self.contract.inputs, (embeds, positions, rows), strict=True):
                _bind(binding.bind_input, spec, array)
            sizes = {"batch": batch, "sequence": length, "rows": len(rows)}
            specs = (*self.contract.outputs, *self._appended)
            outputs = {spec.name: spec.allocate(sizes) for spec in specs}
            for spec in specs:
                _bind(binding.bind_output, spec, outputs[spec.name])
            try:
                session.run_with_iobinding(binding)
            except Exception as error:  # of whatever kind ONNX Runtime raises
                raise _failed(self.contract, error) from error
        if self._appended:  # a device's cache would be copied for its arrays
            for spec, array in zip(self._appended, own.arrays, strict=True):
                write_rows(array, outputs.pop(spec.name), positions)
        logits = outputs.pop("logits")
        self.tapped = outputs
        return logits

    def _bind_states(self, session: Any, cache: OrtCache) -> Any:
        """Bind the cache where it lies; the cache keeps its memory alive."""
        binding = session.io_binding()
        sizes = {"batch": cache.batch, "capacity": cache.capacity}
        for spec, address in zip(self.contract.states, cache.addresses, strict=True):
            shape = [dim if isinstance(dim, int) else sizes[dim] for dim in spec.shape]
            place = (cache.memory, 0, np.dtype(spec.dtype), shape, address)
            binding.bind_input(spec.name, *place)
            if not self._appended:
                binding.bind_output(updated_state(spec).name, *place)
        return binding


def write_rows(cache: np.ndarray, rows: np.ndarray, positions: np.ndarray) -> None:
    """Put a step's rows ``[B, Hkv, S, Dh]`` to their positions ``[B, S]``, consecutive in each row."""
    for states, new, places in zip(cache, rows, positions, strict=True):
        states[:, places[0] : places[0] + len(places)] = new


def _failed(contract: Contract, error: Exception) -> UserError:
    reason = first_line(error)
    return UserError(f"ONNX Runtime failed in the {contract.component}: {reason}.")


def _bind(bind: Any, spec: TensorSpec, array: np.ndarray) -> None:
    """Bind an array's own memory; the caller keeps it alive until the run is over."""
    bind(spec.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
