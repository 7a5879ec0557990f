"""Backend ``executorch``: a program with several methods in ExecuTorch, on XNNPACK's kernels.

A file is loaded once for all its sessions. A program has one KV cache, in its own memory, which
several ``KVCache`` objects share: the used part of the current one is copied out before another one
is copied in.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtimes.backends import executorch_tokenizer as runner_tokenizer
from runtimes.backends.static_shape import DECODE, DecoderSizes, StaticShapeComponent, StaticShapeDecoder
from runtimes.bundle.contracts import Contract
from runtimes.errors import UserError, first_line
from runtimes.installation import install_command
from runtimes.session import ComponentSession, DecoderSession, EntryPoints, Execution, SessionOptions

if TYPE_CHECKING:
    from runtimes.bundle.manifest import Artifact
    from runtimes.chain import Chain
    from runtimes.text.tokenizer import PromptSpec

SUFFIX = ".pte"
MAGIC = b"ET12"  # bytes 4 to 8
DIALECT = "xnnpack"
# Component → method. The stock runner calls the first and the last by these names.
METHODS = {"vision_encoder": "vision_encoder", "adaptor": "adaptor", "decoder": "text_decoder"}
TOKEN_EMBEDDING = "token_embedding"  # for the stock runner; our sessions read the bundle's table
MAX_CONTEXT, MAX_CHUNK = "get_max_context_len", "get_max_seq_len"  # methods that return a number
LISTS = ("get_eos_ids",)  # methods that return a list
MAX_CALL_TOKENS = 1024  # tokens of a call; memory of activations is planned for them


def largest_chunk(capacity: int) -> int:
    """Return the largest number of tokens of a decoder call."""
    return min(MAX_CALL_TOKENS, capacity)


def program_constants(prompt: PromptSpec, vocabulary: int, capacity: int) -> dict[str, Any]:
    """Return the constants of a program's methods without inputs, by method."""
    return {
        MAX_CHUNK: largest_chunk(capacity),
        MAX_CONTEXT: capacity,
        "get_vocab_size": vocabulary,
        "get_bos_id": prompt.bos_id,
        "get_eos_ids": list(prompt.eos_ids),
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }


def devices() -> list[str]:
    """List the devices that this machine supports; see ``Backend.devices``."""
    _version()
    return ["cpu"]


def _version() -> str:
    try:
        return version("executorch")
    except PackageNotFoundError as error:
        raise UserError(
            f"The backend executorch is not installed; run: {install_command('executorch')}."
        ) from error


def execution(artifact: Artifact, device: str | None = None) -> Execution:
    """Determine whether an artifact can run here; see ``Backend.execution``."""
    try:
        installed = _version()
    except UserError as error:
        return Execution("not run", str(error).rstrip("."))
    if device not in (None, "cpu"):
        return Execution("not run", f"executorch runs on cpu here, not on {device}")
    if artifact.dialect != DIALECT:
        return Execution("built only", f"ExecuTorch {installed} for {artifact.dialect}")
    return Execution("ran", f"ExecuTorch {installed} with XNNPACK")


def open_component(file: Path, contract: Contract, options: SessionOptions) -> ComponentSession:
    """Open a component; see ``Backend.open_component``."""
    return StaticShapeComponent(ExecuTorchAsset(file, contract, options.threads), contract)


def open_decoder(file: Path, contract: Contract, options: SessionOptions) -> DecoderSession:
    """Open the decoder; see ``Backend.open_decoder``."""
    asset = ExecuTorchAsset(file, contract, options.threads)
    sizes = DecoderSizes(
        asset.number(MAX_CONTEXT), DECODE, asset.number(MAX_CHUNK), flexible=True, any_rows=False
    )
    return StaticShapeDecoder(asset, contract, sizes)


