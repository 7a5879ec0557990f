"""The output folder of an export, where stages are built, renamed and reused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runtimes.bundle.bundle import Bundle
from runtimes.bundle.files import (
    JOURNAL,
    read_json,
    sha256_of_file,
    sha256_of_files,
    sha256_of_text,
    write_json,
)
from runtimes.bundle.locks import PREVIOUS, FileLock, manifest_file, manifest_lock, refuse_link
from runtimes.bundle.manifest import DEBUG_PREFIX, MANIFEST, STAGING, FileEntry, Manifest, stays_inside
from runtimes.bundle.mixes import MIXED
from runtimes.errors import UserError

# A bundle that lost its record keeps these: nothing else writes plans, scales and configs again.
KEPT_FOLDERS = ("configs/", "precisions/")
INPUTS = ".inputs"  # file with the key of the inputs, in the staging folder of a stage
Build = Callable[[Path], dict[str, Any]]  # writes into a folder, returns what the manifest needs to know
INVALID = (ValueError, NotImplementedError)  # the result breaks a rule: a second attempt would fail too
OnHashed = Callable[[int, int], None]  # gets the number of hashed bytes, and of all bytes


def check_output(folder: Path) -> None:
    """Check that a folder is new, empty, a bundle or an unfinished export.

    Raises:
        UserError: it is something else.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder for the bundle.")
    known = (folder / MANIFEST).exists() or (folder / STAGING).is_dir()
    if folder.exists() and not known and any(folder.iterdir()):
        raise UserError(f"The folder {folder} is not empty and holds no bundle; give a new one.")


