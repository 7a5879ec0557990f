"""A model whose weights stay in the files: a module's are loaded only while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from reference.checkpoint.layouts import Shape
from reference.model.deepseek_vl import DeepSeekVL


def stream_weights(model: DeepSeekVL, load: Callable[[str], Tensor]) -> None:
    """Add hooks that load a module's own parameters before it runs and free them afterward.

    Buffers are reused by the next module with the same shapes: allocating memory takes longer than
    reading the weights.
    """
    free_buffers: dict[Shape, list[Tensor]] = {}

    def add_hooks(module: nn.Module, prefix: str) -> None:
        meta_parameters = dict(module.named_parameters(recurse=False))

        def load_parameters(module: nn.Module, args: Any) -> None:
            for name, parameter in meta_parameters.items():
                buffers = free_buffers.get(tuple(parameter.shape))
                with torch.inference_mode(False):  # an inference tensor is unusable in other modes
                    buffer = buffers.pop() if buffers else torch.empty_like(parameter, device="cpu")
                value = buffer.copy_(load(f"{prefix}{name}"))
                setattr(module, name, nn.Parameter(value, requires_grad=False))

        def free_parameters(module: nn.Module, args: Any, output: Any) -> None:
            for name, parameter in meta_parameters.items():
                loaded = getattr(module, name)
                if loaded is not parameter:  # it still is the meta parameter if loading failed
                    free_buffers.setdefault(tuple(parameter.shape), []).append(loaded.data)
                    setattr(module, name, parameter)

        if meta_parameters:
            module.register_forward_pre_hook(load_parameters)
            module.register_forward_hook(free_parameters, always_call=True)

    for path, module in model.named_modules():
        add_hooks(module, f"{path}." if path else "")
