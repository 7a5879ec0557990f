"""Checkpoints: both layouts, shards, .bin files, and everything that can be wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reference.checkpoint.checkpoint import (
    open_checkpoint,
    parameter_shapes,
    resolve_checkpoint,
)
from reference.checkpoint.layouts import parameter_sources
from reference.checkpoint.specs import prompt_spec
from reference.checkpoint.write_original import write_original_checkpoint
from runtimes.errors import UserError
from tests.conftest import OraclePair
from tests.oracles.models import save_oracle


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    return dict(open_checkpoint(str(folder)).load_model().named_parameters())


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_shards_equal_one_file(pair: OraclePair, tmp_path: Path) -> None:
    save_oracle(pair.oracle, tmp_path, shard="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert same(parameters(tmp_path), dict(pair.model.named_parameters()))


def test_both_layouts_of_the_same_model(hybrid_pair: OraclePair, tmp_path: Path) -> None:
    """Written in the original layout and read back, the numbers are those of transformers' layout."""
    from dataclasses import replace

    model = hybrid_pair.model
    config = replace(model.config, layout="original")
    table = parameter_sources(config, parameter_shapes(config))
    state = {table[name].names[0]: parameter.contiguous() for name, parameter in model.named_parameters()}
    low, high = model.config.vision.siglip, model.config.vision.sam
    decoder = model.config.decoder
    raw = {
        "model_type": "multi_modality",
        "vision_config": {"cls": "HybridVisionTower", "params": {
            "high_res_cfg": {"model_name": "own", **vars(high), "pixel_mean": model.config.vision.high_norm.mean,
                             "pixel_std": model.config.vision.high_norm.std},
            "low_res_cfg": {"model_name": "own", "select_layer": -1, **vars(low), "pixel_mean": [0.5] * 3, "pixel_std": [0.5] * 3}}},
        "aligner_config": {"params": {"projector_type": "low_high_hybrid_split_mlp_gelu",
                                      "n_embed": decoder.width, "depth": 2}},
        "language_config": {"vocab_size": decoder.vocab_size, "hidden_size": decoder.width,
                            "num_hidden_layers": decoder.layers, "num_attention_heads": decoder.heads,
                            "intermediate_size": decoder.mlp_width,
                            "max_position_embeddings": decoder.max_positions},
    }  # fmt: skip
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.config.layout == "original"
    assert same(dict(checkpoint.load_model().named_parameters()), dict(model.named_parameters()))


def test_unused_tensors_of_real_checkpoints_are_accepted(tiny_copy: Path) -> None:
    file = tiny_copy / "model.safetensors"
    state = load_file(file)
    for name in ("vision_model.vision_tower_low.vision_tower.attn_pool.q.weight",
                 "vision_model.high_layer_norm.weight", "vision_model.low_layer_norm.bias",
                 "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"):  # fmt: skip
        state[name] = torch.zeros(3)
    save_file(state, file)
    open_checkpoint(str(tiny_copy))


def test_missing_unexpected_and_wrong_in_one_error(tiny_copy: Path) -> None:
    file = tiny_copy / "model.safetensors"
    state = load_file(file)
    del state["aligner.layers.1.bias"], state["language_model.model.norm.weight"]
    state["aligner.extra"] = torch.zeros(2)
    state["language_model.lm_head.weight"] = torch.zeros(7, 7)
    save_file(state, file)
    with pytest.raises(UserError) as caught:
        open_checkpoint(str(tiny_copy))
    assert "2 missing: aligner.layers.1.bias, language_model.model.norm.weight" in str(caught.value)
    assert "1 unexpected: aligner.extra" in str(caught.value)
    assert "language_model.lm_head.weight is [7, 7], expected [512, 128]" in str(caught.value)


def test_tied_heads(siglip_pair: OraclePair, tmp_path: Path) -> None:
    """A checkpoint that ties its head does not store it."""
    save_oracle(siglip_pair.oracle, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="1 missing: lm_head.weight"):
        open_checkpoint(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    model = open_checkpoint(str(tmp_path)).load_model()
    assert torch.equal(model.decoder.head.weight, model.token_embedding.weight)


def test_where_a_checkpoint_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"The folder .* does not exist"):
        resolve_checkpoint(str(tmp_path / "absent"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file; give the folder"):
        resolve_checkpoint(str(tmp_path / "file"))
    with pytest.raises(UserError, match="holds no weights"):
        edit = tmp_path / "empty"
        edit.mkdir()
        (edit / "config.json").write_text(Path(resolve_checkpoint("tiny")[0] / "config.json").read_text())
        open_checkpoint(str(edit))
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="install huggingface_hub"):
        resolve_checkpoint("deepseek-ai/deepseek-vl-1.3b-chat")


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*args: object, **kwargs: object) -> str:
        raise ConnectionError("no route to the hub\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(
        UserError, match=r"The hub did not give deepseek-ai/deepseek-vl-1.3b-chat: no route to the hub\.$"
    ):
        resolve_checkpoint("deepseek-ai/deepseek-vl-1.3b-chat")


def test_tokenizers_without_the_special_tokens(tiny_copy: Path) -> None:
    raw = json.loads((tiny_copy / "tokenizer.json").read_text())
    raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] != "<image_placeholder>"]
    (tiny_copy / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="has no token '<image_placeholder>'"):
        prompt_spec(open_checkpoint(str(tiny_copy)))
    (tiny_copy / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer.json"):
        prompt_spec(open_checkpoint(str(tiny_copy)))


def test_write_original_rounds_to_half(tiny_copy: Path, tmp_path: Path) -> None:
    """The writer of the tiny checkpoint gives back what it was given."""
    import tokenizers

    model = open_checkpoint(str(tiny_copy)).load_model()
    raw = json.loads((tiny_copy / "config.json").read_text())
    tokenizer = tokenizers.Tokenizer.from_file(str(tiny_copy / "tokenizer.json"))
    write_original_checkpoint(model, raw, tokenizer, tmp_path / "written")
    assert same(parameters(tmp_path / "written"), dict(model.named_parameters()))


def test_streamed_weights_compute_the_same(pair: OraclePair) -> None:
    """Weights are there only while their module runs, and the numbers are equal to the last bit."""
    streamed = pair.checkpoint.load_model(streamed=True)
    side = pair.model.config.vision.image_size
    pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    embeds = pair.model.encode_image(pixels)
    assert torch.equal(streamed.encode_image(pixels), embeds)
    assert torch.equal(streamed.logits(embeds), pair.model.logits(embeds))
    assert all(parameter.is_meta for parameter in streamed.parameters())
