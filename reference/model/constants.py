"""Buffers that follow from a config alone: RoPE tables, resize matrices, index tables.

A model built on the meta device has no values; these are the ones no checkpoint can give back.
"""

from __future__ import annotations

from torch import Tensor, nn


class ConstantModule(nn.Module):
    """A module with constant buffers that can be computed again at any time."""

    def constants(self) -> dict[str, Tensor]:
        """Buffer name → value, computed on the current default device."""
        raise NotImplementedError

    def register_constants(self) -> None:
        """(Re)register the buffers of this module, outside its state dict."""
        for name, value in self.constants().items():
            self.register_buffer(name, value, persistent=False)


def materialise_constants(model: nn.Module) -> None:
    """Give a model that was built on the meta device the values of all its constants."""
    for module in model.modules():
        if isinstance(module, ConstantModule):
            module.register_constants()
