"""Files: JSON with sentences for errors, hashes, and writes that leave nothing half-done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from runtimes.errors import UserError


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: the file is missing, not JSON, or holds no object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"The file {file} is missing.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid JSON: {error}.") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} holds a JSON {type(value).__name__}, expected an object.")
    return value


def write_text(file: Path, text: str) -> None:
    """As ``write_bytes``, UTF-8."""
    write_bytes(file, text.encode())


def write_bytes(file: Path, content: bytes) -> None:
    """Write beside the file and rename, so that a reader never sees half of it."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(file: Path, value: Any) -> None:
    """As ``write_text``, indented JSON."""
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256_of_file(file: Path, on_bytes: Callable[[int], None] = lambda count: None) -> str:
    """Hexadecimal SHA-256 of a file, read in chunks; ``on_bytes`` is called with the size of each."""
    with file.open("rb") as handle:
        digest = hashlib.sha256()
        while chunk := handle.read(1 << 22):
            digest.update(chunk)
            on_bytes(len(chunk))
    return digest.hexdigest()


def sha256_of_files(files: Iterable[Path], on_step: Callable[[int, int], None]) -> dict[Path, str]:
    """Hashes of files; ``on_step`` is called with the bytes that are hashed, and all."""
    files, done = list(files), 0
    total = sum(file.stat().st_size for file in files)

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        on_step(done, total)

    return {file: sha256_of_file(file, on_bytes) for file in files}


def sha256_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
