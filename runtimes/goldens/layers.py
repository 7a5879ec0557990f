"""Layer goldens: the output of each layer of the reference for recorded inputs.

Taps are the tensors between layers. Each layer gets the recorded tap before it as input, not the
output of the previous layer, so that errors do not add up, and a quantized layer that rounds
differently does not affect the next ones.
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

TOKENS = 128  # of the decoder: the first and the last tokens of a golden
MIN_ROWS = 4
STATELESS = ("vision_encoder", "adaptor")  # components that are also compared as a whole
Table = dict[str, dict[str, np.ndarray]]  # component → name → values


@dataclass(frozen=True)
class LayerInputs:
    """Inputs of components and layers, in float16, which every precision represents exactly.

    Args:
        checkpoint: SHA-256 of the checkpoint.
        inputs: inputs of the components, by the contract's names.
        taps: inputs of layers, by the names of the taps.
    """

    checkpoint: str
    inputs: Table
    taps: Table


def save_tables(file: Path, checkpoint: str, tables: Mapping[str, Table]) -> None:
    """Write tables of tensors and the SHA-256 of their checkpoint as safetensors."""
    tensors = {
        f"{kind}/{component}/{name}": array
        for kind, table in tables.items()
        for component, arrays in table.items()
        for name, array in arrays.items()
    }
    save_tensors(tensors, file, {"checkpoint": checkpoint})


def load_tables(file: Path, checkpoint: str) -> dict[str, Table]:
    """Read tables that ``save_tables`` wrote.

    Raises:
        UserError: the file is not readable or belongs to another checkpoint.
    """
    tables: dict[str, Table] = {}
    try:
        with safe_open(file, framework="np") as handle:
            recorded = (handle.metadata() or {}).get("checkpoint")
            for path in handle.keys():
                kind, component, name = path.split("/", 2)
                tables.setdefault(kind, {}).setdefault(component, {})[name] = handle.get_tensor(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{file} does not hold readable layer goldens ({error}); export the bundle again."
        ) from error
    if recorded != checkpoint or not all(set(table) <= set(TAPPED_COMPONENTS) for table in tables.values()):
        raise UserError(
            f"{file} does not hold layer goldens of the bundle's checkpoint; export the bundle again."
        )
    return tables


def sample_rows(array: np.ndarray) -> np.ndarray:
    """Sample evenly spaced rows ``[rows, C]`` of an array ``[..., C]``, with all channels."""
    flat = array.reshape(-1, array.shape[-1])
    rows = min(max(SAMPLES // flat.shape[1], MIN_ROWS), len(flat))
    return flat[np.unique(np.linspace(0, len(flat) - 1, rows).astype(np.int64))].astype(np.float32)
