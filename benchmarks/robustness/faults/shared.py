"""Faults of what all backends of a bundle share: token table, tokenizer, manifest and stored prefixes."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from benchmarks.robustness.faults.values import change_values
from runtimes.bundle.files import read_json, write_json
from runtimes.bundle.manifest import MANIFEST

TOKEN_TABLE, TOKENIZER = "token_embedding/token_embedding.safetensors", "tokenizer/tokenizer.json"


def plant(bundle: Path, random: Random) -> tuple[str, list[Path]]:
    """Change one of the shared files."""
    return random.choice([_token_table, _tokenizer, _manifest, _prefix])(bundle, random)


def _token_table(bundle: Path, random: Random) -> tuple[str, list[Path]]:
    file = bundle / TOKEN_TABLE
    (table,) = load_file(file).values()
    changed = None
    while changed is None:
        changed = change_values(table, random)
    save_file({"token_embedding": np.ascontiguousarray(changed[1].astype(table.dtype))}, file)
    return f"token table: {changed[0]}", [file]


def _prefix(bundle: Path, random: Random) -> tuple[str, list[Path]]:
    """Of a random precision, which may be another than the one that is judged."""
    file = random.choice(sorted(bundle.glob("prefix/*/*.safetensors")))
    with safe_open(file, framework="np") as handle:
        texts = handle.metadata()
    arrays = load_file(file)
    changed = None
    while changed is None:
        changed = change_values(arrays["states"], random)
    save_file({**arrays, "states": np.ascontiguousarray(changed[1])}, file, texts)
    return f"{file.parent.name} prefix: {changed[0]}", [file]


def _tokenizer(bundle: Path, random: Random) -> tuple[str, list[Path]]:
    file = bundle / TOKENIZER
    raw: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    kind = random.choice(["swapped", "normalizer", "decoder"])
    if kind == "swapped":
        vocabulary = raw["model"]["vocab"]
        one, other = random.sample(sorted(vocabulary), 2)
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
        kind = f"{one!r} and {other!r} swapped"
    elif kind == "normalizer":
        raw["normalizer"] = {"type": "Lowercase"}
    else:
        raw["decoder"] = {"type": "Fuse"}
    file.write_text(json.dumps(raw, ensure_ascii=False), encoding="utf-8")
    return f"tokenizer: {kind}", [file]


def _manifest(bundle: Path, random: Random) -> tuple[str, list[Path]]:
    raw = read_json(bundle / MANIFEST)
    changes: list[tuple[str, str, Any]] = [
        ("preprocessing", "mean", [0.45, 0.5, 0.5]), ("preprocessing", "std", [0.3, 0.3, 0.3]),
        ("preprocessing", "background", [0, 0, 0]), ("preprocessing", "rescale_factor", 0.005),
        ("prompt", "system_prompt", "Answer in French."), ("prompt", "eos_ids", [7]),
        ("prompt", "bos_id", 9),
    ]  # fmt: skip
    group, name, value = random.choice(changes)
    raw[group][name] = value
    write_json(bundle / MANIFEST, raw)
    return f"manifest: {group}.{name} {value}", []
