"""Locks between processes that write to the same folder or bundle.

They use ``flock`` (Linux and macOS). The package ``filelock`` does not replace them: on Unix it
keeps the lock file after release, and where a file system has no locks it falls back to a marker
file, which the end of a process does not remove.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from runtimes.bundle.manifest import MANIFEST, STAGING
from runtimes.errors import UserError

PREVIOUS = "previous.json"  # in it: the bundle's manifest while an export changes the bundle


class FileLock:
    """An exclusive lock on a file, between processes and between threads.

    The system releases it when the process ends, also by a signal. ``release`` deletes the file, so
    that finished folders do not contain lock files.

    Args:
        file: the lock file.
    """

    def __init__(self, file: Path) -> None:
        """Store the file; ``acquire`` takes the lock."""
        self.file = file
        self._handle: int | None = None
        self._made_folder = False

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._handle is not None

    def acquire(self, wait: bool = True) -> bool:
        """Take the lock; the file's folder is created if it is missing.

        Args:
            wait: wait until another holder releases the lock.

        Returns:
            False where another holder has the lock and ``wait`` is False.

        Raises:
            UserError: the file is a link, its file system does not support locks, or its folder
                cannot be created.
        """
        while True:
            if not self.file.parent.is_dir():
                self._made_folder = True
                self._make_folder()
            try:
                handle = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            except FileNotFoundError:  # another holder has just deleted the folder
                continue
            except OSError as error:
                raise UserError(f"{self.file} cannot be locked: {error.strerror}.") from error
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                if _is_open_file(handle, self.file):
                    self._handle = handle
                    return True
            except BlockingIOError:
                os.close(handle)
                return False
            except OSError as error:
                os.close(handle)
                raise UserError(f"{self.file} cannot be locked: {error.strerror}.") from error
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)  # another holder has just deleted the file; try a new one

    def _make_folder(self) -> None:
        folder = self.file.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if not isinstance(error, (FileExistsError, FileNotFoundError, NotADirectoryError)):
                raise UserError(f"{folder} cannot be created: {error.strerror}.") from error
            # Another holder has just deleted a folder, or a file has its name.
            for path in (folder, *folder.parents):
                if os.path.lexists(path) and not path.is_dir():
                    raise UserError(f"{path} is not a folder.") from error

    def release(self) -> None:
        """Release the lock and delete its file, and its folder if ``acquire`` created it."""
        if self._handle is None:
            return
        with suppress(OSError):  # the folder is deleted, or not empty
            self.file.unlink()
            if self._made_folder:
                self.file.parent.rmdir()
        os.close(self._handle)
        self._handle = None


def _is_open_file(handle: int, file: Path) -> bool:
    """Return whether the name still belongs to the opened file."""
    try:
        return os.path.samestat(os.fstat(handle), file.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


@contextmanager
def locked(file: Path, busy: str | None = None) -> Iterator[None]:
    """Hold the lock of a file.

    Args:
        file: the lock file.
        busy: error message where another process holds the lock; None waits for it.

    Raises:
        UserError: another process holds the lock, or as in ``FileLock.acquire``.
    """
    lock = FileLock(file)
    if not lock.acquire(wait=busy is None):
        raise UserError(str(busy))
    try:
        yield
    finally:
        lock.release()


def manifest_file(folder: Path) -> Path:
    """Return the file of a bundle's manifest; an export moves it while it changes the bundle."""
    previous = folder / STAGING / PREVIOUS
    return folder / MANIFEST if (folder / MANIFEST).exists() or not previous.exists() else previous


@contextmanager
def manifest_lock(folder: Path) -> Iterator[None]:
    """Hold the lock for reading, changing and writing a bundle's manifest; wait for other holders.

    Raises:
        UserError: the folder of the lock is a link.
    """
    refuse_link(folder, STAGING)
    with locked(folder / STAGING / "manifest.lock"):
        yield


def refuse_link(folder: Path, relative: str) -> None:
    """Check that no part of the path ``relative`` inside ``folder`` is a link.

    Raises:
        UserError: a part is a link, so files would be written elsewhere.
    """
    for part in (relative, *map(str, PurePosixPath(relative).parents)):
        if (folder / part).is_symlink() and part != ".":
            raise UserError(
                f"{folder / part} is a link, through which files would be written elsewhere;"
                " put a folder in its place."
            )
