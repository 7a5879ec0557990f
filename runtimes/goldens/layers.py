"""Layer goldens: what each layer of the reference gives when it is handed recorded inputs.

Every tap is a border between layers. A layer is handed the recorded tap before it, not what the layer before
it computed, so that errors do not add up, and roundings of quantized layers that fall the other way do not
spread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from runtimes.bundle.tensor_files import save_tensors
from runtimes.errors import UserError
from runtimes.goldens.taps import SAMPLES, TAPPED_COMPONENTS

TOKENS = 128  # of the decoder: the first and the last ones of a golden
MIN_ROWS = 4
STATELESS = ("vision_encoder", "adaptor")  # components that are judged as a whole as well
Table = dict[str, dict[str, np.ndarray]]  # component → name → values


@dataclass(frozen=True)
class LayerInputs:
    """Inputs of components and taps between layers, all float16: every precision takes them exactly.

    ``inputs`` are the components' own, by the contract's names, ``taps`` what layers are handed.
    """

    checkpoint: str
    inputs: Table
    taps: Table


def save_tables(file: Path, checkpoint: str, tables: Mapping[str, Table]) -> None:
    tensors = {
        f"{kind}/{component}/{name}": array
        for kind, table in tables.items()
        for component, arrays in table.items()
        for name, array in arrays.items()
    }
    save_tensors(tensors, file, {"checkpoint": checkpoint})


def load_tables(file: Path, checkpoint: str) -> dict[str, Table]:
    """Raises UserError where the file cannot be read or is of another checkpoint."""
    tables: dict[str, Table] = {}
    try:
        with safe_open(file, framework="np") as handle:
            recorded = (handle.metadata() or {}).get("checkpoint")
            for path in handle.keys():
                kind, component, name = path.split("/", 2)
                tables.setdefault(kind, {}).setdefault(component, {})[name] = handle.get_tensor(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{file} cannot be read as layer goldens ({error}); export the bundle again."
        ) from error
    if recorded != checkpoint or not all(set(table) <= set(TAPPED_COMPONENTS) for table in tables.values()):
        raise UserError(f"{file} holds no layer goldens of the bundle's checkpoint; export the bundle again.")
    return tables


def sample_rows(array: np.ndarray) -> np.ndarray:
    """Rows ``[rows, C]`` of an array ``[..., C]``, evenly spread, all channels of each."""
    flat = array.reshape(-1, array.shape[-1])
    rows = min(max(SAMPLES // flat.shape[1], MIN_ROWS), len(flat))
    return flat[np.unique(np.linspace(0, len(flat) - 1, rows).astype(np.int64))].astype(np.float32)
