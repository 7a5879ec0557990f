"""Files: JSON and JSON lines read as untrusted input, hashes, and writes that leave nothing half-done."""

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

MAX_JSON_BYTES = 32_000_000  # the largest takes some 10 s and 1.5 GB to read
MAX_NESTING = 64  # levels of lists and objects; a manifest has 8
_INTEGERS = range(-(2**63), 2**64)  # what other readers of JSON hold in a machine word
JOURNAL = ".journal"  # ends the name of the file that says how far a file is written
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_json(file: Path, huge_integers: bool = False) -> dict[str, Any]:
    """The JSON object in a file, read by the rules of ``parse_json``.

    Raises:
        UserError: the file is missing, too large, not JSON, or holds no object.
    """
    value = parse_json(read_bytes(file), str(file), huge_integers)
    if not isinstance(value, dict):
        raise UserError(f"{file} holds a JSON {type(value).__name__}, expected an object.")
    return value


def parse_json(content: bytes | str, where: str, huge_integers: bool = False) -> Any:
    """The value of a JSON text that somebody else wrote.

    Refused, beside what is not JSON: NaN and infinity (also as ``1e999``), integers beyond 64 bits, a key
    twice in one object, more than ``MAX_NESTING`` levels, half a surrogate pair, and a byte order mark.

    Args:
        where: what the sentence calls it, as a file.
        huge_integers: take integers of up to 40 digits: transformers writes 10^30 as the
            ``model_max_length`` of a tokenizer without one.

    Raises:
        UserError: with the reason.
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
        raise UserError(f"{where} is not valid JSON: a text holds half a surrogate pair.") from error
    except ValueError as error:  # of the parser, of the decoder, and of the functions below
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
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[:100]!r} occurs twice")
    return value


def _check_nesting(value: Any) -> None:
    level = [value]
    for _ in range(MAX_NESTING + 1):
        level = [item for item in level if isinstance(item, (dict, list))]
        if not level:
            return
        level = [item for each in level for item in (each.values() if isinstance(each, dict) else each)]
    raise ValueError(f"it has more than {MAX_NESTING} levels")


def read_bytes(file: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """The content of a regular file of a bounded size.

    Raises:
        UserError: it is missing, no regular file, larger than ``limit`` bytes, or cannot be read.
    """
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # a pipe would block, and a device might never end
            raise UserError(f"{file} is not a regular file.")
        with file.open("rb") as handle:
            content = handle.read(limit + 1)
    except FileNotFoundError as error:
        raise UserError(f"The file {file} is missing.") from error
    except (OSError, ValueError) as error:  # ValueError: of a name with a NUL character
        raise UserError(f"{file} cannot be read: {getattr(error, 'strerror', error)}.") from error
    if len(content) > limit:
        raise UserError(f"{file} has more than {limit} bytes, too many for such a file.")
    return content


def read_json_lines(file: Path, what: str) -> Iterator[tuple[int, Any]]:
    """Numbers, from 1, and values of the lines of a JSON Lines file; empty lines are left out.

    Lines end at line feeds alone: U+2028, U+0085 and their like may stand in a text. A byte order mark is
    skipped.

    Args:
        what: the file's purpose, for the sentence, as in ``task file``.

    Raises:
        UserError: the file cannot be read, or a line is not JSON (it is named).
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
    """As ``write_bytes``, UTF-8."""
    write_bytes(file, text.encode())


def write_bytes(file: Path, content: bytes) -> None:
    """Replace a file in one step: readers see the old content or the new one, also after a power cut.

    The content is written beside the file under a name of its own, which must not exist yet, so that
    processes that write at once do not meet and no link is followed; a link ``file`` is itself replaced.
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
    """Make a rename in a folder last, where the file system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        with suppress(OSError):  # some network file systems know no such thing
            os.fsync(handle)
        os.close(handle)


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
