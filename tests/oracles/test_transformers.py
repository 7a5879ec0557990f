"""Our reference against transformers, stage by stage, on random models of both variants."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers.models.deepseek_vl_hybrid.image_processing_pil_deepseek_vl_hybrid import (
    DeepseekVLHybridImageProcessorPil,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from reference.checkpoint.config_file import parse_config
from reference.checkpoint.released import RELEASED_CONFIGS
from reference.model.config import CLIP_MEAN, CLIP_STD, HALF_RGB
from reference.model.operators import rope_tables
from tests.conftest import OraclePair
from tests.oracles.models import IMAGE_TOKEN_ID

LIMIT = 1e-5


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected value."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def image(pair: OraclePair, count: int = 2) -> Tensor:
    side = pair.model.config.vision.image_size
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(3))


def oracle_inputs(pair: OraclePair, pixels: Tensor) -> dict[str, Tensor]:
    """What transformers wants: two normalized images for the hybrid, resized as the original does."""
    if not pair.model.config.vision.hybrid:
        return {"pixel_values": pixels}
    side = pair.model.config.vision.siglip.image_size
    low = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return {"pixel_values": (low - 0.5) / 0.5, "high_res_pixel_values": (pixels - mean) / std}


def prompt_ids(pair: OraclePair, images: int) -> Tensor:
    tokens = pair.model.config.vision.image_tokens
    generator = torch.Generator().manual_seed(4)
    text = torch.randint(0, 500, (3, 11), generator=generator)
    parts = [text[0], *[torch.full((tokens,), IMAGE_TOKEN_ID), text[1]] * images, text[2]]
    return torch.cat(parts)[None]


def test_siglip_features(pair: OraclePair) -> None:
    pixels = image(pair)
    low = pair.model.vision_encoder(pixels)[-1]
    expected = pair.oracle.model.vision_model(oracle_inputs(pair, pixels)["pixel_values"])
    assert error(low, expected.last_hidden_state) < LIMIT


def test_sam_features(hybrid_pair: OraclePair) -> None:
    """Windows with padding, relative positions, both necks, upsampling and the alpha sum."""
    assert hybrid_pair.model.vision_encoder.high.hd_alpha.abs() > 0.01
    pixels = image(hybrid_pair)
    high = hybrid_pair.model.vision_encoder(pixels)[0]
    given = oracle_inputs(hybrid_pair, pixels)["high_res_pixel_values"]
    expected = hybrid_pair.oracle.model.get_high_res_image_features(given).last_hidden_state
    assert error(high, expected) < LIMIT


def test_first_global_branch_matters(hybrid_pair: OraclePair) -> None:
    """Without the second neck the features differ: the sum above is not won by a zero alpha."""
    pixels, encoder = image(hybrid_pair), hybrid_pair.model.vision_encoder
    high = encoder(pixels)[0]
    alpha = encoder.high.hd_alpha.data.clone()
    encoder.high.hd_alpha.data.zero_()
    without = encoder(pixels)[0]
    encoder.high.hd_alpha.data.copy_(alpha)
    assert error(without, high) > 1e-2


def test_image_embeddings(pair: OraclePair) -> None:
    pixels = image(pair)
    expected = pair.oracle.model.get_image_features(**oracle_inputs(pair, pixels)).pooler_output
    assert error(pair.model.encode_image(pixels), expected) < LIMIT


def test_merged_embeddings_and_logits(pair: OraclePair) -> None:
    """Two images between text: input embeddings and logits at every position."""
    pixels, ids = image(pair), prompt_ids(pair, images=2)
    embeds = pair.model.merge(ids, pair.model.encode_image(pixels), IMAGE_TOKEN_ID)
    seen: list[Tensor] = []
    hook = pair.oracle.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    expected = pair.oracle(input_ids=ids, **oracle_inputs(pair, pixels)).logits
    hook.remove()
    assert error(embeds, seen[0]) < LIMIT
    assert error(pair.model.logits(embeds), expected) < LIMIT


def test_greedy_tokens(pair: OraclePair) -> None:
    """32 tokens, ours one by one through the KV cache, transformers' by generate()."""
    pixels, ids = image(pair), prompt_ids(pair, images=2)
    expected = pair.oracle.generate(
        input_ids=ids, **oracle_inputs(pair, pixels), max_new_tokens=32, min_new_tokens=32, do_sample=False
    )[0, -32:]
    model, length = pair.model, ids.shape[1]
    cache = model.decoder.new_cache(1, length + 32)
    embeds = model.merge(ids, model.encode_image(pixels), IMAGE_TOKEN_ID)
    position, tokens = 0, []
    with torch.no_grad():
        while len(tokens) < 32:
            steps = embeds.shape[1]
            places = torch.arange(position, position + steps)[None]
            logits = model.decoder(embeds, places, torch.tensor([steps - 1]), cache)
            tokens.append(int(logits[0, 0].argmax()))
            position += steps
            embeds = model.token_embedding(torch.tensor([[tokens[-1]]]))
    assert tokens == expected.tolist()


def test_where_the_original_and_transformers_differ(hybrid_pair: OraclePair) -> None:
    """The original shrinks the float image inside the tower, transformers resizes uint8 before.

    Both are stated: ours equals the original's arithmetic exactly, and transformers' processor
    (8-bit rounding, bicubic) is near it but not equal.
    """
    side, low_side = 112, 28
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(1, 3, 7, 7, generator=generator)
    smooth = F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)
    pixels = (smooth * 255).round() / 255
    inside = F.interpolate(pixels, (low_side, low_side), mode="bilinear", antialias=True)
    ours = hybrid_pair.model.vision_encoder(pixels)[1]
    original = hybrid_pair.oracle.model.vision_model((inside - 0.5) / 0.5).last_hidden_state
    assert error(ours, original) < LIMIT
    processor = DeepseekVLHybridImageProcessorPil(
        size={"height": low_side, "width": low_side}, high_res_size={"height": side, "width": side},
        image_mean=HALF_RGB, image_std=HALF_RGB, high_res_image_mean=CLIP_MEAN, high_res_image_std=CLIP_STD,
    )  # fmt: skip
    picture = Image.fromarray((pixels[0] * 255).round().byte().permute(1, 2, 0).numpy())
    made = processor(picture, return_tensors="pt")
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    assert error(made["high_res_pixel_values"], (pixels - mean) / std) < LIMIT
    transformers_way = hybrid_pair.oracle.model.vision_model(made["pixel_values"]).last_hidden_state
    assert 1e-4 < error(ours, transformers_way) < 0.3


def test_rotary_tables_at_every_position() -> None:
    """All 16,384 positions of the released models, to the last bit."""
    config = transformers.LlamaConfig(hidden_size=2048, num_attention_heads=16, max_position_embeddings=16384)
    expected_cos, expected_sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(16384)[None])
    cos, sin = rope_tables(128, 10000.0, 16384)
    assert torch.equal(cos, expected_cos[0, :, :64])
    assert torch.equal(sin, expected_sin[0, :, :64])


@pytest.mark.parametrize(("select", "layers"), [(-1, 24), (-2, 23), (None, 23), (5, 5), (99, 24), (0, 24)])
def test_select_layer_as_in_the_original(select: int | None, layers: int) -> None:
    raw = copy.deepcopy(RELEASED_CONFIGS["1.3b"])
    raw["vision_config"]["params"]["select_layer"] = select
    if select is None:
        del raw["vision_config"]["params"]["select_layer"]
    assert parse_config(raw, "config.json").vision.siglip.layers == layers
