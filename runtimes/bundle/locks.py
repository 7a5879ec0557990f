"""Locks between processes that write into the same folder or bundle."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from runtimes.bundle.manifest import MANIFEST
from runtimes.errors import UserError

STAGING = ".staging"  # the folder of an export that is not finished
PREVIOUS = "previous.json"  # there: the manifest of a bundle while what it names is changed


class FileLock:
    """An exclusive lock that a file stands for, between processes and between threads.

    The system gives it back when the holder ends, however it ends (``flock``, on Linux and macOS). The file
    is deleted when the lock is released, so that finished folders hold none.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._handle: int | None = None
        self._made_folder = False

    @property
    def held(self) -> bool:
        return self._handle is not None

    def acquire(self, wait: bool = True) -> bool:
        """Take the lock; the file's folder is created where it is missing.

        Args:
            wait: until another holder releases it; otherwise return False at once.

        Raises:
            UserError: the file is a link, its file system has no locks, or its folder cannot be created.
        """
        while True:
            if not self.file.parent.is_dir():
                self._made_folder = True
                self._make_folder()
            try:
                handle = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            except FileNotFoundError:  # the last holder deleted the folder meanwhile
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
            os.close(handle)  # the last holder deleted the file; it stands for nothing now

    def _make_folder(self) -> None:
        folder = self.file.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if not isinstance(error, (FileExistsError, FileNotFoundError, NotADirectoryError)):
                raise UserError(f"{folder} cannot be created: {error.strerror}.") from error
            # Another holder deleted a folder meanwhile, or there is something else in its place.
            for path in (folder, *folder.parents):
                if os.path.lexists(path) and not path.is_dir():
                    raise UserError(f"{path} is not a folder.") from error

    def release(self) -> None:
        """Give the lock back, and delete its file, and its folder where that was created and is empty."""
        if self._handle is None:
            return
        with suppress(OSError):  # the folder is gone, or holds other files
            self.file.unlink()
            if self._made_folder:
                self.file.parent.rmdir()
        os.close(self._handle)
        self._handle = None


def _is_open_file(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), file.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


@contextmanager
def locked(file: Path, busy: str | None = None) -> Iterator[None]:
    """Hold the lock of a file.

    Args:
        busy: the sentence to raise where another process holds it; None waits.

    Raises:
        UserError: see ``busy`` and ``FileLock.acquire``.
    """
    lock = FileLock(file)
    if not lock.acquire(wait=busy is None):
        raise UserError(str(busy))
    try:
        yield
    finally:
        lock.release()


def manifest_file(folder: Path) -> Path:
    """The manifest of a bundle, wherever an export that is changing the bundle has put it."""
    previous = folder / STAGING / PREVIOUS
    return folder / MANIFEST if (folder / MANIFEST).exists() or not previous.exists() else previous


@contextmanager
def manifest_lock(folder: Path) -> Iterator[None]:
    """Held while a bundle's manifest is read, changed and written; waits for others, who are quick.

    Raises:
        UserError: the folder of the lock is a link.
    """
    refuse_link(folder, STAGING)
    with locked(folder / STAGING / "manifest.lock"):
        yield


def refuse_link(folder: Path, relative: str) -> None:
    """Raise UserError where a folder inside of ``folder``, which is to be written into, is a link."""
    for part in (relative, *map(str, PurePosixPath(relative).parents)):
        if (folder / part).is_symlink() and part != ".":
            raise UserError(
                f"{folder / part} is a link, through which files would be written elsewhere;"
                " put a folder in its place."
            )
