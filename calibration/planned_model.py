"""What a precision plan computes, in PyTorch: the reference with the plan's quantization and rounding."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from calibration.quantized_program import quantize_model
from calibration.quantized_weights import QuantizedWeights
from reference.model.deepseek_vl import DeepSeekVL
from reference.model.rounding import round_model
from reference.session import reference_chain
from reference.trace import PRECISION_DTYPES
from runtimes.chain import Chain


def planned_model(weights: QuantizedWeights) -> DeepSeekVL:
    """The model that a plan makes of a checkpoint, in fp32 arithmetic.

    Every layer computes with what its codes stand for. A base of half precision rounds weights, the inputs
    of each component and the output of every module.
    """
    dtype = PRECISION_DTYPES[weights.plan.base]
    model = weights.source.load_model(
        load=lambda name: weights.load(name).to(dtype), prepare=partial(quantize_model, plan=weights.plan)
    )
    if dtype != torch.float32:
        round_model(model, dtype)
    return model


def planned_chain(weights: QuantizedWeights, embedding_file: Path, tapped: bool = False) -> Chain:
    """``planned_model`` behind the runtime's chain; ``tapped`` as a debug build, whose sessions give taps."""
    model = planned_model(weights)
    return reference_chain(weights.source, embedding_file, model, tapped, weights.plan.kv_cache)
