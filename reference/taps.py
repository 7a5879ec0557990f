"""Taps: named intermediate tensors of the eager model and of the program traced from it.

A tap is the output or the input of a module. Its name is the part of the model that computes it, so
that the first wrong tap names the part that is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from reference.model.config import AdaptorConfig, DecoderConfig, ModelConfig, VisionConfig
from runtimes.bundle.contracts import Dim


@dataclass(frozen=True)
class Tap:
    """An intermediate tensor: its name, its module (a path inside the component) and its shape."""

    name: str
    module: str
    shape: tuple[Dim, ...]
    is_input: bool = False  # the input of the module, not its output


def component_taps(config: ModelConfig, component: str) -> tuple[Tap, ...]:
    """Return the taps of a component in order of execution.

    They cover every block or layer, and the operations before and after them.
    """
    if component == "vision_encoder":
        return (*_sam_taps(config.vision), *_siglip_taps(config.vision))
    if component == "adaptor":
        return _adaptor_taps(config.adaptor, config.vision.image_tokens)
    return _decoder_taps(config.decoder)


def _sam_taps(config: VisionConfig) -> Iterator[Tap]:
    sam = config.sam
    if sam is None:
        return
    grid, image = sam.grid, ("batch", 3, sam.image_size, sam.image_size)
    tokens, neck = ("batch", grid, grid, sam.width), ("batch", sam.neck_width, grid, grid)
    if config.high_norm:
        yield Tap("high_norm", "high", image, is_input=True)
    yield Tap("high.patch_embed", "high.blocks.0", tokens, is_input=True)
    for layer in range(sam.layers):
        yield Tap(f"high.blocks.{layer}", f"high.blocks.{layer}", tokens)
    yield Tap("high.neck", "high.neck", neck)
    yield Tap("high.neck_hd", "high.neck_hd", neck)
    yield Tap("high.downsamples", "high", ("batch", config.image_tokens, sam.downsample_widths[-1]))


def _siglip_taps(config: VisionConfig) -> Iterator[Tap]:
    siglip = config.siglip
    tokens = ("batch", siglip.grid**2, siglip.width)
    if config.low_norm:
        yield Tap("low_norm", "low", ("batch", 3, siglip.image_size, siglip.image_size), is_input=True)
    yield Tap("low.patch_embed", "low.blocks.0", tokens, is_input=True)
    for layer in range(siglip.layers):
        yield Tap(f"low.blocks.{layer}", f"low.blocks.{layer}", tokens)
    yield Tap("low.norm", "low", tokens)


def _adaptor_taps(config: AdaptorConfig, tokens: int) -> tuple[Tap, ...]:
    branches = ("high_up_proj", "low_up_proj") if config.high_width is not None else ()
    layers = 2 * config.depth - (2 if branches else 1)  # linear layers and the GELUs between them
    return (
        *(Tap(name, name, ("batch", tokens, config.width // 2)) for name in branches),
        *(Tap(f"layers.{index}", f"layers.{index}", ("batch", tokens, config.width))
          for index in range(layers)),
    )  # fmt: skip


def _decoder_taps(config: DecoderConfig) -> tuple[Tap, ...]:
    hidden = ("batch", "sequence", config.width)
    return (
        *(Tap(f"layers.{layer}", f"layers.{layer}", hidden) for layer in range(config.layers)),
        Tap("norm", "norm", ("batch", "rows", config.width)),
        Tap("head", "head", ("batch", "rows", config.vocab_size)),
    )


def tap_nodes(program: ExportedProgram, taps: Sequence[Tap]) -> dict[str, Node]:
    """Find the node of a traced component that computes each tap; returns tap name → node."""
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    scopes: dict[str, list[Node]] = {tap.module: [] for tap in taps}
    for node in calls:
        for path, _ in (node.meta.get("nn_module_stack") or {}).values():
            if path in scopes:
                scopes[path].append(node)
    computed = set(calls)
    return {
        tap.name: next(
            source
            for node in scopes[tap.module]
            for source in node.all_input_nodes
            if source in computed and source not in scopes[tap.module]
        )
        if tap.is_input
        else scopes[tap.module][-1]
        for tap in taps
    }


@contextmanager
def record_taps(
    module: nn.Module, taps: Sequence[Tap], replacements: Mapping[str, Tensor] = MappingProxyType({})
) -> Iterator[dict[str, Tensor]]:
    """Record the taps of each forward pass of an eager component in the yielded table.

    Args:
        module: the component.
        taps: the taps to record.
        replacements: tap name → tensor that the model uses downstream instead of the tap.
    """
    table: dict[str, Tensor] = {}

    def keep_input(name: str, module: nn.Module, args: Any) -> Any:
        table[name] = args[0].clone()
        return (replacements[name], *args[1:]) if name in replacements else None

    def keep_output(name: str, module: nn.Module, args: Any, output: Any) -> Any:
        table[name] = output.clone()
        return replacements.get(name)

    handles = [
        module.get_submodule(tap.module).register_forward_pre_hook(partial(keep_input, tap.name))
        if tap.is_input
        else module.get_submodule(tap.module).register_forward_hook(partial(keep_output, tap.name))
        for tap in taps
    ]
    try:
        yield table
    finally:
        for handle in handles:
            handle.remove()
