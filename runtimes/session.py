"""What a backend has to provide to run the components of a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from runtimes.cache import KVCache
from runtimes.contracts import Contract


@dataclass(frozen=True)
class SessionOptions:
    """How to run: CPU threads (None lets the backend choose) and the device's name."""

    threads: int | None = None
    device: str = "cpu"


class ComponentSession(Protocol):
    """A stateless component: the vision encoder or the adaptor."""

    contract: Contract

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name; inputs and outputs are those of the contract."""
        ...


class DecoderSession(Protocol):
    """The decoder with its cache."""

    contract: Contract

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache that this session can use."""
        ...

    def decode(self, inputs_embeds: np.ndarray, logit_rows: np.ndarray, cache: KVCache) -> np.ndarray:
        """Append ``inputs_embeds [B, S, D]`` to the cache; ``logits [B, K, V]`` of ``logit_rows [K]``.

        Several tokens at once (S > 1) are for a cache of one row; a batch prefills row by row
        (``cache.row``) and then decodes together with S = 1.

        Raises:
            CapacityError: the cache is too short; nothing has run then.
        """
        ...


class Backend(Protocol):
    """A module ``runtimes/<backend>.py``: how to open the artifacts of a backend."""

    def open_component(self, file: Path, contract: Contract, options: SessionOptions) -> ComponentSession: ...

    def open_decoder(self, file: Path, contract: Contract, options: SessionOptions) -> DecoderSession: ...
