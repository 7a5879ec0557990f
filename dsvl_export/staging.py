"""Stages of an export: each is built aside, renamed into place, and skipped when it is still valid."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runtimes.bundle import MANIFEST, FileEntry, Manifest
from runtimes.errors import UserError
from runtimes.files import read_json, sha256_of_file, sha256_of_text, write_json

STAGING = ".staging"
Build = Callable[[Path], dict[str, Any]]  # builds into a folder, returns what the manifest shall know


class Staging:
    """The output folder of an export while it is being written.

    ``.staging/stages.json`` remembers finished stages by the hash of their inputs; the manifest,
    which makes the folder a bundle, is written last.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._work = folder / STAGING
        self._record_file = self._work / "stages.json"
        self._stages: dict[str, Any] = {}

    def open(self) -> None:
        """Create or reopen the folder.

        Raises:
            UserError: it holds something that is no (unfinished) export.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is a file; give a folder for the bundle.")
        foreign = self.folder.exists() and any(self.folder.iterdir())
        if foreign and not (self.folder / MANIFEST).exists() and not self._work.exists():
            raise UserError(f"The folder {self.folder} is not empty and holds no bundle; give a new one.")
        self._work.mkdir(parents=True, exist_ok=True)
        if self._record_file.exists():
            self._stages = read_json(self._record_file)

    def stage(self, name: str, inputs: Any, build: Build) -> tuple[dict[str, Any], bool]:
        """Run a stage, or reuse its result where its inputs and files are as before.

        Args:
            name: the stage's folder in the bundle.
            inputs: JSON-able; whatever the result depends on.
            build: called with an empty folder to fill.

        Returns:
            What ``build`` returned, now or earlier, and whether it was reused.
        """
        key = sha256_of_text(json.dumps(inputs, sort_keys=True, default=str))
        known = self._stages.get(name)
        if known and known["key"] == key and self._intact(known["files"]):
            return known["result"], True
        temporary = self._work / name.replace("/", "_")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            result = build(temporary)
            files = self._entries(temporary, name)
            self._replace(temporary, self.folder / name)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._stages[name] = {"key": key, "result": result, "files": files}
        write_json(self._record_file, self._stages)
        return result, False

    def files(self) -> dict[str, FileEntry]:
        """Entries of all files of all finished stages."""
        found: dict[str, FileEntry] = {}
        for stage in self._stages.values():
            found |= {path: FileEntry(**entry) for path, entry in stage["files"].items()}
        return dict(sorted(found.items()))

    def results(self) -> dict[str, dict[str, Any]]:
        """What every finished stage returned, by stage."""
        return {name: stage["result"] for name, stage in self._stages.items()}

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest: from now on the folder is a bundle."""
        write_json(self.folder / MANIFEST, manifest.to_dict())

    def _intact(self, files: dict[str, dict[str, Any]]) -> bool:
        """Sizes only: a rerun must be quick, and ``verify`` checks the hashes."""
        return all(
            (self.folder / path).is_file() and (self.folder / path).stat().st_size == entry["bytes"]
            for path, entry in files.items()
        )

    def _entries(self, built: Path, stage: str) -> dict[str, dict[str, Any]]:
        return {
            f"{stage}/{file.relative_to(built).as_posix()}": asdict(
                FileEntry(file.stat().st_size, sha256_of_file(file))
            )
            for file in sorted(built.rglob("*"))
            if file.is_file()
        }

    def _replace(self, source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            shutil.rmtree(target)
        source.rename(target)
