"""Configs: what a checkpoint's config.json may say, in either layout."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from reference.checkpoint.checkpoint import open_checkpoint
from reference.checkpoint.config_file import parse_config
from reference.checkpoint.released import RELEASED_CONFIGS
from reference.model.config import ModelConfig
from reference.tiny import TINY
from runtimes.errors import UserError
from tests.oracles.random_configs import random_config

LOW = ("vision_config", "params", "low_res_cfg")
HIGH = ("vision_config", "params", "high_res_cfg")
EXTRA_KEYS = (
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "mlp_dim",
    "num_key_value_heads",
    "sliding_window",
)
TRANSFORMERS: dict[str, Any] = {
    "model_type": "deepseek_vl_hybrid",
    "text_config": {"hidden_size": 64, "num_attention_heads": 4},
    "vision_config": {},
    "high_res_vision_config": {"global_attn_indexes": [3, 1]},
}


def changed(raw: dict[str, Any], path: tuple[str, ...], value: Any) -> ModelConfig:
    """The config with one value replaced."""
    raw = copy.deepcopy(raw)
    section = raw
    for key in path[:-1]:
        section = section.setdefault(key, {})
    section[path[-1]] = value
    return parse_config(raw, "config.json")


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_configs_that_are_no_deepseek_vl(tiny_copy: Path) -> None:
    edit_config(tiny_copy, model_type="llava")
    with pytest.raises(UserError, match="model_type 'llava', which is not a DeepSeek-VL or Janus model"):
        open_checkpoint(str(tiny_copy))
    (tiny_copy / "config.json").write_text("{not json")
    with pytest.raises(UserError, match="is not valid JSON"):
        open_checkpoint(str(tiny_copy))
    (tiny_copy / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="expected an object"):
        open_checkpoint(str(tiny_copy))
    (tiny_copy / "config.json").unlink()
    with pytest.raises(UserError, match="has no config.json"):
        open_checkpoint(str(tiny_copy))


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (("vision_config", "cls"), "CLIPModel", "vision_config.cls is 'CLIPModel', which is not supported"),
        (("aligner_config", "params", "projector_type"), "linear", "projector_type is 'linear'"),
        (("aligner_config", "params", "n_embed"), 64, "outputs 64 channels but the decoder takes 4096"),
        (("language_config", "hidden_act"), "gelu", "hidden_act is 'gelu', which is not supported"),
        (("language_config", "rope_scaling"), {"type": "linear", "factor": 2}, "type is 'linear'"),
        (("language_config", "rope_scaling"), "linear", "rope_scaling is 'linear', expected an object"),
        (("language_config", "hidden_size"), "wide", "hidden_size is 'wide', expected an integer"),
        (("language_config", "hidden_size"), 10**5000, "is an integer of about 5001 digits, expected an int"),
        (("language_config", "hidden_size"), [64], r"hidden_size is \[64\], expected an integer"),
        (("language_config", "hidden_size"), True, "hidden_size is true, expected an integer"),
        (("language_config", "hidden_size"), 4096.0, "hidden_size is 4096.0, expected an integer"),
        (("language_config", "num_hidden_layers"), 10**9, "expected an integer from 1 to 128"),
        (("language_config", "max_position_embeddings"), 10**9, "expected an integer from 1 to 1048576"),
        (("language_config", "head_dim"), 2**16, "RoPE tables of 16384 positions with 65536"),
        (("language_config", "num_attention_heads"), 7, "7 heads must divide its width"),
        (("language_config", "rms_norm_eps"), float("nan"), "rms_norm_eps is nan, expected a number"),
        (("language_config", "rms_norm_eps"), 0, "greater than 0"),
        (("language_config", "rms_norm_eps"), -1e-6, "greater than 0"),
        (("language_config", "rope_theta"), 0.0, "rope_theta is 0.0, expected a number greater than 0"),
        (("language_config", "rope_theta"), float("inf"), "rope_theta is inf"),
        (("language_config", "rope_theta"), 10**400, "rope_theta is an integer of about 401 digits"),
        (("language_config", "tie_word_embeddings"), "no", "expected true or false"),
        (("language_config", "vocab_size"), -5, "vocab_size is -5"),
        (("language_config",), [], r"language_config is \[\], expected an object"),
        ((*LOW, "heads"), 7, "heads must divide its width"),
        ((*LOW, "patch_size"), 0, "patch_size is 0, expected an integer"),
        ((*LOW, "activation"), "relu", "activation is 'relu', which is not supported"),
        ((*LOW, "norm_eps"), "small", "norm_eps is 'small', expected a number"),
        ((*LOW, "image_size"), 10**6, "expected an integer from 1 to 4096"),
        (
            (*LOW, "model_name"),
            "siglip_so400m_patch14_384",
            "model_name is 'siglip_so400m_patch14_384', which",
        ),
        ((*LOW, "select_layer"), "last", "select_layer is 'last'"),
        ((*LOW, "select_layer"), -60, "layers is -35, it must be at least 1"),
        ((*LOW, "pixel_std"), [0.5, 0, 0.5], "pixel_std is .*, expected three numbers"),
        ((*LOW, "pixel_mean"), 0.5, "pixel_mean is 0.5, expected three numbers"),
        ((*HIGH, "global_layers"), [99], "below its layer count"),
        ((*HIGH, "global_layers"), [], "at least one global-attention layer"),
        ((*HIGH, "downsample_widths"), [128], "two downsample_widths"),
        ((*HIGH, "downsample_widths"), [], "two downsample_widths"),  # crashed with IndexError
        ((*HIGH, "downsample_widths"), "", "expected a list of integers"),  # the same
        ((*HIGH, "downsample_widths"), [96, None], "expected a list of integers"),
        (("vision_config", "params", "concat_type"), "add", "concat_type is 'add', which is not supported"),
        (("quantization_config",), {"quant_method": "fp8"}, r"quantized already \(by 'fp8'\)"),
        (("quantization_config",), {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "'bitsandbytes'"),
        (("language_config", "quantization_config"), {"quant_method": "awq"}, "by 'awq'"),
        (("compression_config",), {"format": "pack"}, "by an unnamed method"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # a long integer has no text
)
def test_values_of_the_original_layout(path: tuple[str, ...], value: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        changed(RELEASED_CONFIGS["7b"], path, value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (("text_config", "model_type"), "mistral", "text_config.model_type is 'mistral', which is not supp"),
        (("text_config", "sliding_window"), 8, "sliding_window is 8, which is not supported; remove it"),
        (("text_config", "attention_bias"), True, "attention_bias is true, .* expected false"),
        (("text_config", "mlp_bias"), True, "mlp_bias is true"),
        (("text_config", "logits_scaling"), 8.0, "logits_scaling is 8.0"),
        (("text_config", "partial_rotary_factor"), 0.5, "partial_rotary_factor is 0.5"),
        (("text_config", "layer_types"), ["sliding_attention"], "layer_types is"),
        (("text_config", "rope_parameters"), {"rope_type": "yarn", "factor": 4.0}, "rope_type is 'yarn'"),
        (("text_config", "rope_parameters"), {"full_attention": {"rope_theta": 1e4}}, "one RoPE for all"),
        (("text_config", "rope_parameters"), {"rope_theta": None}, "rope_theta is null, expected a number"),
        (("text_config", "num_key_value_heads"), 0, "num_key_value_heads is 0"),
        (("text_config", "num_key_value_heads"), 3, "kv_heads must divide its heads"),
        (("vision_config", "model_type"), "clip_vision_model", "which is not supported"),
        (("vision_config", "num_channels"), 1, "num_channels is 1"),
        (("vision_config", "image_size"), [384, 384], r"image_size is \[384, 384\], expected an integer"),
        (("vision_config", "hidden_act"), "quick_gelu", "hidden_act is 'quick_gelu'"),
        (("high_res_vision_config", "use_rel_pos"), False, "use_rel_pos is false"),
        (("high_res_vision_config", "use_abs_pos"), False, "use_abs_pos is false"),
        (("high_res_vision_config", "qkv_bias"), False, "qkv_bias is false"),
        (("high_res_vision_config", "global_attn_indexes"), [-1], "expected a list of integers from 0"),
        (("tie_word_embeddings",), None, "tie_word_embeddings is null, expected true or false"),
    ],
)
def test_values_of_transformers_layout(path: tuple[str, ...], value: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        changed(TRANSFORMERS, path, value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("text_config", "sliding_window"), None),
        (("text_config", "attention_bias"), False),
        (("text_config", "pretraining_tp"), 2),  # the same numbers, computed in slices
        (("text_config", "hidden_act"), "swish"),
        (("text_config", "layer_types"), ["full_attention"] * 32),
        (("text_config", "rope_scaling"), {"type": "default"}),
        (("text_config", "num_key_value_heads"), None),
        (("text_config",), {"hidden_size": 64, "num_attention_heads": 4, "unknown": 1}),
        (("high_res_vision_config", "mlp_dim"), None),
        (("quantization_config",), None),
    ],
)
def test_values_that_change_nothing(path: tuple[str, ...], value: Any) -> None:
    assert changed(TRANSFORMERS, path, value) == parse_config(TRANSFORMERS, "config.json")


def test_rope_theta_as_transformers_reads_it() -> None:
    """``rope_scaling`` replaces ``rope_parameters``, and the key beside them fills what they leave out."""

    def theta(**text: Any) -> float:
        raw = {**TRANSFORMERS, "text_config": {**TRANSFORMERS["text_config"], **text}}
        return parse_config(raw, "config.json").decoder.rope_theta

    assert theta() == 10000.0
    assert theta(rope_theta=500.0) == 500.0
    assert theta(rope_theta=500.0, rope_parameters={"rope_theta": 700.0}) == 700.0
    assert (
        theta(rope_theta=500.0, rope_parameters={"rope_theta": 700.0}, rope_scaling={"type": "default"})
        == 500.0
    )


def test_the_second_neck_reads_the_first_listed_global_layer() -> None:
    """In transformers; the original takes the lowest."""
    sam = parse_config(TRANSFORMERS, "config.json").vision.sam
    assert sam is not None
    assert sam.global_layers == (3, 1)
    sam = changed(RELEASED_CONFIGS["7b"], (*HIGH, "global_layers"), [3, 1]).vision.sam
    assert sam is not None
    assert sam.global_layers == (1, 3)


def test_a_key_that_is_missing_is_named(tiny_copy: Path) -> None:
    raw = json.loads((tiny_copy / "config.json").read_text())
    del raw["aligner_config"]
    (tiny_copy / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="is missing the key 'aligner_config'"):
        open_checkpoint(str(tiny_copy))


HOSTILE: list[Any] = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, 10**400, 10**5000, 0.5, -0.5, 1e308, float("nan"),
    float("inf"), "", "abc", "3", "\ud800", "x" * 10_000, [], [1], [1, 2], [1, 2, 3], [None], [[[]]], {}, {"a": 1},
    {"rope_type": []}, {"type": {}}, {"quant_method": []},
]  # fmt: skip


def paths(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Of all values inside an object, itself left out."""
    inner = value.items() if isinstance(value, dict) else ()
    return [found for key, part in inner for found in [(*path, key), *paths(part, (*path, key))]]


