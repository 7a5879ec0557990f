"""Optional capabilities of a backend's module; callers ask for a protocol with ``isinstance``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from runtimes.session import EntryPoints

if TYPE_CHECKING:
    from runtimes.chain import Chain


@runtime_checkable
class ProvidesEntryPoints(Protocol):
    """A backend whose artifacts have more that apps call than what the sessions run."""

    def entry_points(self, chain: Chain, capacity: int) -> EntryPoints:
        """Open the entry points of the artifacts that a chain has open.

        Args:
            chain: the sessions of the artifacts.
            capacity: tokens of the decoder's KV cache.
        """
        ...


@runtime_checkable
class DeclaresConcurrency(Protocol):
    """A backend that says whether its sessions may run at the same time, in several threads.

    Sessions of a backend without this capability run one at a time.
    """

    CONCURRENT: bool
