"""Optional capabilities of a backend's module; callers ask for a protocol with ``isinstance``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from runtimes.bundle.contracts import Contract
from runtimes.session import DecoderSession, EntryPoints, SessionOptions

if TYPE_CHECKING:
    from runtimes.chain import Chain


@runtime_checkable
class ProvidesEntryPoints(Protocol):
    """A backend whose artifacts have more that apps call than what the sessions run."""

    def entry_points(self, chain: Chain, own: Collection[str], capacity: int) -> EntryPoints:
        """Open the entry points of the artifacts that a chain has open.

        Args:
            chain: the sessions of the artifacts.
            own: the components whose sessions are of this backend.
            capacity: tokens of the decoder's KV cache.
        """
        ...


@runtime_checkable
class DeclaresConcurrency(Protocol):
    """A backend that says whether its sessions may run at the same time, in several threads.

    Sessions of a backend without this capability run one at a time.
    """

    CONCURRENT: bool


class AdaptableDecoder(DecoderSession, Protocol):
    """Session of a decoder that can add the change of a LoRA adapter."""

    def with_adapter(self, file: Path) -> DecoderSession:
        """Return a session that adds an adapter's change; it shares the weights.

        The caches of both sessions can be exchanged, but what they hold depends on the adapter.

        Raises:
            UserError: the file cannot be read, or does not fit the decoder.
        """
        ...


@runtime_checkable
class SwitchesAdapters(Protocol):
    """A backend that applies the adapters of a bundle when it runs."""

    def is_switchable(self, files: Sequence[str]) -> bool:
        """Return whether a decoder with these files, the main one first, takes adapters."""
        ...

    def open_adaptable_decoder(
        self, file: Path, contract: Contract, options: SessionOptions
    ) -> AdaptableDecoder:
        """Open the decoder from its main file, for adapters.

        Raises:
            UserError: the file cannot be loaded.
        """
        ...
