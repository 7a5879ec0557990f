"""LoRA adapters merged into a checkpoint's parameters while these are read, one tensor at a time.

Formulas: LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353 (a magnitude per output channel).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from reference.checkpoint.layouts import Shape
from reference.checkpoint.lora_adapter import Adapter, AdapterChoice, Change
from reference.model.config import ModelConfig
from runtimes.errors import UserError


class Adapters:
    """The adapters that are merged into a checkpoint, in the order in which they were named.

    Args:
        choices: the adapters.
        config: of the base model.
        shapes: parameter name → shape, as in ``DeepSeekVL.named_parameters()``.

    Raises:
        UserError: one cannot be read or does not fit.
    """

    def __init__(
        self, choices: Sequence[AdapterChoice], config: ModelConfig, shapes: Mapping[str, Shape]
    ) -> None:
        """Read the adapters and group their changes by parameter."""
        self.adapters = [Adapter(choice, config, shapes) for choice in choices]
        self._changes: dict[str, list[tuple[Adapter, Change]]] = {}
        for adapter in self.adapters:
            for change in adapter.changes:
                self._changes.setdefault(change.target.parameter, []).append((adapter, change))

    def identity(self) -> list[str]:
        """Return the SHA-256 of all files, each with the weight of its adapter."""
        return [line for adapter in self.adapters for line in adapter.identity()]

    def __contains__(self, parameter: str) -> bool:
        """Return whether an adapter changes a parameter."""
        return parameter in self._changes

    def merge(self, parameter: str, tensor: Tensor) -> Tensor:
        """Return a parameter with all changes.

        Args:
            parameter: its name, as in ``DeepSeekVL.named_parameters()``.
            tensor: its value in the checkpoint, of any floating-point type.

        Returns:
            float32 if an adapter changes it: half precision would lose small changes.

        Raises:
            UserError: an adapter's tensor holds NaN or infinity.
        """
        if parameter not in self._changes:
            return tensor
        base, merged = (tensor.to(torch.float32, copy=True) for _ in range(2))
        for adapter, change in self._changes[parameter]:
            rows = change.target.rows(len(base))
            if change.replacement:
                base[rows] = merged[rows] = adapter.load(change.replacement).reshape(base[rows].shape)
            else:
                merged[rows] = _apply(adapter, change, base[rows], merged[rows])
        return merged

    def check(self) -> None:
        """Check that the adapters can be merged together.

        Raises:
            UserError: two adapters change a tensor that one replaces, or scale one layer
                differently without weights.
        """
        for changes in self._changes.values():
            for position, (first, one) in enumerate(changes):
                for second, other in changes[position + 1 :]:
                    if first is second or one.target != other.target:
                        continue
                    if one.replacement or other.replacement:
                        raise UserError(
                            f"The adapters {first.folder} and {second.folder} both change {one.module}, and"
                            " one replaces it; merge one adapter at a time."
                        )
                    if one.scaling != other.scaling and None in (first.weight, second.weight):
                        raise UserError(
                            f"The adapters {first.folder} and {second.folder} scale {one.module} differently"
                            f" ({one.scaling:g} and {other.scaling:g}); give each a weight, as in"
                            f" --adapter {first.folder}=1 --adapter {second.folder}=1."
                        )


def _apply(adapter: Adapter, change: Change, base: Tensor, merged: Tensor) -> Tensor:
    """Return the rows of one tensor after one more change.

    Args:
        adapter: the adapter.
        change: its change.
        base: the checkpoint's values, whose norm DoRA takes.
        merged: the same with the changes so far.
    """
    factor = change.scaling * adapter.factor
    assert change.up
    up = adapter.load(change.up)
    if change.down is None:  # a bias
        return merged + factor * up
    delta = up.flatten(1) @ adapter.load(change.down).flatten(1)  # [outputs, inputs]
    delta = factor * (delta.T if change.embedding else delta).reshape(base.shape)
    if change.magnitude is None:
        return merged + delta
    magnitude = adapter.load(change.magnitude).flatten()
    if change.embedding:  # one per column of the table
        return (merged + delta) * (magnitude / (base + delta).norm(dim=0))
    norm = (base + delta).flatten(1).norm(dim=1)
    return (merged + delta) * (magnitude / norm).reshape(-1, *[1] * (base.dim() - 1))
