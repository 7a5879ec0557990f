"""Stages of an export: each is built aside, renamed into place, and skipped when it is still valid."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runtimes.bundle.bundle import DEBUG_PREFIX, MANIFEST, Bundle, FileEntry, Manifest, stays_inside
from runtimes.bundle.files import (
    JOURNAL,
    read_json,
    sha256_of_file,
    sha256_of_files,
    sha256_of_text,
    write_json,
)
from runtimes.bundle.locks import PREVIOUS, STAGING, FileLock, manifest_file, manifest_lock, refuse_link
from runtimes.errors import UserError

# Folders of plans and scales, which nothing else makes again, and of configs.
KEPT = ("configs/", "precisions/")
INPUTS = ".inputs"  # of a stage that is being built: what it is made from
Build = Callable[[Path], dict[str, Any]]  # builds into a folder, returns what the manifest shall know
BROKEN = (ValueError, NotImplementedError)  # what was made breaks a rule; another try would end the same way
Hashed = Callable[[int, int], None]  # bytes that are hashed, and all


class Staging:
    """The output folder of an export while it is being written, by one process at a time.

    ``.staging/stages.json`` remembers finished stages by the hash of their inputs. The manifest,
    which makes the folder a bundle, is written last, and taken away before anything it names changes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.previous: Manifest | None = None  # of the bundle that is extended
        self._work = folder / STAGING
        self._record_file = self._work / "stages.json"
        self._previous_file = self._work / PREVIOUS
        self._stages: dict[str, Any] = {}
        self._lock = FileLock(self._work / "lock")
        self._made: list[Path] = []  # folders that were not there before

    def open(self) -> None:
        """Create or reopen the folder.

        Raises:
            UserError: it holds something that is no (unfinished) export, or another export runs there.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is a file; give a folder for the bundle.")
        manifest = self.folder / MANIFEST
        if manifest.exists():
            self.previous = Bundle.open(self.folder).manifest
        elif self.folder.exists() and any(self.folder.iterdir()) and not self._work.is_dir():
            raise UserError(f"The folder {self.folder} is not empty and holds no bundle; give a new one.")
        refuse_link(self.folder, STAGING)
        self._made = [path for path in (self._work, self.folder) if not path.exists()]
        if not self._lock.acquire(wait=False):
            raise UserError(f"Another export is writing to {self.folder}; wait for it.")
        for path in self._work.rglob("*"):
            refuse_link(self.folder, path.relative_to(self.folder).as_posix())
        for leftover in (*self._work.iterdir(), *self.folder.glob(f"{DEBUG_PREFIX}*")):
            if leftover.is_dir() and not _journals(leftover):
                shutil.rmtree(leftover)
        if self.previous is None and self._previous_file.exists():
            raw = read_json(self._previous_file)
            self.previous = Manifest.from_dict(raw, str(self._previous_file))
        self._stages = self._recorded()
        if not self._record_file.exists():
            write_json(self._record_file, self._stages)

    def bundle(self) -> Bundle:
        """The bundle in the folder, also where its manifest is away since what changed it was cut off.

        Raises:
            UserError: there is none.
        """
        file = manifest_file(self.folder)
        if file.name == MANIFEST:
            return Bundle.open(self.folder)
        return Bundle(self.folder, Manifest.from_dict(read_json(file), str(file)))

    def _recorded(self) -> dict[str, Any]:
        """Finished stages whose files are still there; those of a bundle that lost its record as well."""
        record: dict[str, Any] = {}
        if self.previous:
            files = self.previous.to_dict()["files"]
            for artifact in self.previous.artifacts:
                unknown = {"key": "", "result": {"artifacts": []}, "files": {}}  # redone when it is asked for
                stage = record.setdefault(artifact.stage, unknown)
                stage["result"]["artifacts"].append(asdict(artifact))
                stage["files"] |= {path: files[path] for path in artifact.files}
            for path in files:
                if path.startswith(KEPT):
                    stage = path.rpartition("/")[0]
                    record.setdefault(stage, {"key": "", "result": {}, "files": {}})["files"][path] = files[
                        path
                    ]
        if self._record_file.exists():
            record |= read_json(self._record_file)
        try:
            for path in (path for stage in record.values() for path in stage["files"]):
                if not stays_inside(path):
                    raise ValueError(path)
            return {name: stage for name, stage in record.items() if self._present(stage["files"])}
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{self._record_file} is damaged; delete it and run again.") from error

    def stage(
        self, name: str, inputs: Any, build: Build, on_hashed: Hashed = lambda done, total: None
    ) -> bool:
        """Run a stage, or reuse its result where its inputs and files are as before.

        Args:
            name: the stage's folder in the bundle.
            inputs: JSON-able; whatever the result depends on.
            build: called with a folder to fill, empty but for what an interrupted call with the same inputs
                left with a journal; its result is kept for ``results``.
            on_hashed: called with the bytes that are hashed of the result, or of the earlier one, and all.

        Returns:
            Whether an earlier result was reused.
        """
        key = _key(inputs)
        if self.is_current(name, inputs) and self._intact(self._stages[name]["files"], on_hashed):
            return True
        temporary = self._folder_of(name)
        _prepare(temporary, key)
        try:
            result = build(temporary)
            files = self._entries(temporary, name, on_hashed)
            for file in (temporary / INPUTS, *_journals(temporary)):
                file.unlink()
            self._replace(temporary, self.folder / name)
        except BaseException as error:
            if isinstance(error, BROKEN) or not _journals(temporary):
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._stages[name] = {"key": key, "result": result, "files": files}
        write_json(self._record_file, self._stages)
        return False

    def is_current(self, name: str, inputs: Any) -> bool:
        """Whether a stage was finished with these inputs."""
        return name in self._stages and self._stages[name]["key"] == _key(inputs)

    def left(self, name: str, inputs: Callable[[], Any] | None, size: Callable[[], int]) -> tuple[int, int]:
        """Bytes that a stage has still to write, and those that then go, of what it made with other inputs.

        What an interruption left of other inputs goes at once.

        Args:
            inputs: those it would be run with; asked for where something of it is there. None are new ones.
            size: of all that it writes, in bytes; asked for where not all of it is there.
        """
        known, temporary = self._stages.get(name), self._folder_of(name)
        key = _key(inputs()) if inputs and (known or temporary.is_dir()) else ""
        if known and known["key"] == key:
            return 0, 0
        if not _is_of(temporary, key):
            shutil.rmtree(temporary, ignore_errors=True)
        written = sum(file.stat().st_size for file in _kept(temporary) if file.exists())
        old = sum(entry["bytes"] for entry in known["files"].values()) if known else 0
        return max(size() - written, 0), old

    def forget_all_but(self, names: Iterable[str]) -> None:
        """Take away what was interrupted of other stages."""
        kept = {self._folder_of(name) for name in names}
        for leftover in self._work.iterdir():
            if leftover.is_dir() and leftover not in kept:
                shutil.rmtree(leftover)

    def scratch(self, name: str, inputs: Any) -> Path:
        """A folder for work with these inputs, kept until the bundle is finished."""
        folder, key = self._folder_of(name), _key(inputs)
        if not _is_of(folder, key):
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        (folder / INPUTS).write_text(key)
        (folder / f"all{JOURNAL}").touch()
        return folder

    def _folder_of(self, name: str) -> Path:
        """Where a stage is made."""
        return self._work / name.replace("/", "_")

    def attach(self, name: str, file: Path, result: Any) -> None:
        """Add a file to a finished stage, or replace it there, and the stage's result.

        Args:
            file: is moved into the stage's folder.
        """
        refuse_link(self.folder, name)
        target = self.folder / name / file.name
        entry = asdict(FileEntry(file.stat().st_size, sha256_of_file(file)))
        stage = self._stages[name]
        if target.exists():
            self._withdraw()
            stage["files"].pop(f"{name}/{file.name}", None)  # so that an interruption costs this file alone
            write_json(self._record_file, self._stages)
        file.replace(target)
        stage["files"][f"{name}/{file.name}"] = entry
        stage["result"] = result
        write_json(self._record_file, self._stages)

    def forget(self, name: str) -> None:
        """Drop a finished stage and its files."""
        if name in self._stages:
            self._withdraw()
            del self._stages[name]
            write_json(self._record_file, self._stages)
            shutil.rmtree(self.folder / name, ignore_errors=True)

    @property
    def work(self) -> Path:
        """A folder of the bundle's file system for files that are being made."""
        return self._work

    def files(self) -> dict[str, FileEntry]:
        """Entries of all files of all finished stages."""
        found: dict[str, FileEntry] = {}
        for stage in self._stages.values():
            found |= {path: FileEntry(**entry) for path, entry in stage["files"].items()}
        return dict(sorted(found.items()))

    def result(self, name: str) -> dict[str, Any] | None:
        """What a finished stage returned; None where it is not finished."""
        stage = self._stages.get(name)
        return dict(stage["result"]) if stage else None

    def results(self) -> list[dict[str, Any]]:
        """What every finished stage returned."""
        return [stage["result"] for stage in self._stages.values()]

    def finish(self, make: Callable[[Manifest | None], Manifest]) -> None:
        """Write the manifest: from now on the folder is a bundle, and what was interrupted before is gone.

        Args:
            make: gets the manifest as it is now, with what ``parity`` recorded meanwhile; None for a new
                bundle.

        Raises:
            UserError: the manifest that was made could not be read again; the folder is as before.
        """
        with manifest_lock(self.folder):
            file = manifest_file(self.folder)
            now = Manifest.from_dict(read_json(file), str(file)) if file.exists() else None
            raw = make(now).to_dict()
            Manifest.from_dict(json.loads(json.dumps(raw)), f"The manifest of {self.folder}")
            write_json(self.folder / MANIFEST, raw)
            self._previous_file.unlink(missing_ok=True)
        for leftover in self._work.iterdir():
            if leftover.is_dir():
                shutil.rmtree(leftover)

    def close(self) -> None:
        """Let other exports in; folders that this one made and finished nothing in are taken away."""
        if not self._lock.held:
            return
        if self._work in self._made and not self._stages and not _journals(self._work):
            shutil.rmtree(self._work, ignore_errors=True)
            if self.folder in self._made and not any(self.folder.iterdir()):
                self.folder.rmdir()
        self._lock.release()

    def _present(self, files: dict[str, dict[str, Any]]) -> bool:
        paths = {path: self.folder / path for path in files}
        return all(f.is_file() and f.stat().st_size == files[p]["bytes"] for p, f in paths.items())

    def _intact(self, files: dict[str, dict[str, Any]], on_hashed: Hashed) -> bool:
        if not self._present(files):
            return False
        paths = {path: self.folder / path for path in files}
        hashes = sha256_of_files(paths.values(), on_hashed)
        return all(hashes[paths[path]] == entry["sha256"] for path, entry in files.items())

    def _entries(self, built: Path, stage: str, on_hashed: Hashed) -> dict[str, dict[str, Any]]:
        files = [
            file
            for file in sorted(built.rglob("*"))
            if file.is_file() and file.name != INPUTS and file.suffix != JOURNAL
        ]
        for file in files:
            file.chmod(0o644)  # safetensors writes files that only their owner can read
        return {
            f"{stage}/{file.relative_to(built).as_posix()}": asdict(FileEntry(file.stat().st_size, digest))
            for file, digest in sha256_of_files(files, on_hashed).items()
        }

    def _replace(self, source: Path, target: Path) -> None:
        refuse_link(self.folder, target.relative_to(self.folder).as_posix())
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            self._withdraw()
            shutil.rmtree(target)
        source.rename(target)

    def _withdraw(self) -> None:
        """Take the manifest away: what it names is about to change."""
        with manifest_lock(self.folder):
            if (self.folder / MANIFEST).exists():
                (self.folder / MANIFEST).replace(self._previous_file)


def _key(inputs: Any) -> str:
    return sha256_of_text(json.dumps(inputs, sort_keys=True))


def _journals(folder: Path) -> list[Path]:
    return sorted(folder.rglob(f"*{JOURNAL}"))


def _kept(folder: Path) -> set[Path]:
    """Files that have a journal."""
    return {file.with_name(file.name.removesuffix(JOURNAL)) for file in _journals(folder)}


def _is_of(folder: Path, key: str) -> bool:
    """Whether what a folder holds was made from these inputs."""
    inputs = folder / INPUTS
    return inputs.exists() and inputs.read_text() == key


def _prepare(folder: Path, key: str) -> None:
    """A folder for what has these inputs; of what is there already, files with journals are kept."""
    if not _is_of(folder, key):
        shutil.rmtree(folder, ignore_errors=True)
    kept = {*_journals(folder), *_kept(folder)}
    for file in folder.rglob("*"):
        if file.is_file() and file not in kept:
            file.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INPUTS).write_text(key)
