"""A bundle folder, opened for reading."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from runtimes.bundle.files import read_json, sha256_of_file
from runtimes.bundle.manifest import MANIFEST, Artifact, Manifest, stays_inside
from runtimes.errors import UserError


class Bundle:
    """A bundle folder, opened for reading.

    Its files may be links that lead outside, as in Hugging Face's cache: what such a link leads to is read
    only where it has the size and the SHA-256 of the manifest.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._intact: set[str] = set()  # files that were as the manifest says

    @classmethod
    def open(cls, folder: str | Path) -> Bundle:
        """Read the manifest of a bundle.

        Raises:
            UserError: there is no bundle, or its manifest is broken.
        """
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise UserError(f"There is no bundle folder {folder}.")
        file = folder / MANIFEST
        if not file.exists():
            hint = (
                "the export was interrupted; run it again"
                if (folder / ".staging").exists()
                else "it is no bundle"
            )
            raise UserError(f"{folder} has no {MANIFEST}: {hint}.")
        return cls(folder, Manifest.from_dict(read_json(file), str(file)))

    def path(self, relative: str) -> Path:
        """Absolute path of a file or folder of the bundle, for reading.

        A link is not replaced by what it leads to: libraries find a file's companions beside the link.

        Raises:
            UserError: it leads outside the bundle, to something else than the manifest's hash proves.
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
        """What is wrong with the files (all, or the given): missing, wrong size or wrong hash."""
        found = []
        for path in sorted(self.manifest.files if paths is None else set(paths)):
            entry, file = self.manifest.files.get(path), self.folder.absolute() / path
            if entry is None:
                found.append(f"{path} is not in the manifest")
            elif not file.is_file():
                found.append(f"{path} is missing")
            elif file.stat().st_size != entry.bytes:
                found.append(f"{path} has {file.stat().st_size} bytes, expected {entry.bytes}")
            elif sha256_of_file(file) != entry.sha256:
                found.append(f"{path} has a wrong SHA-256")
            else:
                self._intact.add(path)
        return found

    def check(self, paths: Iterable[str]) -> None:
        """Raise UserError where one of the files is not as the manifest says."""
        problems = self.problems(paths)
        if problems:
            raise UserError(f"The bundle {self.folder} is damaged: {'; '.join(problems)}; export it again.")

    def choices(self) -> list[tuple[str, str]]:
        """The (backend, precision) pairs that the bundle holds, in order of export."""
        return list(dict.fromkeys((item.backend, item.precision) for item in self.manifest.artifacts))

    def matching(self, backend: str | None, precision: str | None) -> list[tuple[str, str]]:
        """The pairs that fit what was asked; where there is no ``int8``, it means ``int8-fp16``."""
        items = [item for item in self.manifest.artifacts if backend in (None, item.backend)]
        exact = [item for item in items if precision in (None, item.precision)]
        found = exact or [item for item in items if item.precision == f"{precision}-{item.base}"]
        return list(dict.fromkeys((item.backend, item.precision) for item in found))

    def select(self, backend: str | None, precision: str | None) -> tuple[str, str]:
        """The pair that fits what was asked; the first where several fit.

        Raises:
            UserError: none fits; the sentence lists what there is.
        """
        found = self.matching(backend, precision)
        if found:
            return found[0]
        there = ", ".join(f"{name} {kind}" for name, kind in self.choices())
        wanted = " ".join(part for part in (backend, precision) if part)
        raise UserError(f"The bundle {self.folder} holds no {wanted}; it has {there or 'no artifacts'}.")

    def artifact(self, component: str, backend: str, precision: str) -> Artifact:
        for item in self.manifest.artifacts:
            if (item.component, item.backend, item.precision) == (component, backend, precision):
                return item
        raise UserError(f"The bundle {self.folder} has no {component} for {backend} {precision}.")
