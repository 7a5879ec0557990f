"""Mutated files of strangers: each is read, or refused in one sentence, within bounds of time and memory.

    python benchmarks/robustness/mutations.py [--count 20000] [--kind manifest] [--first 0]

Every mutation follows from its kind and number, so that a failure can be repeated with ``--kind`` and
``--first``. The exit code is 1 where a reader raised something else than UserError, took more than 20 s, or
needed more than 4 GB.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import random
import resource
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from calibration.precision_plan import RECIPES, read_plan
from calibration.scale_table import TABLE_FILE, VECTORS_FILE, ActivationScale, ScaleTable
from reference.checkpoint.checkpoint import open_checkpoint
from reference.checkpoint.specs import preprocess_spec, prompt_spec
from reference.checkpoint.tensor_files import TensorFiles
from reference.tiny import TINY
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.manifest import MANIFEST
from runtimes.bundle.tensor_files import save_tensors
from runtimes.embedding import TokenEmbedding
from runtimes.errors import UserError
from runtimes.goldens.golden import Golden, load_golden, save_golden
from runtimes.text.tokenizer import Tokenizer

COUNT, SECONDS, MEMORY = 20_000, 20, 4_000_000_000
# Put into JSON in place of a value; the second group as raw text that json.dumps would not write.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e-320, 1e308, "", "x",
    "\0", "../../x", "/etc/passwd", "é\u2028", "x" * 10_000, [], {}, [[]], [None], [0, -1], {"": {}},
)  # fmt: skip
RAW = ("NaN", "-Infinity", "1e999", "9" * 5000, "[" * 2000 + "]" * 2000, '"\\ud800"', '{"a":1,"a":2}', "")
MARK = "@raw@"


@dataclass(frozen=True)
class Kind:
    """What is mutated: the file's content, and what reads it."""

    content: bytes
    read: Callable[[bytes], object]
    is_json: bool = True


@dataclass
class Outcome:
    """How many files of one kind were read and refused, and what went wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)
    slowest: float = 0.0


def mutated(kind: Kind, name: str, number: int) -> bytes:
    """Mutation ``number`` of a kind's content."""
    source = random.Random(f"{name} {number}")
    if kind.is_json and source.random() < 0.7:
        value = json.loads(kind.content)
        for _ in range(source.choice((1, 1, 1, 2, 5))):
            _change(value, source)
        return json.dumps(value).replace(f'"{MARK}"', source.choice(RAW)).encode("utf-8", "surrogatepass")
    content = bytearray(kind.content)
    for _ in range(source.choice((1, 1, 2, 8))):
        place = source.randrange(len(content) + 1)
        length = source.choice((1, 1, 4, 16, 200))
        piece = content[place : place + length]
        content[place : place + length] = source.choice(
            (b"", source.randbytes(len(piece)), piece * 3, b"\0" * len(piece), b"9" * length, b"&a *a [{")
        )
    return bytes(content[: source.randrange(len(content) + 1)] if source.random() < 0.1 else content)


def _change(value: Any, source: random.Random) -> None:
    """Replace, drop or add one value somewhere in a JSON document."""
    places: list[tuple[Any, Any]] = []
    level = [value]
    while level:
        outer = level.pop()
        keys = list(outer) if isinstance(outer, dict) else range(len(outer))
        places += [(outer, key) for key in keys]
        level += [outer[key] for key in keys if isinstance(outer[key], (dict, list))]
    if not places:
        return
    outer, key = source.choice(places)
    action = source.choice(("replace", "replace", "replace", "raw", "drop", "add", "move"))
    if action == "replace":
        outer[key] = deepcopy(source.choice(VALUES))
    elif action == "raw":
        outer[key] = MARK
    elif action == "drop":
        del outer[key]
    elif action == "move":
        other, at = source.choice(places)
        outer[key] = json.loads(json.dumps(other[at]))
    elif isinstance(outer, dict):
        outer[f"{key}x"] = deepcopy(source.choice(VALUES))
    else:
        outer.insert(key, deepcopy(source.choice(VALUES)))


