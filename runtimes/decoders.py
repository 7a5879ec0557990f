"""The decoder sessions of a bundle: without an adapter, and with each of its adapters."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from threading import Lock

from runtimes.backends.capabilities import AdaptableDecoder, SwitchesAdapters
from runtimes.backends.registry import load_backend
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.contracts import Contract
from runtimes.bundle.manifest import Artifact, SwitchableAdapter
from runtimes.errors import UserError
from runtimes.prefix import StoredPrefix, prefix_file
from runtimes.session import DecoderSession, SessionOptions


class Decoders:
    """Opens the sessions of one decoder on first use; they stay open.

    The weights are in memory once for answers without an adapter, and once for all adapters
    together.
    """

    def __init__(
        self, bundle: Bundle, artifact: Artifact, options: SessionOptions, verify: bool = True
    ) -> None:
        """Open nothing yet.

        Args:
            bundle: the bundle.
            artifact: the decoder's.
            options: of the sessions.
            verify: whether to check the SHA-256 of the files of adapters and of the stored prefix.
        """
        self._bundle, self._artifact, self._options, self._verify = bundle, artifact, options, verify
        self._lock = Lock()
        self._sessions: dict[str | None, DecoderSession] = {}
        self._adaptable: AdaptableDecoder | None = None

    def open(self, adapter: str | None) -> DecoderSession:
        """Return the session with an adapter; None is without one.

        Raises:
            UserError: there is no such adapter, or the session cannot be opened.
        """
        with self._lock:
            if adapter not in self._sessions:
                self._sessions[adapter] = self._open_adapter(adapter) if adapter else self._open_base()
            return self._sessions[adapter]

    def prefix(self, adapter: str | None) -> StoredPrefix | None:
        """Return the stored KV prefix of the system prompt for the session with an adapter.

        Only the decoder without an adapter has one; None if the bundle has none.

        Raises:
            UserError: it is damaged.
        """
        return None if adapter else self._prefix

    @cached_property
    def _prefix(self) -> StoredPrefix | None:
        path, manifest = prefix_file(self._artifact.precision), self._bundle.manifest
        if path not in manifest.files:
            return None
        if self._verify:
            self._bundle.check([path])
        _, contract, _ = self._decoder()
        file = self._bundle.path(path)
        return StoredPrefix.load(file, manifest.checkpoint["sha256"], contract).cast(contract)

    def _open_base(self) -> DecoderSession:
        return load_backend(self._artifact.backend).open_decoder(*self._decoder())

    def _open_adapter(self, name: str) -> DecoderSession:
        entry = find_adapter(self._bundle, self._artifact, name)
        if self._verify:
            check_adapter(self._bundle, entry)
        if self._adaptable is None:
            module = load_backend(self._artifact.backend)
            assert isinstance(module, SwitchesAdapters)  # ``find_adapter`` checked it
            self._adaptable = module.open_adaptable_decoder(*self._decoder())
        return self._adaptable.with_adapter(self._bundle.path(entry.file))

    def _decoder(self) -> tuple[Path, Contract, SessionOptions]:
        """Return what a backend opens: the main file, its contract, and the options."""
        contract = self._bundle.manifest.contracts[self._artifact.precision]["decoder"]
        return self._bundle.path(self._artifact.files[0]), contract, self._options


def check_adapter(bundle: Bundle, entry: SwitchableAdapter) -> None:
    """Check the file of an adapter against the manifest.

    Raises:
        UserError: it is missing or has a wrong size or hash.
    """
    if problems := bundle.problems([entry.file]):
        raise UserError(
            f"The adapter {entry.name} of the bundle {bundle.folder} is damaged: {problems[0]}; add it again"
            f" with 'dsvl-export add-adapter {bundle.folder} {entry.name}=FOLDER'."
        )


def find_adapter(bundle: Bundle, decoder: Artifact, name: str) -> SwitchableAdapter:
    """Return an adapter of a decoder.

    Raises:
        UserError: the backend cannot switch adapters, or the bundle has no such adapter.
    """
    module = load_backend(decoder.backend)
    if not isinstance(module, SwitchesAdapters):
        raise UserError(
            f"The backend {decoder.backend} cannot switch adapters, so {name} cannot be selected; merge it"
            " into the weights with 'dsvl-export export --adapter'."
        )
    pair = (decoder.backend, decoder.precision)
    if not module.is_switchable(decoder.files):
        raise UserError(
            f"{' '.join(pair)} of the bundle {bundle.folder} was exported without switchable adapters,"
            f" so {name} cannot be selected; export it again with --switchable."
        )
    known = bundle.adapters(*pair)
    if name not in known:
        names = f"it has {', '.join(known)}" if known else "it has none"
        raise UserError(
            f"The bundle {bundle.folder} has no adapter {name!r} for {' '.join(pair)}, {names}; add one"
            f" with 'dsvl-export add-adapter {bundle.folder} NAME=FOLDER'."
        )
    return known[name]
