"""Recorder of layer goldens with PyTorch; see ``runtimes.goldens.layers``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reference.checkpoint.checkpoint import Checkpoint
from reference.model.config import ModelConfig
from reference.model.deepseek_vl import DeepSeekVL
from reference.taps import component_taps, record_taps
from reference.trace import component_contract
from runtimes.bundle.contracts import Contract
from runtimes.chain import Chain
from runtimes.goldens.golden import Golden
from runtimes.goldens.layers import MIN_ROWS, STATELESS, TOKENS, LayerInputs, Table, sample_rows
from runtimes.goldens.taps import SAMPLES, TAPPED_COMPONENTS
from runtimes.preprocess import to_pixel_values


def component_inputs(chain: Chain, golden: Golden) -> Table:
    """Return the float16 inputs of each component for a golden's prompt.

    The decoder gets at most ``TOKENS`` tokens: the first and the last of the prompt.
    """
    pixels = to_pixel_values(golden.squares[0], chain.preprocessing)[None]
    embeds = chain.merge(golden.prompt_tokens, golden.image_embeds)
    if len(embeds) > TOKENS:
        embeds = np.concatenate([embeds[: TOKENS // 2], embeds[-TOKENS // 2 :]])
    features = {spec.name: golden.features[spec.name][:1] for spec in chain.adaptor.contract.inputs}
    inputs = {
        "vision_encoder": {"pixel_values": pixels},
        "adaptor": features,
        "decoder": {"inputs_embeds": embeds[None]},
    }
    return {
        component: {name: _to_float16(array) for name, array in table.items()}
        for component, table in inputs.items()
    }


def record_layer_inputs(source: Checkpoint, model: DeepSeekVL, chain: Chain, golden: Golden) -> LayerInputs:
    """Record the inputs of each component for a golden, and the fp32 reference's taps on them."""
    inputs = component_inputs(chain, golden)
    without_taps = LayerInputs(source.digest, inputs, {component: {} for component in TAPPED_COMPONENTS})
    taps = layer_taps(model, source.config, without_taps, torch.float32)
    float16_taps = {
        component: {name: _to_float16(tensor.numpy()) for name, tensor in table.items()}
        for component, table in taps.items()
    }
    return LayerInputs(source.digest, inputs, float16_taps)


def component_outputs(
    model: DeepSeekVL, config: ModelConfig, layer_inputs: LayerInputs, base: torch.dtype
) -> Table:
    """Run the components without states; returns rows of each output, see ``sample_rows``.

    Args:
        model: the reference model, possibly rounded or quantized.
        config: its config.
        layer_inputs: inputs of each component.
        base: dtype to which the inputs are rounded, the base precision of the model.
    """
    sampled: Table = {}
    for component in STATELESS:
        contract = component_contract(config, component, "fp32")
        with torch.inference_mode():
            outputs = getattr(model, component)(*_arguments(contract, layer_inputs.inputs[component], base))
        tensors = outputs if isinstance(outputs, tuple) else (outputs,)
        sampled[component] = {
            spec.name: sample_rows(tensor.float().numpy())
            for spec, tensor in zip(contract.outputs, tensors, strict=True)
        }
    return sampled


def layer_outputs(
    model: DeepSeekVL,
    config: ModelConfig,
    layer_inputs: LayerInputs,
    base: torch.dtype,
    kv_cache: str = "float",
) -> Table:
    """Run each layer on the recorded input; returns rows of each output, see ``sample_rows``.

    Args:
        model: the reference model, possibly rounded or quantized.
        config: its config.
        layer_inputs: inputs of each component, and the taps that replace the inputs of each layer.
        base: dtype to which inputs and taps are rounded, the base precision of the model.
        kv_cache: precision of the cache.
    """
    taps = layer_taps(model, config, layer_inputs, base, kv_cache)
    return {
        component: {name: sample_rows(tensor.numpy()) for name, tensor in table.items()}
        for component, table in taps.items()
    }


def layer_taps(
    model: DeepSeekVL,
    config: ModelConfig,
    layer_inputs: LayerInputs,
    base: torch.dtype,
    kv_cache: str = "float",
    components: Sequence[str] = TAPPED_COMPONENTS,
) -> dict[str, dict[str, Tensor]]:
    """Run each layer as ``layer_outputs`` does; returns complete taps, float32, by component."""
    outputs = {}
    for component in components:
        contract = component_contract(config, component, "fp32", kv_cache)
        replacements = {name: _round_to(array, base) for name, array in layer_inputs.taps[component].items()}
        arguments = _arguments(contract, layer_inputs.inputs[component], base)
        taps = component_taps(config, component)
        with torch.inference_mode(), record_taps(getattr(model, component), taps, replacements) as table:
            getattr(model, component)(*arguments)
        outputs[component] = {name: tensor.float() for name, tensor in table.items()}
    return outputs


def _to_float16(array: np.ndarray) -> np.ndarray:
    """Convert to float16, saturated at its largest number."""
    limit = np.finfo(np.float16).max
    return array.clip(-limit, limit).astype(np.float16)


def _round_to(array: np.ndarray, base: torch.dtype) -> Tensor:
    """Round to a dtype, as float32."""
    return torch.from_numpy(array.astype(np.float32)).to(base).float()


def _arguments(contract: Contract, inputs: Mapping[str, np.ndarray], base: torch.dtype) -> list[Any]:
    """Build the arguments of a component's ``forward`` from its float inputs."""
    if not contract.states:
        return [_round_to(inputs[spec.name], base) for spec in contract.inputs]
    embeds = _round_to(inputs["inputs_embeds"], base)
    count = embeds.shape[1]
    rows = torch.arange(count)
    sizes = {"batch": 1, "capacity": count}
    states = [torch.from_numpy(spec.allocate(sizes)) for spec in contract.states]
    return [embeds, rows[None], rows, states]


def layer_golden_bytes(config: ModelConfig) -> tuple[int, int]:
    """Estimate the largest files of the layer goldens, headers left out.

    Returns:
        Bytes of the inputs and the reference's outputs, and of the outputs of one precision.
    """
    sizes = {"batch": 1, "sequence": TOKENS, "rows": TOKENS}
    contracts = [component_contract(config, component, "fp32") for component in TAPPED_COMPONENTS]
    shapes = [spec.sized(sizes) for contract in contracts for spec in contract.taps]
    tap_bytes = 2 * sum(map(math.prod, shapes))
    input_bytes = 2 * sum(math.prod(spec.sized(sizes)) for contract in contracts for spec in contract.inputs)
    shapes += [
        spec.sized(sizes)
        for contract in contracts
        if contract.component in STATELESS
        for spec in contract.outputs
    ]
    output_bytes = 4 * sum(max(SAMPLES, MIN_ROWS * shape[-1]) for shape in shapes)
    return tap_bytes + input_bytes + output_bytes, output_bytes
