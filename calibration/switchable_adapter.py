"""LoRA adapters that stay beside the weights: their matrices, for a decoder in some precision.

A linear layer computes ``W x + B A x`` (arXiv 2106.09685). The scaling of the adapter and its
weight are in B. Where smoothing factors are folded into W, they are folded into A and B as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from calibration.quantized_weights import FoldedFactors
from calibration.scale_table import TABLE_FILE, ScaleTable
from reference.checkpoint.folder_content import join_names
from reference.checkpoint.lora_adapter import Adapter, AdapterChoice, Change
from reference.model.config import ModelConfig
from reference.trace import PRECISION_DTYPES
from runtimes.errors import UserError

DECODER = "decoder."
Matrices = tuple[np.ndarray, np.ndarray]  # [in, r] and [r, out]


def open_switchable(
    choice: AdapterChoice, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> Adapter:
    """Read an adapter that only changes linear layers of the decoder, by LoRA.

    Args:
        choice: the adapter.
        config: of the base model.
        shapes: parameter name → shape, as in ``DeepSeekVL.named_parameters()``.

    Raises:
        UserError: it cannot be read, does not fit, holds NaN, or has to be merged into the weights.
    """
    adapter = Adapter(choice, config, shapes)
    others = sorted({_describe(change) for change in adapter.changes if not _is_switchable(change)})
    if others:
        raise UserError(
            f"The adapter {adapter.folder} cannot be switched: it changes {join_names(others)}, but only LoRA"
            " of linear layers of the decoder can; merge it into the weights with 'dsvl-export export"
            f" --adapter {adapter.folder}'."
        )
    for change in adapter.changes:
        for name in (change.down, change.up):
            adapter.load(str(name))  # refuses NaN
    return adapter


def _is_switchable(change: Change) -> bool:
    is_lora = change.down is not None and change.magnitude is None and not change.embedding
    return is_lora and change.target.parameter.startswith(DECODER)


def _describe(change: Change) -> str:
    name = change.target.parameter.removesuffix(".weight")
    if change.magnitude:
        return f"{name} (DoRA)"
    return f"{name} (replaced)" if change.replacement else name


def layer_matrices(
    adapter: Adapter, config: ModelConfig, scales: Path, base: str
) -> Iterator[tuple[str, Matrices]]:
    """Yield the decoder's layers that an adapter changes, each with its matrices.

    Args:
        adapter: an adapter of ``open_switchable``.
        config: of the base model.
        scales: folder of the scale table of the decoder's precision; it may be missing.
        base: precision of the decoder's tensors that are not quantized.

    Yields:
        name of the layer in the decoder, and its matrices in the base's dtype.

    Raises:
        UserError: a value exceeds the range of the base.
    """
    smoothing = ScaleTable.load(scales).smoothing if (scales / TABLE_FILE).exists() else {}
    factors = FoldedFactors(config, smoothing)
    for change in adapter.changes:
        layer = change.target.parameter.removesuffix(".weight")
        down = factors.fold_inputs(layer, adapter.load(str(change.down)))
        up = change.scaling * adapter.factor * factors.fold_outputs(layer, adapter.load(str(change.up)))
        stored = [matrix.T.to(PRECISION_DTYPES[base]).contiguous() for matrix in (down, up)]
        if not all(bool(torch.isfinite(matrix).all()) for matrix in stored):
            remedy = "give it a smaller weight" if base == "fp32" else "use a bundle whose base is fp32"
            raise UserError(f"The adapter {adapter.folder} exceeds the range of {base} in {layer}; {remedy}.")
        yield layer.removeprefix(DECODER), (stored[0].numpy(), stored[1].numpy())


def matrix_bytes(adapter: Adapter, base: str) -> int:
    """Return the bytes of all matrices."""
    size = PRECISION_DTYPES[base].itemsize
    return size * sum(adapter.rank(change.module) * sum(change.target.shape) for change in adapter.changes)
