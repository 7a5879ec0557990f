"""The version of this package, and digests of its code."""

from __future__ import annotations

from functools import cache
from pathlib import Path

__version__ = "0.5.0.dev0"
PACKAGES = ("calibration", "dsvl_export", "reference", "runtimes")
ROOT = Path(__file__).parents[1]  # the folder that holds the packages


@cache
def code_digest(paths: tuple[str, ...], root: Path = ROOT) -> str:
    """Return the SHA-256 of source and data files.

    An export compares it with an earlier export's: in a checkout, code changes without the version.

    Args:
        paths: files, and folders with everything below them, relative to ``root``.
        root: the folder that holds the packages.

    Raises:
        FileNotFoundError: a path does not exist.
    """
    import hashlib  # deferred: `--version` does not need it

    digest = hashlib.sha256()
    for file in sorted({file for path in paths for file in _files(root / path)}):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    """Return a file itself, or the files below a folder without Python's caches."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"There is no {path}, which the digest of the code covers.")
    return [file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
