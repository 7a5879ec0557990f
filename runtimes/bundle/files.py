"""Readers of untrusted JSON and JSON Lines files, atomic writes, and hashes of files."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from runtimes.errors import UserError

MAX_JSON_BYTES = 32_000_000  # reading this much takes about 10 s and 1.5 GB
MAX_NESTING = 64  # levels of lists and objects; a manifest has 8
_INTEGERS = range(-(2**63), 2**64)  # int64 and uint64, which other JSON readers support
JOURNAL = ".journal"  # suffix of the file that records how far another file is written
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_json(file: Path, huge_integers: bool = False) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        file: the file.
        huge_integers: as in ``parse_json``.

    Raises:
        UserError: the file is missing, too large or not JSON by the rules of ``parse_json``, or its
            value is not an object.
    """
    value = parse_json(read_bytes(file), str(file), huge_integers)
    if not isinstance(value, dict):
        raise UserError(f"{file} contains a JSON {type(value).__name__}, expected an object.")
    return value


def parse_json(content: bytes | str, where: str, huge_integers: bool = False) -> Any:
    """Return the value of an untrusted JSON text.

    Also refused: NaN and infinity (also as ``1e999``), integers beyond 64 bits, duplicate keys,
    more than ``MAX_NESTING`` levels, half a surrogate pair, and a byte order mark.

    Args:
        content: the text.
        where: name of the text, for errors, as its file.
        huge_integers: accept integers of up to 40 digits: transformers writes 10^30 as the
            ``model_max_length`` of a tokenizer without one.

    Raises:
        UserError: the text is refused; the message has the reason.
    """
    try:
        if isinstance(content, bytes):
            if content.startswith(_BYTE_ORDER_MARK):
                raise ValueError("it begins with a byte order mark; save it as UTF-8 without one")
            content = content.decode("utf-8")
        value = json.loads(
            content,
            parse_int=_huge_integer if huge_integers else _integer,
            parse_float=_number,
            parse_constant=_constant,
            object_pairs_hook=_object,
        )
        _check_nesting(value)
        if "\\ud" in content.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise UserError(f"{where} is not valid JSON: it is nested too deeply.") from error
    except UnicodeEncodeError as error:
        raise UserError(f"{where} is not valid JSON: a string contains half a surrogate pair.") from error
    except ValueError as error:  # from the parser, the decoder and the functions below
        raise UserError(f"{where} is not valid JSON: {error}.") from error
    return value


def _integer(text: str) -> int:
    if len(text) > 20 or (value := int(text)) not in _INTEGERS:
        raise ValueError(f"the number {text[:20]}… has more than 64 bits")
    return value


def _huge_integer(text: str) -> int:
    return int(text) if len(text) <= 40 else _integer(text)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        duplicate = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {duplicate[:100]!r} occurs twice")
    return value


def _check_nesting(value: Any) -> None:
    level = [value]
    for _ in range(MAX_NESTING + 1):
        level = [item for item in level if isinstance(item, (dict, list))]
        if not level:
            return
        level = [
            item for parent in level for item in (parent.values() if isinstance(parent, dict) else parent)
        ]
    raise ValueError(f"it has more than {MAX_NESTING} levels")


def read_bytes(file: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """Return the content of a regular file of a bounded size.

    Raises:
        UserError: the file is missing, is not a regular file, has more than ``limit`` bytes, or
            cannot be read.
    """
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # a pipe could block
            raise UserError(f"{file} is not a regular file.")
        with file.open("rb") as handle:
            content = handle.read(limit + 1)
    except FileNotFoundError as error:
        raise UserError(f"The file {file} is missing.") from error
    except (OSError, ValueError) as error:  # ValueError: the name has a NUL character
        raise UserError(f"{file} cannot be read: {getattr(error, 'strerror', error)}.") from error
    if len(content) > limit:
        raise UserError(f"{file} has more than {limit} bytes, the maximum for this kind of file.")
    return content


def read_json_lines(file: Path, what: str) -> Iterator[tuple[int, Any]]:
    """Yield the line numbers, from 1, and values of a JSON Lines file; empty lines are skipped.

    Only a line feed ends a line, because U+2028, U+0085 and the like can occur in strings. A byte
    order mark is skipped.

    Args:
        file: the file.
        what: the file's purpose, for errors, as in ``task file``.

    Raises:
        UserError: the file cannot be read, or a line is not JSON; the message has its number.
    """
    try:
        with file.open("rb") as handle:
            number = 0
            while line := handle.readline(MAX_JSON_BYTES + 1):
                number += 1
                if len(line) > MAX_JSON_BYTES:
                    raise UserError(f"Line {number} of {file} has more than {MAX_JSON_BYTES} bytes.")
                if number == 1:
                    line = line.removeprefix(_BYTE_ORDER_MARK)
                if line.strip():
                    yield number, parse_json(line, f"Line {number} of {file}")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"The {what} {file} cannot be read: {reason}.") from error


def write_text(file: Path, text: str) -> None:
    """Replace a file with UTF-8 text, as ``write_bytes``."""
    write_bytes(file, text.encode())


def write_bytes(file: Path, content: bytes) -> None:
    """Replace a file in one step: readers see the old or the new content, also after a crash.

    The content is written to a new file in the same folder, whose name must not exist yet. So
    processes that write at the same time do not collide, and no link is followed; if ``file`` is a
    link, the link is replaced.
    """
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(8)}.tmp")
    opened = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(opened, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(file.parent)


def _sync_folder(folder: Path) -> None:
    """Write a rename in a folder to disk, where the file system supports it."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        with suppress(OSError):  # some network file systems do not support it
            os.fsync(handle)
        os.close(handle)


def write_json(file: Path, value: Any) -> None:
    """Replace a file with indented JSON, as ``write_bytes``."""
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256_of_file(file: Path, on_bytes: Callable[[int], None] = lambda count: None) -> str:
    """Return the hexadecimal SHA-256 of a file; ``on_bytes`` gets the size of each chunk."""
    with file.open("rb") as handle:
        digest = hashlib.sha256()
        while chunk := handle.read(1 << 22):
            digest.update(chunk)
            on_bytes(len(chunk))
    return digest.hexdigest()


def sha256_of_files(files: Iterable[Path], on_step: Callable[[int, int], None]) -> dict[Path, str]:
    """Return the SHA-256 of files; ``on_step`` is called with the hashed bytes and the total."""
    files, done = list(files), 0
    total = sum(file.stat().st_size for file in files)

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        on_step(done, total)

    return {file: sha256_of_file(file, on_bytes) for file in files}


def sha256_of_text(text: str) -> str:
    """Return the hexadecimal SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()
