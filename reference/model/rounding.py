"""The reference with the rounding of a lower precision, in fp32 arithmetic.

Its difference from the fp32 reference is the rounding error of the precision, on any backend.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reference.model.deepseek_vl import DeepSeekVL


def round_model(model: DeepSeekVL, dtype: torch.dtype) -> None:
    """Make an fp32 model round the inputs of its components and the outputs of its modules.

    Weights are not rounded.
    """

    def rounded(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(rounded(part) for part in value)
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(dtype).to(torch.float32)
        return value

    for component in (model.vision_encoder, model.adaptor, model.decoder):
        component.register_forward_pre_hook(lambda _, args: rounded(args))
    for module in model.modules():
        module.register_forward_hook(lambda _, args, output: rounded(output))
