"""Tracer of each component to a ``torch.export.ExportedProgram``, without its weights.

Components are built with fake parameters (shapes and dtypes, no memory), so tracing the 7B takes as
little memory as tracing ``tiny``; compilers read the values from the checkpoint later. The programs
are high-level ATen; ``dsvl::cached_attention`` is not decomposed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram

from reference.model.config import ModelConfig
from reference.model.constants import materialize_constants
from reference.model.decoder import Decoder
from reference.model.vision import Adaptor, VisionEncoder
from reference.taps import Tap, component_taps
from runtimes.bundle.contracts import Contract, TensorSpec
from runtimes.bundle.mixes import COMPONENTS

TRACED_COMPONENTS = COMPONENTS
PRECISION_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# numpy has no bfloat16: components that compute in it take and return float32, and store keys and
# values in float16, which has more precision and enough range for them.
IO_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "float32"}
FLOAT_CACHE_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "float16"}
CACHE_DTYPES = {"int8": "int8", "fp8": "uint8"}  # numpy has no float8; uint8 holds its bits


@dataclass(frozen=True)
class TracedComponent:
    """A component's program, the contract under which it was traced, and its taps.

    The program's user inputs are the contract's inputs, then its states, in order;
    ``reference.taps.tap_nodes`` finds the nodes of the taps. In bf16 the program's floats are
    bfloat16 where the contract says float32; compilers cast its inputs and outputs.
    """

    program: ExportedProgram
    contract: Contract
    taps: tuple[Tap, ...] = ()


def component_contract(
    config: ModelConfig, component: str, precision: str, kv_cache: str = "float"
) -> Contract:
    """Build the contract of a component.

    Dtypes are those of ``IO_DTYPES``, ``FLOAT_CACHE_DTYPES`` and ``CACHE_DTYPES``; logits are
    float32.

    Args:
        config: the model's sizes.
        component: one of ``TRACED_COMPONENTS``.
        precision: a key of ``PRECISION_DTYPES``.
        kv_cache: ``float``, or the precision of a quantized cache.
    """
    dtype = IO_DTYPES[precision]
    vision, decoder = config.vision, config.decoder
    side, tokens = vision.image_size, vision.image_tokens
    low = TensorSpec("low_features", dtype, ("batch", tokens, vision.siglip.width), "SigLIP features")
    features: tuple[TensorSpec, ...] = (low,)
    if vision.sam:
        width = vision.sam.downsample_widths[-1]
        features = (TensorSpec("high_features", dtype, ("batch", tokens, width), "SAM features"), low)
    taps = tuple(
        TensorSpec(tap.name, dtype, tap.shape, f"{'read by' if tap.is_input else 'output of'} {tap.module}")
        for tap in component_taps(config, component)
    )
    if component == "vision_encoder":
        pixels = "preprocessed RGB pixels, see the preprocessing spec"
        return Contract(
            component,
            (TensorSpec("pixel_values", dtype, ("batch", 3, side, side), pixels),),
            features,
            taps=taps,
        )
    if component == "adaptor":
        shape = ("batch", tokens, decoder.width)
        embeds = TensorSpec("image_embeds", dtype, shape, "image tokens in the decoder's width")
        return Contract(component, features, (embeds,), taps=taps)
    cache_shape = ("batch", decoder.kv_heads, "capacity", decoder.head_dim)
    return Contract(
        "decoder",
        (
            TensorSpec("inputs_embeds", dtype, ("batch", "sequence", decoder.width), "token embeddings"),
            TensorSpec("positions", "int64", ("batch", "sequence"), "cache position of each token"),
            TensorSpec("logit_rows", "int64", ("rows",), "rows of the sequence whose logits are wanted"),
        ),
        (TensorSpec("logits", "float32", ("batch", "rows", decoder.vocab_size), "next-token scores"),),
        tuple(
            TensorSpec(
                f"{kind}_cache_{layer}",
                CACHE_DTYPES.get(kv_cache, FLOAT_CACHE_DTYPES[precision]),
                cache_shape,
                f"{kind}s of layer {layer}",
            )
            for layer in range(decoder.layers)
            for kind in ("key", "value")
        ),
        taps,
    )


def build_component(config: ModelConfig, component: str) -> nn.Module:
    """Build a component with meta parameters and real constants."""
    with torch.device("meta"):
        module: nn.Module
        if component == "vision_encoder":
            module = VisionEncoder(config.vision)
        elif component == "adaptor":
            module = Adaptor(config.adaptor)
        else:
            module = Decoder(config.decoder)
    materialize_constants(module)
    return module.eval()


def trace_component(
    config: ModelConfig,
    component: str,
    precision: str,
    kv_cache: str = "float",
    prepare: Callable[[nn.Module], None] = lambda module: None,
) -> TracedComponent:
    """Trace a component under its contract; named dims are symbolic.

    Args:
        config: the model's sizes.
        component: one of ``TRACED_COMPONENTS`` (the token embedding is a table, not a program).
        precision: a key of ``PRECISION_DTYPES``.
        kv_cache: as in ``component_contract``.
        prepare: changes the built module before it is traced, to quantize it.
    """
    contract = component_contract(config, component, precision, kv_cache)
    module = build_component(config, component)
    prepare(module)
    module = module.to(PRECISION_DTYPES[precision])
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _replace_parameters_with_fakes(module, mode)
    # Distinct example sizes, so that the tracer does not assume that two symbolic dims are equal.
    sizes = {"batch": 2, "sequence": 5, "rows": 3, "capacity": 37}
    dims = {name: Dim(name) for name in sizes}
    with mode, torch.no_grad():
        inputs = [_example_tensor(spec, sizes, PRECISION_DTYPES[precision]) for spec in contract.inputs]
        states = [_example_tensor(spec, sizes) for spec in contract.states]
        shapes: list[Any] = [_dynamic_shape(spec, dims) for spec in contract.inputs]
        if component == "decoder":
            args, dynamic = (
                (*inputs, states),
                (*shapes, [_dynamic_shape(spec, dims) for spec in contract.states]),
            )
        elif component == "adaptor":
            args, dynamic = tuple(inputs), (tuple(shapes),)  # ``forward`` takes *features
        else:
            args, dynamic = tuple(inputs), tuple(shapes)
        program = torch.export.export(module, args, dynamic_shapes=dynamic)
    return TracedComponent(program, contract, component_taps(config, component))


def _replace_parameters_with_fakes(module: nn.Module, mode: FakeTensorMode) -> None:
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            with mode:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            setattr(owner, name, nn.Parameter(fake, requires_grad=False))


def _example_tensor(
    spec: TensorSpec, sizes: dict[str, int], computes_in: torch.dtype | None = None
) -> Tensor:
    """Build zeros of a spec; floats have the dtype ``computes_in`` if there is one."""
    shape = spec.sized(sizes)
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return torch.zeros(shape, dtype=computes_in if computes_in and dtype.is_floating_point else dtype)


def _dynamic_shape(spec: TensorSpec, dims: dict[str, Any]) -> dict[int, Any]:
    return {axis: dims[dim] for axis, dim in enumerate(spec.shape) if isinstance(dim, str)}
