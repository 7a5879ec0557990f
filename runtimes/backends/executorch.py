"""Backend ``executorch``: a program of several methods in ExecuTorch's own runtime, on XNNPACK's kernels.

A file is loaded once for all sessions on it. A program has one KV cache, in its own memory. Several caches
take turns in it: the one whose turn ends is copied out, as far as it is used, and copied back when its turn
comes.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtimes.backends import executorch_tokenizer as runner_tokenizer
from runtimes.backends.static_shape import DECODE, FixedComponent, FixedDecoder, Sizes
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
# Component → its method. The stock runner asks for the first and the last by these names.
METHODS = {"vision_encoder": "vision_encoder", "adaptor": "adaptor", "decoder": "text_decoder"}
TOKEN_EMBEDDING = "token_embedding"  # a method for the stock runner; here the bundle's table is read
MAX_CONTEXT, MAX_CHUNK = "get_max_context_len", "get_max_seq_len"  # methods that say a number
LISTS = ("get_eos_ids",)  # of those that say several
LONGEST_CALL = 1024  # tokens of a call: activations are planned for so many


def largest_chunk(capacity: int) -> int:
    """The most tokens of a call of a decoder."""
    return min(LONGEST_CALL, capacity)


def program_constants(prompt: PromptSpec, vocabulary: int, capacity: int) -> dict[str, Any]:
    """What a program's methods without inputs say, to the stock runner and to our sessions."""
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
    return FixedComponent(ExecuTorchAsset(file, contract, options.threads), contract)


def open_decoder(file: Path, contract: Contract, options: SessionOptions) -> DecoderSession:
    asset = ExecuTorchAsset(file, contract, options.threads)
    sizes = Sizes(asset.number(MAX_CONTEXT), DECODE, asset.number(MAX_CHUNK), flexible=True, any_rows=False)
    return FixedDecoder(asset, contract, sizes)


def entry_points(chain: Chain, capacity: int) -> EntryPoints:
    """What the stock runner calls and reads: its encoder, its token embeddings, its tokenizer, constants."""
    encoder, decoder = chain.vision_encoder, chain.decoder
    assert isinstance(encoder, FixedComponent) and isinstance(decoder, FixedDecoder)
    asset, program = encoder.asset, decoder.asset
    assert isinstance(asset, ExecuTorchAsset) and isinstance(program, ExecuTorchAsset)
    (vocabulary,) = (int(spec.shape[2]) for spec in decoder.contract.outputs if spec.name == "logits")
    expected = program_constants(chain.tokenizer.spec, vocabulary, capacity)
    tokenizer = program.file.with_name(runner_tokenizer.FILE)
    return EntryPoints(
        image_embeds={f"method {METHODS['vision_encoder']}, with the adaptor": asset.image_embeds},
        token_embeddings={f"method {TOKEN_EMBEDDING}": program.token_embeddings},
        most_tokens=program.number(MAX_CHUNK),
        values={f"method {name}": (program.constant(name), value) for name, value in expected.items()},
        tokenizers={f"the runner's {tokenizer.name}": tokenizer} if tokenizer.exists() else {},
    )


@dataclass(eq=False)
class State:
    """The KV cache of one sequence: in the program while it has its turn, else here."""

    used: int = 0  # positions that were written
    arrays: list[np.ndarray] = field(default_factory=list)  # [1, used, Hkv, Dh] each


class Program:
    """A loaded file: its methods share one memory, and with it the KV cache."""

    def __init__(self, loaded: Any) -> None:
        self._loaded = loaded
        self._methods: dict[str, Any] = {}
        self.lock = threading.RLock()  # a turn and its call are one
        self.turn: weakref.ref[State] | None = None

    def method(self, name: str) -> Any:
        """Loaded once; raises RuntimeError where there is none."""
        if name not in self._methods:
            self._methods[name] = self._loaded.load_method(name)
        return self._methods[name]


_PROGRAMS: weakref.WeakValueDictionary[tuple[int, ...], Program] = weakref.WeakValueDictionary()