class Staging:
    """The output folder of an export while one process writes it.

    ``.staging/stages.json`` records finished stages by the hash of their inputs. The manifest makes
    the folder a bundle: it is written last, and moved away before a file that it names changes.
    """

    def __init__(self, folder: Path) -> None:
        """Keep the folder; nothing is created or read before ``open``."""
        self.folder = folder
        self.previous: Manifest | None = None  # of the bundle that is extended
        self._work = folder / STAGING
        self._record_file = self._work / "stages.json"
        self._previous_file = self._work / PREVIOUS
        self._stages: dict[str, Any] = {}
        self._lock = FileLock(self._work / "lock")
        self._made: list[Path] = []  # folders that ``open`` created

    def open(self) -> None:
        """Create or reopen the folder, and lock it.

        Raises:
            UserError: the folder holds other files than a bundle or an unfinished export, or
                another export writes to it.
        """
        check_output(self.folder)
        if (self.folder / MANIFEST).exists():
            self.previous = Bundle.open(self.folder).manifest
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
        """Return the bundle in the folder, also if an interruption has moved its manifest away.

        Raises:
            UserError: there is no bundle, or it was downloaded from the hub.
        """
        file = manifest_file(self.folder)
        if file.name == MANIFEST:
            bundle = Bundle.open(self.folder)
            if bundle.downloaded:
                raise UserError(
                    f"{self.folder} is in the cache of the hub, where nothing is written; run: hf download"
                    f" {self.folder} --local-dir FOLDER, and give that folder."
                )
            return bundle
        return Bundle(self.folder, Manifest.from_dict(read_json(file), str(file)))

    def refuse_unfinished_export(self, bundle: Bundle, added: Callable[[str], bool]) -> None:
        """Check that no interrupted export has moved the bundle's manifest away.

        The manifest of an interrupted export names files that the export has replaced.

        Args:
            bundle: the bundle in the folder.
            added: whether a file is one that the caller adds to bundles and that may be missing.

        Raises:
            UserError: an export was interrupted.
        """
        recorded = self.files()
        changed = []
        for path, entry in bundle.manifest.files.items():
            file = self.folder / path
            same_size = file.is_file() and file.stat().st_size == entry.bytes
            # Of files without a record, as in a bundle that was copied, only the size is compared.
            if not added(path) and (recorded.get(path, entry) != entry or not same_size):
                changed.append(path)
        if changed and manifest_file(bundle.folder).name != MANIFEST:
            raise UserError(
                f"An export into {bundle.folder} was interrupted ({changed[0]} has changed); run it again,"
                " then run this command."
            )

    def _recorded(self) -> dict[str, Any]:
        """Return the finished stages whose files exist, also of a bundle that lost its record."""
        record: dict[str, Any] = {}
        if self.previous:
            files = self.previous.to_dict()["files"]
            for artifact in self.previous.artifacts:
                unknown = {"key": "", "result": {"artifacts": []}, "files": {}}  # runs again if needed
                stage = record.setdefault(artifact.stage, unknown)
                stage["result"]["artifacts"].append(asdict(artifact))
                stage["files"] |= {path: files[path] for path in artifact.files}
            for adapter in self.previous.adapters:
                plan = f"precisions/{adapter.precision}/"
                depends = {
                    path.removeprefix(plan): files[path]["sha256"] for path in files if path.startswith(plan)
                }
                record[adapter.file.rpartition("/")[0]] = {
                    "key": "",
                    "result": {"adapter": asdict(adapter), "depends_on": depends},
                    "files": {adapter.file: files[adapter.file]},
                }
            for mix in self.previous.mixes:
                stage = f"configs/{MIXED}/{mix.name}"
                record[stage] = {"key": "", "result": {"mix": asdict(mix)}, "files": {}}
            for path in files:
                if path.startswith(KEPT_FOLDERS):
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
        self, name: str, inputs: Any, build: Build, on_hashed: OnHashed = lambda done, total: None
    ) -> bool:
        """Run a stage, or reuse its result if its inputs and files are unchanged.

        Args:
            name: the stage's folder in the bundle.
            inputs: everything that the result depends on, as JSON values.
            build: gets the folder to write to. The folder has only files with a journal, from an
                interrupted call with the same inputs. What it returns is kept for ``results``.
            on_hashed: is called as the new or reused files are hashed.

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
            if isinstance(error, INVALID) or not _journals(temporary):
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._stages[name] = {"key": key, "result": result, "files": files}
        write_json(self._record_file, self._stages)
        return False

    def is_current(self, name: str, inputs: Any) -> bool:
        """Return whether a stage was finished with these inputs."""
        return name in self._stages and self._stages[name]["key"] == _key(inputs)

    def remaining_bytes(
        self, name: str, inputs: Callable[[], Any], size: Callable[[], int]
    ) -> tuple[int, int]:
        """Return the bytes that a stage still has to write, and the bytes that it replaces.

        Interrupted work with other inputs is deleted at once.

        Args:
            name: of the stage.
            inputs: returns the inputs of the stage, or None if they are not known yet and differ
                from earlier ones; called only if the stage was run before.
            size: returns the bytes of all files of the stage; called only if some are missing.
        """
        finished, temporary = self._stages.get(name), self._folder_of(name)
        current = inputs() if finished or temporary.is_dir() else None
        key = _key(current) if current is not None else ""
        if finished and finished["key"] == key:
            return 0, 0
        if not _is_of(temporary, key):
            shutil.rmtree(temporary, ignore_errors=True)
        written = sum(file.stat().st_size for file in _kept(temporary) if file.exists())
        old = sum(entry["bytes"] for entry in finished["files"].values()) if finished else 0
        return max(size() - written, 0), old

    def forget_all_but(self, names: Iterable[str]) -> None:
        """Delete the interrupted work of other stages."""
        kept = {self._folder_of(name) for name in names}
        for leftover in self._work.iterdir():
            if leftover.is_dir() and leftover not in kept:
                shutil.rmtree(leftover)

    def scratch(self, name: str, inputs: Any) -> Path:
        """Return a folder for intermediate results, kept until the bundle is finished."""
        folder, key = self._folder_of(name), _key(inputs)
        if not _is_of(folder, key):
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        (folder / INPUTS).write_text(key)
        (folder / f"all{JOURNAL}").touch()
        return folder

    def _folder_of(self, name: str) -> Path:
        """Return the folder in which a stage is built."""
        return self._work / name.replace("/", "_")

    def attach(self, name: str, file: Path, result: Any) -> None:
        """Add a file to a finished stage, or replace it there.

        Args:
            name: of the stage.
            file: is moved into the stage's folder.
            result: replaces the stage's result.
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
        """Delete a finished stage, its files, and folders that are empty then."""
        if name in self._stages:
            self._withdraw()
            del self._stages[name]
            write_json(self._record_file, self._stages)
            folder = self.folder / name
            shutil.rmtree(folder, ignore_errors=True)
            for parent in folder.parents[: len(Path(name).parts) - 1]:
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()

    @property
    def work(self) -> Path:
        """The folder for unfinished files, on the bundle's file system."""
        return self._work

    def files(self) -> dict[str, FileEntry]:
        """Return the entries of all files of all finished stages."""
        entries: dict[str, FileEntry] = {}
        for stage in self._stages.values():
            entries |= {path: FileEntry(**entry) for path, entry in stage["files"].items()}
        return dict(sorted(entries.items()))

    def result(self, name: str) -> dict[str, Any] | None:
        """Return the result of a finished stage; None if it is not finished."""
        stage = self._stages.get(name)
        return dict(stage["result"]) if stage else None

    def results(self) -> list[dict[str, Any]]:
        """Return the results of all finished stages."""
        return [stage["result"] for stage in self._stages.values()]

    def finish(self, make: Callable[[Manifest | None], Manifest]) -> None:
        """Write the manifest, which makes the folder a bundle, and delete all interrupted work.

        Args:
            make: builds the manifest from the current one, which has verdicts that ``parity``
                recorded meanwhile; gets None for a new bundle.

        Raises:
            UserError: the new manifest is invalid; the folder is unchanged.
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
        """Unlock the folder; folders that this export created without a result are deleted."""
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

    def _intact(self, files: dict[str, dict[str, Any]], on_hashed: OnHashed) -> bool:
        if not self._present(files):
            return False
        paths = {path: self.folder / path for path in files}
        hashes = sha256_of_files(paths.values(), on_hashed)
        return all(hashes[paths[path]] == entry["sha256"] for path, entry in files.items())

    def _entries(self, built: Path, stage: str, on_hashed: OnHashed) -> dict[str, dict[str, Any]]:
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
        """Move the manifest away, because files that it names are about to change."""
        with manifest_lock(self.folder):
            if (self.folder / MANIFEST).exists():
                (self.folder / MANIFEST).replace(self._previous_file)


def dependencies(result: dict[str, Any]) -> dict[str, str]:
    """Return the hashes of the plan and the scales that a stage's artifacts were made from."""
    depends_on: dict[str, str] = result.get("depends_on", result.get("rests_on", {}))  # the second until 0.4
    return depends_on


def _key(inputs: Any) -> str:
    return sha256_of_text(json.dumps(inputs, sort_keys=True))


def _journals(folder: Path) -> list[Path]:
    return sorted(folder.rglob(f"*{JOURNAL}"))


def _kept(folder: Path) -> set[Path]:
    """Return the files that have a journal."""
    return {file.with_name(file.name.removesuffix(JOURNAL)) for file in _journals(folder)}


def _is_of(folder: Path, key: str) -> bool:
    """Return whether the content of a folder was made from these inputs."""
    inputs = folder / INPUTS
    return inputs.exists() and inputs.read_text() == key


def _prepare(folder: Path, key: str) -> None:
    """Create the folder of a stage; files with journals from the same inputs stay."""
    if not _is_of(folder, key):
        shutil.rmtree(folder, ignore_errors=True)
    kept = {*_journals(folder), *_kept(folder)}
    for file in folder.rglob("*"):
        if file.is_file() and file not in kept:
            file.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INPUTS).write_text(key)
