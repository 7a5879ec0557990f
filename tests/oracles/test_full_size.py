"""The released sizes on the meta device: every tensor's name and shape, in both layouts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from reference.checkpoint.checkpoint import parameter_shapes
from reference.checkpoint.config_file import parse_config
from reference.checkpoint.layouts import UNUSED_TENSORS, is_skipped, is_unused, parameter_sources
from reference.checkpoint.released import RELEASED_CONFIGS, released_config
from reference.model.config import ModelConfig
from tests.oracles.original_janus import original_state

DATA = Path(__file__).parent.parent / "data"


def original_config(size: str, **changes: Any) -> ModelConfig:
    """The released config, with the decoder's sizes changed."""
    raw = copy.deepcopy(RELEASED_CONFIGS[size])
    raw["language_config"] |= changes
    raw["aligner_config"]["params"]["n_embed"] = changes["hidden_size"]
    return parse_config(raw, "config.json")


def wanted(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    table = parameter_sources(config, parameter_shapes(config))
    return {name: source.shape for source in table.values() for name in source.names}


@pytest.mark.parametrize(("size", "file"), [("1.3b", "siglip"), ("7b", "hybrid")])
def test_original_names_and_shapes(size: str, file: str) -> None:
    """Against tensors listed from the original code (its decoder cut to 3 layers, 320 wide)."""
    listed = json.loads((DATA / f"original_tensors_{file}.json").read_text())
    small = {"vocab_size": 1031, "hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 3, "num_attention_heads": 10}  # fmt: skip
    expected = {name: tuple(shape) for name, shape in listed.items() if not UNUSED_TENSORS.fullmatch(name)}
    assert wanted(original_config(size, **small)) == expected


@pytest.mark.parametrize("size", ["1.3b", "7b"])
def test_transformers_names_and_shapes(size: str) -> None:
    """Against transformers' own modules at full size."""
    vision = {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 16, "hidden_size": 1024,
              "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}  # fmt: skip
    text = {"model_type": "llama", **RELEASED_CONFIGS[size]["language_config"]}
    with torch.device("meta"):
        if size == "1.3b":
            config = transformers.DeepseekVLConfig(
                vision_config=vision, text_config=text, tie_word_embeddings=False
            )
            oracle = transformers.DeepseekVLForConditionalGeneration(config)
        else:
            config = transformers.DeepseekVLHybridConfig(
                vision_config=vision, text_config=text, tie_word_embeddings=False,
                high_res_vision_config={"model_type": "sam_vision_model"},
            )  # fmt: skip
            oracle = transformers.DeepseekVLHybridForConditionalGeneration(config)
    expected = {
        name: tuple(tensor.shape)
        for name, tensor in oracle.named_parameters()
        if not UNUSED_TENSORS.fullmatch(name)
    }
    ours = parse_config(json.loads(config.to_json_string()), "config.json")
    assert wanted(ours) == expected


@pytest.mark.parametrize("size", ["janus-1.3b", "janus-pro-7b"])
def test_names_and_shapes_of_janus(size: str) -> None:
    """Both layouts, against transformers' own modules at full size; its parts that generate images are skipped."""
    raw = RELEASED_CONFIGS[size]
    width, text = (
        raw["aligner_config"]["params"]["n_embed"],
        {"model_type": "llama", **raw["language_config"]},
    )
    with torch.device("meta"):
        config = transformers.JanusConfig(
            text_config=text, vision_config={"projection_dim": width}, tie_word_embeddings=False
        )
        oracle = transformers.JanusForConditionalGeneration(config)
    ours = parse_config(json.loads(config.to_json_string()), "config.json")
    tensors = dict(oracle.named_parameters())
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items() if not is_unused(ours, name)}
    assert wanted(ours) == expected
    state = original_state(tensors)
    original = released_config(size)
    assert wanted(original) == {
        name: tuple(tensor.shape) for name, tensor in state.items() if not is_unused(original, name)
    }
    assert any(is_skipped(original, name) for name in state)


@pytest.mark.parametrize("size", ["1.3b", "7b"])
def test_parameter_counts(size: str) -> None:
    """By hand from the paper's sizes: towers, adaptor, embeddings, layers, norms, head."""
    config = released_config(size)
    total = sum(torch.Size(shape).numel() for shape in parameter_shapes(config).values())
    width, hidden, layers = (2048, 5632, 24) if size == "1.3b" else (4096, 11008, 30)
    decoder = 2 * 102400 * width + width + layers * (4 * width**2 + 3 * width * hidden + 2 * width)
    siglip = 24 * (12 * 1024**2 + 13 * 1024) + 2 * 1024 + 576 * 1024 + 1024 * (3 * 256 + 1)
    if size == "1.3b":
        sam, adaptor = 0, 1024 * 2048 + 2048 + 2048**2 + 2048
    else:
        sam = 768 * (3 * 256 + 1) + 64 * 64 * 768 + 12 * (12 * 768**2 + 13 * 768)
        sam += 2 * 64 * (8 * 27 + 4 * 127)  # relative positions: 8 windowed and 4 global layers
        sam += 2 * (768 * 256 + 256 * 256 * 9 + 4 * 256) + 9 * 256 * 512 + 9 * 512 * 1024 + 1
        adaptor = 2 * (1024 * 2048 + 2048) + 4096**2 + 4096
    assert total == decoder + siglip + sam + adaptor