class ExecuTorchAsset:
    """One method of a program.

    Raises:
        UserError: no program, one that was damaged, or more threads than cores.
    """

    def __init__(self, file: Path, contract: Contract, threads: int | None = None) -> None:
        self.file, self._contract = file, contract
        self._program = load_program(file, threads)
        try:
            self._method = self._program.method(METHODS[contract.component])
            self._views = [self._method.get_attribute(spec.name).numpy() for spec in contract.states]
        except (RuntimeError, KeyError) as error:
            raise UserError(f"{file} has no {METHODS[contract.component]}: {first_line(error)}.") from error

    def number(self, method: str) -> int:
        """The number that a method without inputs says."""
        found = self.constant(method)
        if not isinstance(found, int):
            raise UserError(f"{self.file} does not say its {method} as a number; export it again.")
        return found

    def constant(self, method: str) -> Any:
        """What a method without inputs says: a number, a truth value, or a list of several."""
        try:
            found = self._program.method(method).call([])
        except RuntimeError as error:
            raise UserError(f"{self.file} does not say its {method}; export it again.") from error
        return list(found) if method in LISTS else found[0]

    def image_embeds(self, pixels: np.ndarray) -> np.ndarray:
        """What the stock runner takes of the vision encoder: ``[1, 3, N, N]`` float32 → ``[1, T, D]``."""
        return self._run(self._method, pixels)

    def token_embeddings(self, tokens: np.ndarray) -> np.ndarray:
        """The stock runner's embeddings: ids ``[S]`` int64 → ``[S, D]``."""
        embeds: np.ndarray = self._run(self._program.method(TOKEN_EMBEDDING), tokens[None])[0]
        return embeds

    def _run(self, method: Any, array: np.ndarray) -> np.ndarray:
        import torch

        with self._program.lock:
            try:
                found = method.call([torch.from_numpy(np.ascontiguousarray(array))])[0]
            except RuntimeError as error:
                raise UserError(f"ExecuTorch failed in {self.file}: {first_line(error)}.") from error
            return np.array(found.numpy())  # a copy: the next call writes there

    def call(
        self, function: str, inputs: Mapping[str, np.ndarray], state: State | None = None
    ) -> dict[str, np.ndarray]:
        import torch

        given = [inputs[spec.name] for spec in self._contract.inputs]
        if state is not None:
            given = [inputs["inputs_embeds"], inputs["positions"][0]]
        if self._contract.component == "vision_encoder":
            given = [array.astype(np.float32) for array in given]  # as the stock runner gives them
        tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in given]
        with self._program.lock:
            if state is not None:
                self._take_turn(state)
                state.used = max(state.used, int(given[1][-1]) + 1)
            try:
                found = self._method.call(tensors)
            except RuntimeError as error:
                raise UserError(
                    f"ExecuTorch failed in the {self._contract.component}: {first_line(error)}."
                ) from error
        # The vision encoder gives the image tokens first, for the stock runner.
        wanted = found[len(found) - len(self._contract.outputs) :]
        return {spec.name: array.numpy() for spec, array in zip(self._contract.outputs, wanted, strict=True)}

    def new_state(self) -> State:
        return State()

    def read_state(self, state: State, name: str) -> np.ndarray:
        with self._program.lock:
            self._take_turn(state)
            return self._view(name).transpose(0, 2, 1, 3).copy()

    def write_state(self, state: State, name: str, array: np.ndarray) -> None:
        with self._program.lock:
            self._take_turn(state)
            self._view(name)[:] = array.transpose(0, 2, 1, 3)
            state.used = array.shape[2]

    def _view(self, name: str) -> np.ndarray:
        """``[1, C, Hkv, Dh]``"""
        names = [spec.name for spec in self._contract.states]
        view: np.ndarray = self._views[names.index(name)]
        return view

    def _take_turn(self, state: State) -> None:
        """Put a state into the program, and what is there aside."""
        current = self._program.turn() if self._program.turn else None
        if current is state:
            return
        if current is not None:
            current.arrays = [view[:, : current.used].copy() for view in self._views]
        for view, array in zip(self._views, state.arrays, strict=False):  # a new one has none
            view[:, : state.used] = array
        state.arrays = []
        self._program.turn = weakref.ref(state)


def load_program(file: Path, threads: int | None = None) -> Program:
    """Open a program after the checks that ExecuTorch itself ends the process for, or does not make.

    A file that is loaded already is not loaded again.

    Raises:
        UserError: it cannot be loaded.
    """
    cores = os.cpu_count() or 1
    if threads is not None and threads > cores:
        raise UserError(f"ExecuTorch was asked for {threads} threads, but there are {cores} cores.")
    try:
        with file.open("rb") as stream:
            head = stream.read(8)
            status = os.fstat(stream.fileno())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    if head[4:] != MAGIC:
        raise UserError(f"{file} is no ExecuTorch program of this release's format ({MAGIC.decode()}).")
    _version()
    import executorch.kernels.quantized  # noqa: F401 -- registers quantized embeddings
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401 -- registers attention with a cache
    from executorch.extension.pybindings import portable_lib

    if threads not in (None, portable_lib._threadpool_get_thread_count()):
        portable_lib._unsafe_reset_threadpool(threads)
    key = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)
    if (known := _PROGRAMS.get(key)) is not None:
        return known
    try:
        loaded = portable_lib._load_program(
            str(file), program_verification=portable_lib.Verification.InternalConsistency
        )
    except RuntimeError as error:
        raise UserError(f"ExecuTorch cannot load {file}: {first_line(error)}.") from error
    _PROGRAMS[key] = program = Program(loaded)
    return program