def entry_points(chain: Chain, own: Collection[str], capacity: int) -> EntryPoints:
    """Return what the stock runner uses: encoder, token embeddings, tokenizer and constants.

    A program has all components.
    """
    encoder, decoder = chain.vision_encoder, chain.decoder
    assert isinstance(encoder, StaticShapeComponent) and isinstance(decoder, StaticShapeDecoder)
    asset, program = encoder.asset, decoder.asset
    assert isinstance(asset, ExecuTorchAsset) and isinstance(program, ExecuTorchAsset)
    (vocabulary,) = (int(spec.shape[2]) for spec in decoder.contract.outputs if spec.name == "logits")
    expected = program_constants(chain.tokenizer.spec, vocabulary, capacity)
    tokenizer = program.file.with_name(runner_tokenizer.FILE)
    return EntryPoints(
        image_embeds={f"method {METHODS['vision_encoder']}, with the adaptor": asset.image_embeds},
        token_embeddings={f"method {TOKEN_EMBEDDING}": program.token_embeddings},
        max_tokens=program.number(MAX_CHUNK),
        values={f"method {name}": (program.constant(name), value) for name, value in expected.items()},
        tokenizers={f"the runner's {tokenizer.name}": tokenizer} if tokenizer.exists() else {},
    )


@dataclass(eq=False)
class State:
    """KV cache of one sequence; it is in the program's memory while it is the current one.

    Args:
        used: number of positions that were written.
        arrays: copies ``[1, used, Hkv, Dh]`` while another state is the current one.
    """

    used: int = 0
    arrays: list[np.ndarray] = field(default_factory=list)


class Program:
    """A loaded file, whose methods share one memory and its KV cache."""

    def __init__(self, loaded: Any) -> None:
        """Wrap a program of ExecuTorch's bindings."""
        self._loaded = loaded
        self._methods: dict[str, Any] = {}
        self.lock = threading.RLock()  # held while a state is made current and used
        self.current: weakref.ref[State] | None = None

    def method(self, name: str) -> Any:
        """Load a method once.

        Raises:
            RuntimeError: the program has no such method.
        """
        if name not in self._methods:
            self._methods[name] = self._loaded.load_method(name)
        return self._methods[name]


_PROGRAMS: weakref.WeakValueDictionary[tuple[int, ...], Program] = weakref.WeakValueDictionary()


