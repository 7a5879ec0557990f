"""What a backend has to provide to run the components of a bundle."""

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
    """How to run: CPU threads (None lets the backend choose) and the device (None is the backend's own)."""

    threads: int | None = None
    device: str | None = None


@dataclass(frozen=True)
class Execution:
    """Whether an artifact can be run on this machine; different words for different things.

    ``ran`` on the target's own runtime; ``simulated`` ``by`` an interpreter or another device's
    runtime; ``built only``: it compiled but nothing here can execute it; ``not run``, ``by`` saying
    why. Only the first two can be judged by parity. What was also compiled to the end, though it
    cannot run here, says ``built_by`` what. ``device`` is what to open a session with.
    """

    kind: Literal["ran", "simulated", "built only", "not run"]
    by: str = ""
    built_by: str = ""
    device: str = "cpu"

    @property
    def judgeable(self) -> bool:
        return self.kind in ("ran", "simulated")

    def __str__(self) -> str:
        if self.built_by:
            return f"built by {self.built_by}, numerics by {self.by}"
        link = {"simulated": " by ", "ran": " on "}.get(self.kind, ": ")
        return self.kind + (link + self.by if self.by else "")


class ComponentSession(Protocol):
    """A stateless component: the vision encoder or the adaptor."""

    contract: Contract

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name; inputs and outputs are those of the contract (a debug build's, with taps)."""
        ...


class DecoderSession(Protocol):
    """The decoder with its cache.

    ``tapped`` are the taps of the last call, where the session was opened on a debug build. ``most_rows``
    are the logit rows that one run of the backend gives; a call that wants more is cut into several.
    ``most_batch`` are the sequences that a cache can have.
    """

    contract: Contract
    most_rows: int
    most_batch: int
    tapped: Mapping[str, np.ndarray]

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache that this session can use."""
        ...

    def decode(self, inputs_embeds: np.ndarray, logit_rows: np.ndarray, cache: KVCache) -> np.ndarray:
        """Append ``inputs_embeds [B, S, D]`` to the cache; ``logits [B, K, V]`` of ``logit_rows [K]``.

        Several tokens at once (S > 1) are for a cache of one row; a batch prefills row by row
        (``cache.row``) and then decodes together with S = 1.

        Raises:
            TypeError, ValueError, CapacityError: as ``runtimes.decode_call.validated_call``, which every
                session begins with; nothing has run then, and the cache is as before.
        """
        ...


@dataclass(frozen=True)
class EntryPoints:
    """What apps call of a backend's artifacts and the sessions do not; parity judges each by its name.

    Args:
        images: squares ``uint8 [N, N, 3]`` → vision features by name, batch 1.
        image_embeds: ``pixel_values [1, 3, N, N]`` → ``[1, T, D]``.
        token_embeddings: ids ``[S]`` int64 → ``[S, D]``; S is at most ``most_tokens``.
        decoders: sessions on the same artifact that call other functions of it.
        values: what the artifact says, and what it must say: name → (found, expected).
        tokenizers: files that the runner of an app reads in place of the bundle's tokenizer.
    """

    images: Mapping[str, Callable[[np.ndarray], Mapping[str, np.ndarray]]] = field(default_factory=dict)
    image_embeds: Mapping[str, Callable[[np.ndarray], np.ndarray]] = field(default_factory=dict)
    token_embeddings: Mapping[str, Callable[[np.ndarray], np.ndarray]] = field(default_factory=dict)
    most_tokens: int = 1
    decoders: Mapping[str, DecoderSession] = field(default_factory=dict)
    values: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    tokenizers: Mapping[str, Path] = field(default_factory=dict)


class Backend(Protocol):
    """A module ``runtimes/<backend>.py``: how to open the artifacts of a backend.

    It may also have ``entry_points(chain, capacity)``, which gives the ``EntryPoints`` of the artifacts that
    a chain has open: what apps call of them beside what the sessions do.
    """

    def devices(self) -> list[str]:
        """What ``SessionOptions.device`` can be here.

        Raises:
            UserError: the backend's library is not installed; the sentence names the extra.
        """
        ...

    def execution(self, artifact: Artifact, device: str | None = None) -> Execution:
        """What can be done here with an artifact on a device, judged by what the manifest says of it.

        Args:
            device: one of ``devices()``; None is the backend's own.
        """
        ...

    def open_component(self, file: Path, contract: Contract, options: SessionOptions) -> ComponentSession: ...

    def open_decoder(self, file: Path, contract: Contract, options: SessionOptions) -> DecoderSession: ...
