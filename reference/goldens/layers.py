"""Recording layer goldens with PyTorch; see ``runtimes.goldens.layers``."""

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
from reference.taps import component_taps, recorded
from reference.trace import component_contract
from runtimes.bundle.contracts import Contract
from runtimes.chain import Chain
from runtimes.goldens.golden import Golden
from runtimes.goldens.layers import MIN_ROWS, STATELESS, TOKENS, LayerInputs, Table, sample_rows
from runtimes.goldens.taps import SAMPLES, TAPPED_COMPONENTS
from runtimes.preprocess import to_pixel_values


def component_inputs(chain: Chain, golden: Golden) -> Table:
    """What the components of a golden are given, float16; of the decoder's tokens the first and the last."""
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
        component: {name: _halves(array) for name, array in table.items()}
        for component, table in inputs.items()
    }


def record_layer_inputs(source: Checkpoint, model: DeepSeekVL, chain: Chain, golden: Golden) -> LayerInputs:
    """The inputs of a golden and the taps of the fp32 reference on them."""
    inputs = component_inputs(chain, golden)
    bare = LayerInputs(source.digest, inputs, {component: {} for component in TAPPED_COMPONENTS})
    taps = layer_taps(model, source.config, bare, torch.float32)
    halves = {
        component: {name: _halves(tensor.numpy()) for name, tensor in table.items()}
        for component, table in taps.items()
    }
    return LayerInputs(source.digest, inputs, halves)


def component_outputs(model: DeepSeekVL, config: ModelConfig, given: LayerInputs, base: torch.dtype) -> Table:
    """What the components without states make of their inputs; rows of each output, see ``sample_rows``.

    Args:
        base: as in ``layer_outputs``.
    """
    found: Table = {}
    for component in STATELESS:
        contract = component_contract(config, component, "fp32")
        with torch.inference_mode():
            outputs = getattr(model, component)(*_arguments(contract, given.inputs[component], base))
        tensors = outputs if isinstance(outputs, tuple) else (outputs,)
        found[component] = {
            spec.name: sample_rows(tensor.float().numpy())
            for spec, tensor in zip(contract.outputs, tensors, strict=True)
        }
    return found


def layer_outputs(
    model: DeepSeekVL, config: ModelConfig, given: LayerInputs, base: torch.dtype, kv_cache: str = "float"
) -> Table:
    """What each layer of a model gives when it is handed the given taps; rows of it, see ``sample_rows``.

    Args:
        base: what the model's weights and activations are rounded to.
    """
    taps = layer_taps(model, config, given, base, kv_cache)
    return {
        component: {name: sample_rows(tensor.numpy()) for name, tensor in table.items()}
        for component, table in taps.items()
    }


def layer_taps(
    model: DeepSeekVL,
    config: ModelConfig,
    given: LayerInputs,
    base: torch.dtype,
    kv_cache: str = "float",
    components: Sequence[str] = TAPPED_COMPONENTS,
) -> dict[str, dict[str, Tensor]]:
    """As ``layer_outputs``, whole tensors ``[...]`` float32."""
    found = {}
    for component in components:
        contract = component_contract(config, component, "fp32", kv_cache)
        handed = {name: _rounded(array, base) for name, array in given.taps[component].items()}
        arguments = _arguments(contract, given.inputs[component], base)
        taps = component_taps(config, component)
        with torch.inference_mode(), recorded(getattr(model, component), taps, handed) as table:
            getattr(model, component)(*arguments)
        found[component] = {name: tensor.float() for name, tensor in table.items()}
    return found


def _halves(array: np.ndarray) -> np.ndarray:
    """As float16; what is larger than that holds becomes its largest number."""
    most = np.finfo(np.float16).max
    return array.clip(-most, most).astype(np.float16)


def _rounded(array: np.ndarray, base: torch.dtype) -> Tensor:
    return torch.from_numpy(array.astype(np.float32)).to(base).float()


def _arguments(contract: Contract, inputs: Mapping[str, np.ndarray], base: torch.dtype) -> list[Any]:
    if not contract.states:
        return [_rounded(inputs[spec.name], base) for spec in contract.inputs]
    embeds = _rounded(inputs["inputs_embeds"], base)
    count = embeds.shape[1]
    rows = torch.arange(count)
    sizes = {"batch": 1, "capacity": count}
    states = [torch.from_numpy(spec.allocate(sizes)) for spec in contract.states]
    return [embeds, rows[None], rows, states]


def layer_golden_bytes(config: ModelConfig) -> tuple[int, int]:
    """The most bytes of the inputs with the reference's outputs, and of the outputs of one precision."""
    sizes = {"batch": 1, "sequence": TOKENS, "rows": TOKENS}
    contracts = [component_contract(config, component, "fp32") for component in TAPPED_COMPONENTS]
    shapes = [
        [dim if isinstance(dim, int) else sizes[dim] for dim in spec.shape]
        for contract in contracts
        for spec in contract.taps
    ]
    handed = 2 * sum(map(math.prod, shapes))
    given = 2 * sum(
        math.prod(dim if isinstance(dim, int) else sizes[dim] for dim in spec.shape)
        for contract in contracts
        for spec in contract.inputs
    )
    shapes += [
        [dim if isinstance(dim, int) else sizes[dim] for dim in spec.shape]
        for contract in contracts
        if contract.component in STATELESS
        for spec in contract.outputs
    ]
    outputs = 4 * sum(max(SAMPLES, MIN_ROWS * shape[-1]) for shape in shapes)
    return handed + given + outputs, outputs
