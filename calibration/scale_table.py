"""The scale table: the result of calibration, in a form that can be read and edited by hand.

``scales.json`` has a row per layer whose input was observed. ``scales.safetensors`` has the
vectors: KV-cache magnitudes per head, smoothing factors, and the codes of tuned weights. Scales of
other weights are computed from the weights, see ``calibration.quantized_weights``.
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

from calibration.ranges import INT8_LEVELS
from reference.model.operators import FLOAT8_MAX
from runtimes.bundle.files import read_json, sha256_of_file, sha256_of_text, write_json
from runtimes.errors import UserError

TABLE_FILE, VECTORS_FILE = "scales.json", "scales.safetensors"
TABLE_VERSION = 1
QUANTIZED_MAX = {"int8": float(INT8_LEVELS), "fp8": FLOAT8_MAX}


@dataclass(frozen=True)
class ActivationScale:
    """Scales of a layer's input.

    ``int8`` maps ±127 to the range that ``method`` found, ``fp8`` ±448 to the largest magnitude.
    """

    int8: float
    fp8: float
    method: str
    range: tuple[float, float]  # smallest and largest observed value
    samples: int
    histogram: str  # SHA-256

    def scale_for(self, kind: str) -> float:
        """Return the scale of a precision kind, ``int8`` or ``fp8``."""
        return self.int8 if kind == "int8" else self.fp8


@dataclass(frozen=True)
class TunedWeight:
    """Codes (see ``quantize_weight``) and scale of a weight that GPTQ quantized for a precision."""

    precision: str
    codes: np.ndarray
    scale: np.ndarray


@dataclass
class ScaleTable:
    """Scales by layer.

    ``caches``: attention → ``key`` and ``value`` → largest magnitude per head ``[Hkv]``.
    ``smoothing``: producer (see ``calibration.folding``) → factors ``[C]``. ``tuned``: layer →
    weight. ``tuned_for`` is the precision plan for which the last two were made.
    """

    checkpoint: str  # SHA-256
    data: str  # SHA-256 over the digests of all samples
    samples: int
    activations: dict[str, ActivationScale] = field(default_factory=dict)
    caches: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    smoothing: dict[str, np.ndarray] = field(default_factory=dict)
    tuned: dict[str, TunedWeight] = field(default_factory=dict)
    tuned_for: str | None = None

    def activation_scale(self, layer: str, kind: str) -> float:
        """Return the scale of a layer's input for a precision kind, ``int8`` or ``fp8``.

        Raises:
            UserError: the table has no such scale.
        """
        if layer not in self.activations:
            raise UserError(
                f"The scale table has no scale for the input of {layer}; calibrate again, or keep that layer"
                " in float."
            )
        return self.activations[layer].scale_for(kind)

    def cache_scales(self, attention: str, state: str, kind: str) -> np.ndarray:
        """Return the scales ``[Hkv]`` of a cache; ``state`` is ``key`` or ``value``.

        Raises:
            UserError: the table has no such scales.
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
            "version": TABLE_VERSION,
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
        """SHA-256 over the content of both files."""
        vectors = hashlib.sha256(serialize(self._vectors())).hexdigest()
        return sha256_of_text(json.dumps(self._document(vectors), sort_keys=True))

    def save(self, folder: Path) -> None:
        """Write both files; the JSON file last, because it marks the table as complete."""
        folder.mkdir(parents=True, exist_ok=True)
        vectors = serialize(self._vectors())
        (folder / VECTORS_FILE).write_bytes(vectors)
        write_json(folder / TABLE_FILE, self._document(hashlib.sha256(vectors).hexdigest()))

    @classmethod
    def load(cls, folder: Path) -> ScaleTable:
        """Read and check a table.

        Args:
            folder: the folder, or its ``scales.json``.

        Raises:
            UserError: a file is missing or damaged, or a scale is not a positive number.
        """
        file = folder / TABLE_FILE if folder.is_dir() else folder
        if not file.is_file():
            raise UserError(f"There is no scale table {file}; make one with 'dsvl-export calibrate'.")
        raw = read_json(file)
        if raw.get("version") != TABLE_VERSION:
            raise UserError(
                f"{file} has version {raw.get('version')!r}, this release reads {TABLE_VERSION};"
                " calibrate again."
            )
        vectors_file = file.parent / VECTORS_FILE
        try:
            if sha256_of_file(vectors_file) != raw["vectors"]["sha256"]:
                raise UserError(
                    f"{vectors_file} is not the file that {file} was written with; calibrate again."
                )
            return _parse_table(raw, load_file(vectors_file))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"The scale table {file} is not valid: {str(error).strip(chr(39))}.") from error


def _parse_table(raw: Mapping[str, Any], vectors: Mapping[str, np.ndarray]) -> ScaleTable:
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
