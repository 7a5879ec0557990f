"""Differences of two Core AI assets of one component, apart from what differs in every export.

Core AI's converter gives weights and composite operators random names and stores the time. The rest
of its MLIR bytecode is deterministic: operations, attributes and weights are compared byte for
byte. Layout: https://mlir.llvm.org/docs/BytecodeFormat/
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dsvl_export.audit.result import Difference
from dsvl_export.audit.values import byte_difference, equal_bytes
from runtimes.backends.coreai import PROGRAM
from runtimes.bundle.files import read_json, sha256_of_file

MAGIC = b"ML\xefR"
STRINGS = 0  # id of the section that holds all names
SECTIONS = {0: "strings", 1: "dialects", 2: "attributes", 3: "attribute offsets", 4: "operations",
            5: "weights", 6: "weight offsets", 7: "dialect versions", 8: "properties"}  # fmt: skip
RANDOM_NAME = re.compile(rb"resource_\d+(?=\0)|_[a-z]{8}(?=\0)")
HASH, METADATA = "main.hash", "metadata.json"


def asset_differences(actual: Path, expected: Path, names: Sequence[str]) -> list[Difference]:
    """Return the differences of the named files of an asset, all of which differ in some byte."""
    differences = []
    for name in names:
        stored, wanted = actual / name, expected / name
        if name == HASH:
            if stored.read_bytes().hex() != sha256_of_file(actual / PROGRAM):
                differences.append(Difference(name, f"is not the SHA-256 of {PROGRAM}"))
        elif name == METADATA:
            metadata, wanted_metadata = (
                {key: value for key, value in read_json(file).items() if key != "creationDate"}
                for file in (stored, wanted)
            )
            if metadata != wanted_metadata:
                differences.append(Difference(name, f"is {metadata}, expected {wanted_metadata}"))
        elif name == PROGRAM:
            differences += _program_differences(stored, wanted)
        else:
            differences.append(Difference(name, "differs"))
    return differences


def _program_differences(actual: Path, expected: Path) -> list[Difference]:
    try:
        stored = read_sections(actual)
    except (ValueError, IndexError):
        return [Difference(PROGRAM, "is not readable MLIR bytecode")]
    wanted = read_sections(expected)
    if stored.keys() != wanted.keys():
        return [Difference(PROGRAM, "has other sections")]
    differences = []
    for kind, content in wanted.items():
        pair = (stored[kind], content)
        if kind == STRINGS:
            pair = (_without_random_names(pair[0]), _without_random_names(pair[1]))
        if not equal_bytes(*pair):
            differences.append(byte_difference(f"{PROGRAM}, {SECTIONS.get(kind, kind)}", *pair))
    return differences


def read_sections(file: Path) -> dict[int, np.ndarray]:
    """Return the sections of MLIR bytecode by their ids, memory-mapped.

    Raises:
        ValueError: the file is not MLIR bytecode, or is truncated.
        IndexError: the file is truncated.
    """
    content = np.memmap(file, np.uint8, "r")
    if content[: len(MAGIC)].tobytes() != MAGIC:
        raise ValueError("not MLIR bytecode")
    _, place = _number(content, len(MAGIC))
    place += content[place : place + 256].tobytes().index(b"\0") + 1  # the producer's name
    sections = {}
    while place < len(content):
        kind, aligned = int(content[place]) & 0x7F, int(content[place]) >> 7
        size, place = _number(content, place + 1)
        if aligned:
            alignment, place = _number(content, place)
            place += -place % alignment
        if place + size > len(content):
            raise ValueError("a section is truncated")
        sections[kind] = content[place : place + size]
        place += size
    return sections


def _without_random_names(section: np.ndarray) -> np.ndarray:
    """Return the zero-terminated names of the strings section, without the lengths before them."""
    count, place = _number(section, 0)
    for _ in range(count):
        _, place = _number(section, place)
    return np.frombuffer(RANDOM_NAME.sub(b"", section[place:].tobytes()), np.uint8)


def _number(content: np.ndarray, place: int) -> tuple[int, int]:
    """Read a number of variable length; return it and the offset after it.

    The number of trailing zero bits of the first byte is the number of bytes that follow.
    """
    first = int(content[place])
    if first == 0:
        return int.from_bytes(content[place + 1 : place + 9].tobytes(), "little"), place + 9
    size = (first & -first).bit_length()
    return int.from_bytes(content[place : place + size].tobytes(), "little") >> size, place + size