@pytest.mark.parametrize("layout", ["original", "siglip", "hybrid", "tiny"])
def test_hostile_values_end_in_a_sentence(layout: str) -> None:
    """Every value of a config in turn, and keys that it leaves out: read or refused, and never a crash."""
    if layout in ("siglip", "hybrid"):
        raw = random_config(0, layout)
        raw["text_config"] |= {"rope_parameters": {"rope_theta": 1.0}, "rope_scaling": {}, "head_dim": 8}
    else:
        raw = (
            RELEASED_CONFIGS["7b"] if layout == "original" else json.loads((TINY / "config.json").read_text())
        )
    extra = [(section, key) for section in raw if isinstance(raw[section], dict) for key in EXTRA_KEYS]
    refused = 0
    for path in [*paths(raw), *extra, ("quantization_config",), ("model_type",)]:
        for value in HOSTILE:
            try:
                config = changed(raw, path, value)
            except UserError as error:
                refused += 1
                assert len(str(error)) < 300
            else:
                assert config.decoder.layers <= 128
                assert config.decoder.max_positions * config.decoder.head_dim <= 2**27
    assert refused > 900


def test_sizes_in_a_manifest() -> None:
    """What ``to_dict`` writes is read again; damaged, it ends in a sentence."""
    raw = json.loads(json.dumps(parse_config(RELEASED_CONFIGS["7b"], "config.json").to_dict()))
    assert ModelConfig.from_dict(raw) == parse_config(RELEASED_CONFIGS["7b"], "config.json")
    for path in paths(raw):
        for value in (None, 0, -1, "x", [], {}, float("nan"), 10**5000):
            damaged = copy.deepcopy(raw)
            section = damaged
            for key in path[:-1]:
                section = section[key]
            section[path[-1]] = value
            try:
                ModelConfig.from_dict(damaged)
            except UserError as error:
                assert len(str(error)) < 300
