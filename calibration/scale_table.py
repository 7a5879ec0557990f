"""The scale table: what calibration found, in a form to read, compare and edit by hand.

``scales.json`` has a row per layer whose input was observed; ``scales.safetensors`` has the vectors:
KV-cache magnitudes per head, smoothing factors, and the codes of tuned weights. Scales of untuned weights
follow from the weights themselves, see ``calibration.quantized_weights``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as serialize

from calibration.ranges import LEVELS
from reference.model.operators import FLOAT8_MAX
from runtimes.bundle.files import read_json, sha256_of_file, sha256_of_text, write_json
from runtimes.errors import UserError

TABLE_FILE, VECTORS_FILE = "scales.json", "scales.safetensors"
VERSION = 1
QUANTIZED_MAX = {"int8": float(LEVELS), "fp8": FLOAT8_MAX}


@dataclass(frozen=True)
class ActivationScale:
    """Scale of a layer's input: ``int8`` maps ±127 and ``fp8`` ±448 onto the range that ``method`` chose."""

    int8: float
    fp8: float
    method: str
    range: tuple[float, float]  # smallest and largest value seen
    samples: int
    histogram: str  # SHA-256

    def of(self, kind: str) -> float:
        return self.int8 if kind == "int8" else self.fp8


@dataclass(frozen=True)
class TunedWeight:
    """Codes and scale of a weight that GPTQ rounded for one precision; see ``quantize_weight``."""

    precision: str
    codes: np.ndarray
    scale: np.ndarray


@dataclass
class ScaleTable:
    """Scales by layer.

    ``caches``: attention → key and value → largest magnitude per head ``[Hkv]``. ``smoothing``: producer
    (see ``calibration.folding``) → factors ``[C]``. ``tuned``: layer → weight. ``tuned_for`` names the
    precision plan that the last two were made for.
    """

    checkpoint: str  # SHA-256
    data: str  # SHA-256 over the digests of all samples
    samples: int
    activations: dict[str, ActivationScale] = field(default_factory=dict)
    caches: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    smoothing: dict[str, np.ndarray] = field(default_factory=dict)
    tuned: dict[str, TunedWeight] = field(default_factory=dict)
    tuned_for: str | None = None

    def activation(self, layer: str, kind: str) -> float:
        """Scale of a layer's input.

        Raises:
            UserError: the table has none.
        """
        if layer not in self.activations:
            raise UserError(
                f"The scale table has no scale for the input of {layer}; calibrate again, or keep that layer"
                " in float."
            )
        return self.activations[layer].of(kind)

    def cache(self, attention: str, state: str, kind: str) -> np.ndarray:
        """Scales ``[Hkv]`` of ``key`` or ``value``.

        Raises:
            UserError: the table has none.
        """
        if state not in self.caches.get(attention, {}):
            raise UserError(
                f"The scale table has no scale for the {state} cache of {attention}; calibrate again."
            )
        return self.caches[attention][state] / np.float32(QUANTIZED_MAX[kind])

    def _vectors(self) -> dict[str, np.ndarray]:
        vectors = {
            f"cache/{name}/{state}": array
            for name, row in self.caches.items()
            for state, array in row.items()
        }
        vectors |= {f"smoothing/{name}": array for name, array in self.smoothing.items()}
        for name, weight in self.tuned.items():
            vectors |= {f"codes/{name}": weight.codes, f"scale/{name}": weight.scale}
        return {name: np.ascontiguousarray(array) for name, array in sorted(vectors.items())}

    def _document(self, vectors_sha256: str) -> dict[str, Any]:
        return {
            "version": VERSION,
            "checkpoint": self.checkpoint,
            "data": self.data,
            "samples": self.samples,
            "tuned_for": self.tuned_for,
            "vectors": {"file": VECTORS_FILE, "sha256": vectors_sha256},
            "tuned": {name: weight.precision for name, weight in self.tuned.items()},
            "activations": {name: asdict(row) for name, row in self.activations.items()},
        }

    @property
    def digest(self) -> str:
        """SHA-256 over all that the table says."""
        vectors = hashlib.sha256(serialize(self._vectors())).hexdigest()
        return sha256_of_text(json.dumps(self._document(vectors), sort_keys=True))

    def save(self, folder: Path) -> None:
        """Write both files; the JSON, which makes it a table, last."""
        folder.mkdir(parents=True, exist_ok=True)
        vectors = serialize(self._vectors())
        (folder / VECTORS_FILE).write_bytes(vectors)
        write_json(folder / TABLE_FILE, self._document(hashlib.sha256(vectors).hexdigest()))

    @classmethod
    def load(cls, folder: Path) -> ScaleTable:
        """Read and check a table.

        Raises:
            UserError: a file is missing or damaged, or a scale is no positive number.
        """
        file = folder / TABLE_FILE if folder.is_dir() else folder
        if not file.is_file():
            raise UserError(f"There is no scale table {file}; make one with 'dsvl-export calibrate'.")
        raw = read_json(file)
        if raw.get("version") != VERSION:
            raise UserError(f"{file} has version {raw.get('version')!r}, this release reads {VERSION}.")
        vectors_file = file.parent / VECTORS_FILE
        try:
            if sha256_of_file(vectors_file) != raw["vectors"]["sha256"]:
                raise UserError(
                    f"{vectors_file} is not the one that {file} was written with; calibrate again."
                )
            return _parse(raw, load_file(vectors_file))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"The scale table {file} cannot be used: {str(error).strip(chr(39))}.") from error


def _parse(raw: Mapping[str, Any], vectors: Mapping[str, np.ndarray]) -> ScaleTable:
    table = ScaleTable(raw["checkpoint"], raw["data"], int(raw["samples"]), tuned_for=raw["tuned_for"])
    for name, row in raw["activations"].items():
        low, high = row["range"]
        table.activations[name] = ActivationScale(**{**row, "range": (low, high)})
        for kind in QUANTIZED_MAX:
            scale = row[kind]
            if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
                raise ValueError(f"the {kind} scale of {name} is {scale!r}, it must be a positive number")
    for key, array in vectors.items():
        group, _, name = key.partition("/")
        if group == "cache":
            attention, _, state = name.rpartition("/")
            table.caches.setdefault(attention, {})[state] = array
        elif group == "smoothing":
            table.smoothing[name] = array
        elif group == "codes":
            table.tuned[name] = TunedWeight(raw["tuned"][name], array, vectors[f"scale/{name}"])
    return table
