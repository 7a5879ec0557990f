"""Foldings: places where a factor per channel moves from an activation into the weights around it, exactly.

The producer's output channels are divided by the factors and its consumers' input channels multiplied, so
the model computes the same. SmoothQuant (arXiv 2211.10438) moves outliers of activations into weights that
way, AWQ (arXiv 2306.00978) protects weights that meet large activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from reference.model.config import ModelConfig, SamConfig, SiglipConfig


@dataclass(frozen=True)
class Folding:
    """``producer``'s output channels, from row ``first`` on, are the input channels of all ``consumers``."""

    producer: str
    consumers: tuple[str, ...]
    first: int = 0


def foldings(config: ModelConfig) -> tuple[Folding, ...]:
    """Every place of a model where factors can be folded."""
    return (*_towers(config), *_decoder(config))


def _towers(config: ModelConfig) -> Iterator[Folding]:
    towers: list[tuple[str, SiglipConfig | SamConfig]] = [("vision_encoder.low", config.vision.siglip)]
    if config.vision.sam:
        towers.append(("vision_encoder.high", config.vision.sam))
    for path, tower in towers:
        for block in (f"{path}.blocks.{layer}" for layer in range(tower.layers)):
            # The windows' padding is zero, which no factor changes.
            yield Folding(f"{block}.norm1", (f"{block}.attn.qkv",))
            yield Folding(f"{block}.norm2", (f"{block}.mlp.fc1",))
            # Attention is linear in its values, the last third of the fused projection.
            yield Folding(f"{block}.attn.qkv", (f"{block}.attn.proj",), first=2 * tower.width)


def _decoder(config: ModelConfig) -> Iterator[Folding]:
    decoder = config.decoder
    for block in (f"decoder.layers.{layer}" for layer in range(decoder.layers)):
        attention, mlp = f"{block}.self_attn", f"{block}.mlp"
        yield Folding(f"{block}.input_layernorm", tuple(f"{attention}.{part}_proj" for part in "qkv"))
        yield Folding(f"{block}.post_attention_layernorm", (f"{mlp}.gate_proj", f"{mlp}.up_proj"))
        yield Folding(f"{mlp}.up_proj", (f"{mlp}.down_proj",))
        if decoder.kv_heads == decoder.heads:  # else several heads read one value channel
            yield Folding(f"{attention}.v_proj", (f"{attention}.o_proj",))
    yield Folding("decoder.norm", ("decoder.head",))