def kinds(bundle: Path, folder: Path) -> dict[str, Kind]:
    """All kinds.

    Args:
        bundle: an exported one, whose manifest is mutated.
        folder: for the files.
    """
    spec = Bundle.open(bundle).manifest.prompt
    opened = open_checkpoint("tiny")
    golden = Golden(
        "0" * 64, "prompt", ("a.png",), np.zeros((1, 4, 4, 3), np.uint8), {"f": ones(1, 2, 2)},
        ones(1, 2, 2), np.arange(4), np.arange(4), ones(4, 8),
    )  # fmt: skip
    save_golden(golden, folder / "golden")
    save_tensors({"token_embedding": ones(4, 4)}, folder / "table", {"a": "b"})
    scales = ScaleTable(opened.digest, "data", 4)
    scales.activations["decoder.head"] = ActivationScale(0.1, 0.1, "mse", (-1.0, 1.0), 4, "0" * 64)
    scales.save(folder / "scales")
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    for file in TINY.glob("*.json"):
        (checkpoint / file.name).write_bytes(file.read_bytes())

    def put(place: Path, read: Callable[[], object]) -> Callable[[bytes], object]:
        def read_content(content: bytes) -> object:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
            return read()

        return read_content

    def read_checkpoint() -> object:
        made = open_checkpoint(str(checkpoint), weights=False)
        return preprocess_spec(made), prompt_spec(made)

    def restored(name: str) -> Callable[[bytes], object]:
        original = (checkpoint / name).read_bytes()

        def read(content: bytes) -> object:
            try:
                return put(checkpoint / name, read_checkpoint)(content)
            finally:
                (checkpoint / name).write_bytes(original)

        return read

    def read_header(content: bytes) -> object:
        weights = folder / "weights"
        put(weights / "model.safetensors", lambda: None)(content)
        files = TensorFiles(weights)
        tensors = [files.load(name) for name in files.stored]
        return tensors, TokenEmbedding(weights / "model.safetensors")

    def read_tokenizer() -> object:
        tokenizer = Tokenizer(folder / "tokenizer.json", spec)
        ids = tokenizer.encode("User: <image_placeholder>What is 12 + 3?\n\nAssistant:")
        return tokenizer.pieces(ids)

    table = (folder / "scales" / TABLE_FILE).read_bytes()
    (folder / "read").mkdir()
    (folder / "read" / VECTORS_FILE).write_bytes((folder / "scales" / VECTORS_FILE).read_bytes())
    recipe = b"base: fp16\n" + (RECIPES / "int8-int4.yaml").read_bytes()
    return {
        "manifest": Kind(
            (bundle / MANIFEST).read_bytes(), put(folder / "b" / MANIFEST, lambda: Bundle.open(folder / "b"))
        ),
        "config": Kind((TINY / "config.json").read_bytes(), restored("config.json")),
        "safetensors header": Kind((folder / "table").read_bytes(), read_header, is_json=False),
        "processor config": Kind(
            (TINY / "preprocessor_config.json").read_bytes(), restored("preprocessor_config.json")
        ),
        "tokenizer": Kind(
            (TINY / "tokenizer.json").read_bytes(), put(folder / "tokenizer.json", read_tokenizer)
        ),
        "plan": Kind(recipe, put(folder / "p.yaml", lambda: read_plan(folder / "p.yaml")), is_json=False),
        "scale table": Kind(
            table, put(folder / "read" / TABLE_FILE, lambda: ScaleTable.load(folder / "read"))
        ),
        "golden": Kind(
            (folder / "golden").read_bytes(), put(folder / "g", lambda: load_golden(folder / "g")), False
        ),
    }  # fmt: skip


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def run(kind: Kind, name: str, numbers: range) -> Outcome:
    """Read mutations of one kind; a reader that hangs ends the process with its traceback."""
    outcome = Outcome()
    for number in numbers:
        content = mutated(kind, name, number)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        started = perf_counter()
        try:
            kind.read(content)
            outcome.counts["read"] += 1
        except UserError as error:
            outcome.counts["refused"] += 1
            if "\n" in str(error):
                outcome.failures.append((number, f"more than one line: {error}"))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - what this looks for; a panic of Rust is no Exception
            outcome.failures.append((number, f"{type(error).__name__}: {str(error)[:200]}"))
        faulthandler.cancel_dump_traceback_later()
        outcome.slowest = max(outcome.slowest, perf_counter() - started)
    return outcome


def limit_memory() -> None:
    """Let this process take at most ``MEMORY`` more than it has; a MemoryError is a failure then."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=COUNT, help="mutations in all")
    parser.add_argument("--kind", help="one kind alone")
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation")
    given = parser.parse_args()
    from dsvl_export.exporter.export import export

    failed = False
    with tempfile.TemporaryDirectory() as work:
        bundle = export("tiny", Path(work) / "bundle", goldens=False).folder
        (Path(work) / "files").mkdir()
        known = kinds(bundle, Path(work) / "files")
        limit_memory()
        each = 1 if given.kind and given.count == 1 else given.count // (1 if given.kind else len(known))
        print(f"{'kind':20} {'files':>6} {'read':>6} {'refused':>8} {'failed':>7} {'slowest':>9}")
        for name, kind in known.items():
            if given.kind in (None, name):
                found = run(kind, name, range(given.first, given.first + each))
                failed |= bool(found.failures)
                print(
                    f"{name:20} {each:6} {found.counts['read']:6} {found.counts['refused']:8}"
                    f" {len(found.failures):7} {found.slowest:7.2f} s",
                    flush=True,
                )
                for number, what in found.failures[:20]:
                    print(f"   {name} {number}: {what}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"largest memory of the process: {peak:.1f} GB")
    sys.exit(failed)


if __name__ == "__main__":
    main()
