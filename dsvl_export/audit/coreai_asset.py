"""Where two Core AI assets of one component differ, apart from what differs in every export.

Core AI's converter gives weights and composite operators random names and notes the time. Everything else of
its MLIR bytecode is the same every time: operations, attributes and weights are compared byte for byte.
Layout: https://mlir.llvm.org/docs/BytecodeFormat/
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dsvl_export.audit.result import Difference
from dsvl_export.audit.values import equal_bytes, first_byte
from runtimes.backends.coreai import PROGRAM
from runtimes.bundle.files import read_json, sha256_of_file

MAGIC = b"ML\xefR"
STRINGS = 0  # id of the section that holds all names
SECTIONS = {0: "strings", 1: "dialects", 2: "attributes", 3: "attribute offsets", 4: "operations",
            5: "weights", 6: "weight offsets", 7: "dialect versions", 8: "properties"}  # fmt: skip
RANDOM_NAME = re.compile(rb"resource_\d+(?=\0)|_[a-z]{8}(?=\0)")
HASH, ABOUT = "main.hash", "metadata.json"


def asset_differences(found: Path, expected: Path, names: Sequence[str]) -> list[Difference]:
    """What differs in the files of an asset of these names, all of which differ in some byte."""
    differences = []
    for name in names:
        one, other = found / name, expected / name
        if name == HASH:
            if one.read_bytes().hex() != sha256_of_file(found / PROGRAM):
                differences.append(Difference(name, f"is not the SHA-256 of {PROGRAM}"))
        elif name == ABOUT:
            about, wanted = (
                {key: value for key, value in read_json(file).items() if key != "creationDate"}
                for file in (one, other)
            )
            if about != wanted:
                differences.append(Difference(name, f"is {about}, expected {wanted}"))
        elif name == PROGRAM:
            differences += _program_differences(one, other)
        else:
            differences.append(Difference(name, "differs"))
    return differences


def _program_differences(found: Path, expected: Path) -> list[Difference]:
    try:
        one = sections(found)
    except (ValueError, IndexError):
        return [Difference(PROGRAM, "is not readable MLIR bytecode")]
    other = sections(expected)
    if one.keys() != other.keys():
        return [Difference(PROGRAM, "has other sections")]
    differences = []
    for kind, content in other.items():
        pair = (one[kind], content)
        mine, wanted = map(_without_random_names, pair) if kind == STRINGS else pair
        if equal_bytes(mine, wanted):
            continue
        name = f"{PROGRAM}, {SECTIONS.get(kind, kind)}"
        differences.append(first_byte(name, mine, wanted))
    return differences


def sections(file: Path) -> dict[int, np.ndarray]:
    """Sections of MLIR bytecode by their ids, mapped into memory.

    Raises:
        ValueError, IndexError: it is none, or cut short.
    """
    content = np.memmap(file, np.uint8, "r")
    if content[: len(MAGIC)].tobytes() != MAGIC:
        raise ValueError("no MLIR bytecode")
    _, place = _number(content, len(MAGIC))
    place += content[place : place + 256].tobytes().index(b"\0") + 1  # the producer's name
    found = {}
    while place < len(content):
        kind, aligned = int(content[place]) & 0x7F, int(content[place]) >> 7
        size, place = _number(content, place + 1)
        if aligned:
            alignment, place = _number(content, place)
            place += -place % alignment
        if place + size > len(content):
            raise ValueError("a section is cut short")
        found[kind] = content[place : place + size]
        place += size
    return found


def _without_random_names(section: np.ndarray) -> np.ndarray:
    """The names in the section of strings, each ended by a zero; their lengths come before them."""
    count, place = _number(section, 0)
    for _ in range(count):
        _, place = _number(section, place)
    return np.frombuffer(RANDOM_NAME.sub(b"", section[place:].tobytes()), np.uint8)


def _number(content: np.ndarray, place: int) -> tuple[int, int]:
    """A number in MLIR's form of variable length, and the place after it: the zero bits at the end of the
    first byte count the bytes that follow."""
    first = int(content[place])
    if first == 0:
        return int.from_bytes(content[place + 1 : place + 9].tobytes(), "little"), place + 9
    size = (first & -first).bit_length()
    return int.from_bytes(content[place : place + size].tobytes(), "little") >> size, place + size
