"""Protocols of a backend: sessions that run the components of a bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from runtimes.bundle.contracts import Contract
from runtimes.cache import KVCache

if TYPE_CHECKING:
    from runtimes.bundle.manifest import Artifact


@dataclass(frozen=True)
class SessionOptions:
    """Options of a session.

    Args:
        threads: number of CPU threads; None lets the backend choose.
        device: one of the backend's ``devices()``; None is the backend's default.
    """

    threads: int | None = None
    device: str | None = None


@dataclass(frozen=True)
class Execution:
    """Whether and how an artifact can run on this machine.

    Args:
        kind: ``ran``: on the target's own runtime. ``simulated``: by an interpreter or the runtime
            of another device. ``built only``: it was compiled, but nothing here can execute it.
            ``not run``: it cannot run here. Parity compares only the first two.
        by: the runtime, or the reason why it does not run.
        built_by: the compiler that built the artifact completely, although it cannot run here.
        device: the device to open a session on.
    """

    kind: Literal["ran", "simulated", "built only", "not run"]
    by: str = ""
    built_by: str = ""
    device: str = "cpu"

    @property
    def runnable(self) -> bool:
        """Whether the artifact can be executed here."""
        return self.kind in ("ran", "simulated")

    def __str__(self) -> str:
        """Format for reports, such as ``simulated by ONNX Runtime 1.30``."""
        if self.built_by:
            return f"built by {self.built_by}, numerics by {self.by}"
        link = {"simulated": " by ", "ran": " on "}.get(self.kind, ": ")
        return self.kind + (link + self.by if self.by else "")


class ComponentSession(Protocol):
    """Session of a stateless component: the vision encoder or the adaptor."""

    contract: Contract

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute the contract's outputs by name; a debug build also returns its taps."""
        ...


class DecoderSession(Protocol):
    """Session of the decoder.

    Attributes:
        contract: the decoder's contract.
        max_logit_rows: logit rows that one run of the backend returns; a call that requests more
            is split into several runs.
        max_batch: largest number of rows of a cache.
        tapped: taps of the last call, if the session was opened on a debug build.
    """

    contract: Contract
    max_logit_rows: int
    max_batch: int
    tapped: Mapping[str, np.ndarray]

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """Create an empty cache for this session."""
        ...

    def decode(self, inputs_embeds: np.ndarray, logit_rows: np.ndarray, cache: KVCache) -> np.ndarray:
        """Append tokens to the cache and compute logits.

        S > 1 requires a cache of one row: a batch prefills row by row (``cache.row``) and then
        decodes together with S = 1.

        Args:
            inputs_embeds: ``[B, S, D]``.
            logit_rows: rows ``[K]`` of S whose logits are requested.
            cache: a cache of this session.

        Returns:
            ``logits [B, K, V]``.

        Raises:
            TypeError: see ``runtimes.decode_call.validated_call``, with which every session begins.
                If it raises, nothing has run and the cache is unchanged.
            ValueError: see above.
            CapacityError: see above.
        """
        ...


@dataclass(frozen=True)
class EntryPoints:
    """Functions of artifacts that apps call but sessions do not; parity checks each under its name.

    Args:
        images: squares ``uint8 [N, N, 3]`` → vision features by name, batch 1.
        image_embeds: ``pixel_values [1, 3, N, N]`` → ``[1, T, D]``.
        token_embeddings: ids ``[S]`` int64 → ``[S, D]``; S is at most ``max_tokens``.
        max_tokens: largest number of tokens of a ``token_embeddings`` call.
        decoders: sessions on the same artifact that call other functions of it.
        values: constants of the artifact: name → (actual, expected).
        tokenizers: files that an app's runner reads instead of the bundle's tokenizer.
    """

    images: Mapping[str, Callable[[np.ndarray], Mapping[str, np.ndarray]]] = field(default_factory=dict)
    image_embeds: Mapping[str, Callable[[np.ndarray], np.ndarray]] = field(default_factory=dict)
    token_embeddings: Mapping[str, Callable[[np.ndarray], np.ndarray]] = field(default_factory=dict)
    max_tokens: int = 1
    decoders: Mapping[str, DecoderSession] = field(default_factory=dict)
    values: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    tokenizers: Mapping[str, Path] = field(default_factory=dict)


class Backend(Protocol):
    """Module ``runtimes/backends/<backend>.py``, which opens the artifacts of a backend.

    What only some backends can do is in ``runtimes.backends.capabilities``.
    """

    def devices(self) -> list[str]:
        """List the values of ``SessionOptions.device`` that this machine supports.

        Raises:
            UserError: the backend's library is not installed; the message names the extra.
        """
        ...

    def execution(self, artifact: Artifact, device: str | None = None) -> Execution:
        """Determine from the manifest whether an artifact can run here.

        Args:
            artifact: the manifest's entry.
            device: one of ``devices()``; None is the backend's default.
        """
        ...

    def open_component(self, file: Path, contract: Contract, options: SessionOptions) -> ComponentSession:
        """Open the vision encoder or the adaptor from its main file.

        Raises:
            UserError: the file cannot be loaded.
        """
        ...

    def open_decoder(self, file: Path, contract: Contract, options: SessionOptions) -> DecoderSession:
        """Open the decoder from its main file.

        Raises:
            UserError: the file cannot be loaded.
        """
        ...
