"""The reference model with a precision plan's quantization and rounding, in PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
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
    """Build the model of a precision plan, in fp32 arithmetic.

    Every layer computes with its dequantized weights. With a base of half precision, weights, the
    inputs of each component and the output of every module are rounded.
    """
    dtype = PRECISION_DTYPES[weights.plan.base]
    model = weights.source.load_model(
        load=lambda name: weights.load(name).to(dtype), prepare=partial(quantize_model, plan=weights.plan)
    )
    if dtype != torch.float32:
        round_model(model, dtype)
    return model


def planned_chain(weights: QuantizedWeights, embedding_file: Path, tapped: bool = False) -> Chain:
    """Build the runtime's chain on ``planned_model``.

    Args:
        weights: the checkpoint's weights under the plan.
        embedding_file: the table that ``write_token_embedding`` wrote.
        tapped: return taps, as the sessions of a debug build do.
    """
    model = planned_model(weights)
    return reference_chain(weights.source, embedding_file, model, tapped, weights.plan.kv_cache)


def mixed_chain(weights: Mapping[str, QuantizedWeights], embedding_file: Path, tapped: bool = False) -> Chain:
    """Build a chain whose components have plans of their own.

    Args:
        weights: component → the checkpoint's weights under the component's plan.
        embedding_file: as in ``planned_chain``.
        tapped: as in ``planned_chain``.
    """
    plans = {item.plan.name: item for item in weights.values()}
    chains = {name: planned_chain(item, embedding_file, tapped) for name, item in plans.items()}
    chain = copy.copy(chains[weights["decoder"].plan.name])
    for component, item in weights.items():
        setattr(chain, component, getattr(chains[item.plan.name], component))
    return chain
