"""Constant buffers, computed from a config: RoPE tables, resize matrices, index tables.

A model built on the meta device has no values. Checkpoints do not store these buffers, so they are
computed after the weights are loaded.
"""

from __future__ import annotations

from torch import Tensor, nn


class ConstantModule(nn.Module):
    """A module with constant buffers that can be recomputed at any time."""

    def constants(self) -> dict[str, Tensor]:
        """Compute the buffers on the current default device; returns name → value."""
        raise NotImplementedError

    def register_constants(self) -> None:
        """Register the buffers again, outside the state dict."""
        for name, value in self.constants().items():
            self.register_buffer(name, value, persistent=False)


def materialize_constants(model: nn.Module) -> None:
    """Compute all constant buffers of a model that was built on the meta device."""
    for module in model.modules():
        if isinstance(module, ConstantModule):
            module.register_constants()
