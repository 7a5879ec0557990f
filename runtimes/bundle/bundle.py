"""A bundle folder, opened for reading."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from runtimes.bundle.contracts import Contract
from runtimes.bundle.files import read_json, sha256_of_file
from runtimes.bundle.manifest import (
    MANIFEST,
    STAGING,
    Artifact,
    Manifest,
    SwitchableAdapter,
    list_choices,
    stays_inside,
)
from runtimes.bundle.mixes import COMPONENTS, MIXED, Pair
from runtimes.errors import UserError
from runtimes.hub import HubId, download


class Bundle:
    """A bundle folder, opened for reading.

    Its files may be links to files outside the folder, as in Hugging Face's cache. The target of
    such a link is read only if it has the size and the SHA-256 in the manifest.

    Args:
        folder: the bundle's folder.
        manifest: its manifest.
        downloaded: whether the folder is in the cache of the Hugging Face Hub, where nothing is
            written.
    """

    def __init__(self, folder: Path, manifest: Manifest, downloaded: bool = False) -> None:
        """Store the arguments; ``open`` reads the manifest."""
        self.folder, self.manifest, self.downloaded = folder, manifest, downloaded
        self._intact: set[str] = set()  # files whose size and hash were checked

    @classmethod
    def open(cls, folder: str | Path) -> Bundle:
        """Open a bundle and read its manifest.

        Args:
            folder: the bundle's folder, or a Hugging Face Hub id, which is downloaded first.

        Raises:
            UserError: the folder is not a bundle, or its manifest is malformed, or the download
                failed.
        """
        hub_id = HubId.parse(folder)
        folder = Path(folder).expanduser()
        downloaded = not folder.exists() and hub_id is not None
        if hub_id and downloaded:
            folder = download(hub_id).folder
        if not folder.is_dir():
            missing = f"{hub_id} is not a bundle" if downloaded else f"There is no bundle folder {folder}"
            raise UserError(f"{missing}.")
        file = folder / MANIFEST
        if not file.exists():
            hint = (
                "the export was interrupted; run it again"
                if (folder / STAGING).exists()
                else "it is not a bundle"
            )
            raise UserError(f"{folder} has no {MANIFEST}: {hint}.")
        return cls(folder, Manifest.from_dict(read_json(file), str(file)), downloaded)

    def path(self, relative: str) -> Path:
        """Return the absolute path of a file or folder of the bundle, for reading.

        Links are not resolved: libraries look for the other files of an artifact beside the link.

        Raises:
            UserError: the path leads outside the bundle, to a file without the manifest's hash.
        """
        if not stays_inside(relative):
            raise UserError(f"{relative} leads outside the bundle {self.folder}.")
        path = self.folder.absolute() / relative
        try:
            inside = path.resolve().is_relative_to(self.folder.resolve())
        except (OSError, RuntimeError) as error:  # a loop of links
            raise UserError(f"{relative} in the bundle {self.folder} leads nowhere: {error}.") from error
        if not inside and relative not in self._intact and (problems := self.problems([relative])):
            raise UserError(f"{relative} leads outside the bundle {self.folder}: {problems[0]}.")
        return path

    def problems(self, paths: Iterable[str] | None = None) -> list[str]:
        """Return one sentence for each file that is missing or has a wrong size or hash.

        Args:
            paths: the files to check; None checks all.
        """
        problems = []
        for path in sorted(self.manifest.files if paths is None else set(paths)):
            entry, file = self.manifest.files.get(path), self.folder.absolute() / path
            if entry is None:
                problems.append(f"{path} is not in the manifest")
            elif not file.is_file():
                problems.append(f"{path} is missing")
            elif file.stat().st_size != entry.bytes:
                problems.append(f"{path} has {file.stat().st_size} bytes, expected {entry.bytes}")
            elif sha256_of_file(file) != entry.sha256:
                problems.append(f"{path} has a wrong SHA-256")
            else:
                self._intact.add(path)
        return problems

    def check(self, paths: Iterable[str]) -> None:
        """Check files against the manifest.

        Raises:
            UserError: a file is missing or has a wrong size or hash.
        """
        problems = self.problems(paths)
        if problems:
            raise UserError(f"The bundle {self.folder} is damaged: {'; '.join(problems)}; export it again.")

    def choices(self) -> list[Pair]:
        """Return what the bundle can run: backend and precision, in order of export; mixes last."""
        return list_choices(self.manifest.artifacts, self.manifest.mixes)

    def matching(self, backend: str | None, precision: str | None) -> list[Pair]:
        """Return the choices that match; None matches any.

        A precision without its base is accepted: ``int8`` matches ``int8-fp16`` if there is no
        ``int8``.
        """
        pairs = [pair for pair in self.choices() if backend in (None, pair[0])]
        exact = [pair for pair in pairs if precision in (None, pair[1])]
        return exact or [
            pair
            for pair in pairs
            if pair[0] != MIXED and pair[1] == f"{precision}-{self.artifact('decoder', *pair).base}"
        ]

    def select(self, backend: str | None, precision: str | None, adapter: str | None = None) -> Pair:
        """Return the first choice that matches, as in ``matching``.

        Of several choices, the first that has the adapter is taken, if one has it.

        Raises:
            UserError: no choice matches; the message lists the bundle's choices.
        """
        matches = self.matching(backend, precision)
        if matches:
            return next((pair for pair in matches if adapter in self.adapters(*pair)), matches[0])
        available = ", ".join(f"{name} {kind}" for name, kind in self.choices())
        if not available:
            raise UserError(f"The bundle {self.folder} has no artifacts of all components; export it again.")
        wanted = " ".join(part for part in (backend, precision) if part)
        raise UserError(f"The bundle {self.folder} holds no {wanted}; it has {available}.")

    def artifact(self, component: str, backend: str, precision: str) -> Artifact:
        """Return the artifact of a component.

        Args:
            component: the component.
            backend: of the artifact, or ``mixed``.
            precision: of the artifact, or the name of a mix.

        Raises:
            UserError: the bundle does not have it.
        """
        pair = (backend, precision)
        if backend == MIXED:
            mixes = {mix.name: mix for mix in self.manifest.mixes}
            if precision not in mixes:
                names = ", ".join(mixes) or "none"
                raise UserError(f"The bundle {self.folder} has no mix {precision!r}; it has {names}.")
            pair = mixes[precision].components[component]
        for item in self.manifest.artifacts:
            if (item.component, item.backend, item.precision) == (component, *pair):
                return item
        raise UserError(f"The bundle {self.folder} has no {component} for {' '.join(pair)}.")

    def artifacts(self, backend: str, precision: str) -> dict[str, Artifact]:
        """Return the artifacts of a choice by component; see ``artifact``."""
        return {component: self.artifact(component, backend, precision) for component in COMPONENTS}

    def contract(self, component: str, backend: str, precision: str) -> Contract:
        """Return the contract of a component; see ``artifact``."""
        return self.manifest.contracts[self.artifact(component, backend, precision).precision][component]

    def adapters(self, backend: str, precision: str) -> dict[str, SwitchableAdapter]:
        """Return the adapters of the decoder of a choice by their names."""
        decoder = self.artifact("decoder", backend, precision)
        pair = (decoder.backend, decoder.precision)
        return {item.name: item for item in self.manifest.adapters if (item.backend, item.precision) == pair}
