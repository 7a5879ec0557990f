"""The reference with the rounding of a lower precision, in fp32 arithmetic.

Weights, the inputs of each component and the output of every module are rounded to the precision's
dtype. What then differs from the reference is what the precision costs by itself, on any backend.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reference.checkpoint import Checkpoint
from reference.session import reference_chain
from reference.trace import PRECISION_DTYPES
from runtimes.chain import Chain


def rounded_chain(checkpoint: Checkpoint, embedding_file: Path, precision: str) -> Chain:
    """A debug build of the reference (its sessions give taps), rounded to a key of ``PRECISION_DTYPES``."""
    dtype = PRECISION_DTYPES[precision]

    def rounded(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(rounded(part) for part in value)
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(dtype).to(torch.float32)
        return value

    model = checkpoint.model(rounded_to=dtype)
    for component in (model.vision_encoder, model.adaptor, model.decoder):
        component.register_forward_pre_hook(lambda _, args: rounded(args))
    for module in model.modules():
        module.register_forward_hook(lambda _, args, output: rounded(output))
    return reference_chain(checkpoint, embedding_file, model, tapped=True)