class ExecuTorchAsset:
    """One method of a program."""

    def __init__(self, file: Path, contract: Contract, threads: int | None = None) -> None:
        """Load the method of a component.

        Args:
            file: the program.
            contract: the component's contract.
            threads: number of CPU threads; None lets ExecuTorch choose.

        Raises:
            UserError: the file is not a program or is damaged, or ``threads`` exceeds the cores.
        """
        self.file, self._contract = file, contract
        self._program = load_program(file, threads)
        try:
            self._method = self._program.method(METHODS[contract.component])
            self._views = [self._method.get_attribute(spec.name).numpy() for spec in contract.states]
        except (RuntimeError, KeyError) as error:
            raise UserError(
                f"{file} has no method {METHODS[contract.component]}: {first_line(error)}."
            ) from error

    def number(self, method: str) -> int:
        """Return the number of a method without inputs.

        Raises:
            UserError: the method does not exist or does not return a number.
        """
        value = self.constant(method)
        if not isinstance(value, int):
            raise UserError(f"{method} of {self.file} does not return a number; export it again.")
        return value

    def constant(self, method: str) -> Any:
        """Return the value of a method without inputs: a number, a boolean, or a list of numbers.

        Raises:
            UserError: the method does not exist.
        """
        try:
            values = self._program.method(method).call([])
        except RuntimeError as error:
            raise UserError(f"{self.file} has no method {method}; export it again.") from error
        return list(values) if method in LISTS else values[0]

    def image_embeds(self, pixels: np.ndarray) -> np.ndarray:
        """Compute image embeddings ``[1, T, D]`` of ``[1, 3, N, N]`` as the stock runner does."""
        return self._run(self._method, pixels)

    def token_embeddings(self, tokens: np.ndarray) -> np.ndarray:
        """Compute token embeddings ``[S, D]`` of ids ``[S]`` int64, like the stock runner."""
        embeds: np.ndarray = self._run(self._program.method(TOKEN_EMBEDDING), tokens[None])[0]
        return embeds

    def _run(self, method: Any, array: np.ndarray) -> np.ndarray:
        import torch

        with self._program.lock:
            try:
                output = method.call([torch.from_numpy(np.ascontiguousarray(array))])[0]
            except RuntimeError as error:
                raise UserError(f"ExecuTorch failed in {self.file}: {first_line(error)}.") from error
            return np.array(output.numpy())  # a copy: the next call overwrites the memory

    def call(
        self, function: str, inputs: Mapping[str, np.ndarray], state: State | None = None
    ) -> dict[str, np.ndarray]:
        """Run the method on inputs by name; see ``Asset.call``.

        Raises:
            UserError: ExecuTorch failed.
        """
        import torch

        arrays = [inputs[spec.name] for spec in self._contract.inputs]
        if state is not None:
            arrays = [inputs["inputs_embeds"], inputs["positions"][0]]
        if self._contract.component == "vision_encoder":
            arrays = [array.astype(np.float32) for array in arrays]  # as the stock runner does
        tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
        with self._program.lock:
            if state is not None:
                self._make_current(state)
                state.used = max(state.used, int(arrays[1][-1]) + 1)
            try:
                outputs = self._method.call(tensors)
            except RuntimeError as error:
                raise UserError(
                    f"ExecuTorch failed in the {self._contract.component}: {first_line(error)}."
                ) from error
        # The vision encoder returns the image embeddings first, for the stock runner.
        own_outputs = outputs[len(outputs) - len(self._contract.outputs) :]
        pairs = zip(self._contract.outputs, own_outputs, strict=True)
        return {spec.name: array.numpy() for spec, array in pairs}

    def new_state(self) -> State:
        """Create an empty state of one sequence."""
        return State()

    def read_state(self, state: State, name: str) -> np.ndarray:
        """Return a copy of a state ``[1, Hkv, C, Dh]``."""
        with self._program.lock:
            self._make_current(state)
            return self._view(name).transpose(0, 2, 1, 3).copy()

    def write_state(self, state: State, name: str, array: np.ndarray) -> None:
        """Overwrite a state with ``[1, Hkv, C, Dh]``."""
        with self._program.lock:
            self._make_current(state)
            self._view(name)[:] = array.transpose(0, 2, 1, 3)
            state.used = array.shape[2]

    def _view(self, name: str) -> np.ndarray:
        """Return the program's memory ``[1, C, Hkv, Dh]`` of a state."""
        names = [spec.name for spec in self._contract.states]
        view: np.ndarray = self._views[names.index(name)]
        return view

    def _make_current(self, state: State) -> None:
        """Copy a state into the program's memory, after the current one is copied out."""
        current = self._program.current() if self._program.current else None
        if current is state:
            return
        if current is not None:
            current.arrays = [view[:, : current.used].copy() for view in self._views]
        for view, array in zip(self._views, state.arrays, strict=False):  # a new state has none
            view[:, : state.used] = array
        state.arrays = []
        self._program.current = weakref.ref(state)


def load_program(file: Path, threads: int | None = None) -> Program:
    """Load a program, once per file.

    Errors for which ExecuTorch would end the process, or which it does not detect, are checked
    before.

    Args:
        file: the program.
        threads: number of CPU threads; None lets ExecuTorch choose.

    Raises:
        UserError: the program cannot be loaded.
    """
    cores = os.cpu_count() or 1
    if threads is not None and threads > cores:
        raise UserError(
            f"ExecuTorch supports at most one thread per core: got {threads} threads for {cores} cores."
        )
    try:
        with file.open("rb") as stream:
            head = stream.read(8)
            status = os.fstat(stream.fileno())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    if head[4:] != MAGIC:
        raise UserError(f"{file} is not an ExecuTorch program of this release's format ({MAGIC.decode()}).")
    _version()
    import executorch.kernels.quantized  # noqa: F401 -- registers quantized embeddings
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401 -- registers attention with a cache
    from executorch.extension.pybindings import portable_lib

    if threads not in (None, portable_lib._threadpool_get_thread_count()):
        portable_lib._unsafe_reset_threadpool(threads)
    key = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)
    if (program := _PROGRAMS.get(key)) is not None:
        return program
    try:
        loaded = portable_lib._load_program(
            str(file), program_verification=portable_lib.Verification.InternalConsistency
        )
    except RuntimeError as error:
        raise UserError(f"ExecuTorch cannot load {file}: {first_line(error)}.") from error
    _PROGRAMS[key] = program = Program(loaded)
    return program
