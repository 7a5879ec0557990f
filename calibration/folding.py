"""Foldings: places where channel factors of an activation can be folded into the weights around it.

Folding divides the output channels of the producer by the factors and multiplies the input channels
of its consumers by them, so the model computes the same. SmoothQuant (arXiv 2211.10438) moves
outliers of activations into weights in this way; AWQ (arXiv 2306.00978) protects weights that
multiply large activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from reference.model.config import ModelConfig, SamConfig, SiglipConfig


@dataclass(frozen=True)
class Folding:
    """A place to fold: ``producer``'s output channels are the input channels of all ``consumers``.

    ``first`` is the row of the producer's weight at which these channels start.
    """

    producer: str
    consumers: tuple[str, ...]
    first: int = 0


def list_foldings(config: ModelConfig) -> tuple[Folding, ...]:
    """Return every place of a model where factors can be folded."""
    return (*_tower_foldings(config), *_decoder_foldings(config))


def _tower_foldings(config: ModelConfig) -> Iterator[Folding]:
    towers: list[tuple[str, SiglipConfig | SamConfig]] = [("vision_encoder.low", config.vision.siglip)]
    if config.vision.sam:
        towers.append(("vision_encoder.high", config.vision.sam))
    for path, tower in towers:
        for block in (f"{path}.blocks.{layer}" for layer in range(tower.layers)):
            # The padding of the windows is zero, which factors do not change.
            yield Folding(f"{block}.norm1", (f"{block}.attn.qkv",))
            yield Folding(f"{block}.norm2", (f"{block}.mlp.fc1",))
            # Attention is linear in its values, the last third of the fused projection.
            yield Folding(f"{block}.attn.qkv", (f"{block}.attn.proj",), first=2 * tower.width)


def _decoder_foldings(config: ModelConfig) -> Iterator[Folding]:
    decoder = config.decoder
    for block in (f"decoder.layers.{layer}" for layer in range(decoder.layers)):
        attention, mlp = f"{block}.self_attn", f"{block}.mlp"
        yield Folding(f"{block}.input_layernorm", tuple(f"{attention}.{part}_proj" for part in "qkv"))
        yield Folding(f"{block}.post_attention_layernorm", (f"{mlp}.gate_proj", f"{mlp}.up_proj"))
        yield Folding(f"{mlp}.up_proj", (f"{mlp}.down_proj",))
        if decoder.kv_heads == decoder.heads:  # otherwise several heads read one value channel
            yield Folding(f"{attention}.v_proj", (f"{attention}.o_proj",))
    yield Folding("decoder.norm", ("decoder.head",))
