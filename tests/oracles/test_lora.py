"""LoRA adapters merged at export, against PEFT's own merge."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from reference.checkpoint.checkpoint import open_checkpoint
from reference.checkpoint.lora_adapter import AdapterChoice
from reference.model.deepseek_vl import DeepSeekVL
from tests.conftest import OraclePair
from tests.oracles.models import IMAGE_TOKEN_ID, save_oracle
from tests.oracles.test_transformers import error, image, prompt_ids

peft = pytest.importorskip("peft")

EVERYWHERE = [
    "q_proj",
    "k_proj",
    "v_proj",
    "out_proj",
    "o_proj",
    "fc1",
    "fc2",
    "gate_proj",
    "up_proj",
    "down_proj",
]
CASES: dict[str, dict[str, Any]] = {
    "decoder": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "every linear layer": {"target_modules": "all-linear"},
    "towers and adaptor": {"target_modules": r".*(vision_model|high_res|aligner).*(fc1|fc2|qkv|lin1|attn\.proj|linear1|linear2|q_proj)"},
    "convolutions": {"target_modules": r".*(patch_embedding|patch_embed\.projection|neck\.conv2|proj\.conv1)"},
    "rsLoRA": {"target_modules": EVERYWHERE, "use_rslora": True},
    "DoRA": {"target_modules": EVERYWHERE, "use_dora": True},
    "DoRA of convolutions": {"target_modules": r".*(patch_embedding|patch_embed\.projection|neck\.conv2)", "use_dora": True},
    "patterns": {
        "target_modules": EVERYWHERE,
        "rank_pattern": {r"layers\.1\..*q_proj": 2, "down_proj": 5},
        "alpha_pattern": {"down_proj": 32, "v_proj": 1},
    },
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "o_proj"]},
    "DoRA of the embedding": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "saved modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "aligner", "post_layernorm"]},
    "biases": {"target_modules": ["q_proj", "fc1", "out_proj"], "bias": "lora_only"},
    "biases of LoRA": {"target_modules": ["fc1", "fc2"], "lora_bias": True},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
}  # fmt: skip


def train(oracle: transformers.PreTrainedModel, folder: Path, seed: int = 0, **settings: Any) -> None:
    """Save an adapter with random weights, large enough that every one matters."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(copy_of(oracle), peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **settings}))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            scale = 0.3 * parameter.detach().abs().mean().clamp(min=0.2)
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    with warnings.catch_warnings():  # it saves embeddings, too; and takes biases for matrices
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)


def copy_of(oracle: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    other = type(oracle)(oracle.config)
    other.load_state_dict(oracle.state_dict())
    return other.eval()


def merged(oracle: transformers.PreTrainedModel, *folders: Path) -> transformers.PreTrainedModel:
    """The model as PEFT merges it."""
    model = peft.PeftModel.from_pretrained(copy_of(oracle), folders[0], adapter_name="a0")
    names = ["a0"]
    for number, folder in enumerate(folders[1:], 1):
        names.append(model.load_adapter(folder, adapter_name=f"a{number}") and f"a{number}")
    return model.base_model.merge_and_unload(adapter_names=names).eval()


def assert_equal_logits(found: DeepSeekVL, expected: DeepSeekVL, pair: OraclePair) -> None:
    """Every logit of a prompt with a picture, to 1e-6 of the largest."""
    pixels, ids = image(pair, 1), prompt_ids(pair, images=1)
    ours, theirs = (
        model.logits(model.merge(ids, model.encode_image(pixels), IMAGE_TOKEN_ID))
        for model in (found, expected)
    )
    assert error(ours, theirs) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_merged_as_peft_merges(pair: OraclePair, case: str, tmp_path: Path) -> None:
    train(pair.oracle, tmp_path / "adapter", **CASES[case])
    save_oracle(merged(pair.oracle, tmp_path / "adapter"), tmp_path / "merged")
    folder = str(pair.checkpoint.folder)
    ours = open_checkpoint(folder, adapters=[AdapterChoice(tmp_path / "adapter")])
    theirs = open_checkpoint(str(tmp_path / "merged"))
    changed = 0
    for name, parameter in theirs.load_model().named_parameters():
        assert error(ours.load(name).float(), parameter) < 1e-6, name
        changed += not torch.equal(pair.checkpoint.load(name), parameter)
    assert changed
    assert ours.digest != pair.checkpoint.digest
    assert_equal_logits(ours.load_model(), theirs.load_model(), pair)


def test_two_adapters(pair: OraclePair, tmp_path: Path) -> None:
    """Both on some layers; PEFT merges one after the other."""
    train(pair.oracle, tmp_path / "a", target_modules=EVERYWHERE, seed=1)
    train(pair.oracle, tmp_path / "b", target_modules=["q_proj", "fc1", "lm_head"], seed=2)
    save_oracle(merged(pair.oracle, tmp_path / "a", tmp_path / "b"), tmp_path / "merged")
    choices = [AdapterChoice(tmp_path / name) for name in "ab"]
    ours = open_checkpoint(str(pair.checkpoint.folder), adapters=choices)
    assert_equal_logits(ours.load_model(), open_checkpoint(str(tmp_path / "merged")).load_model(), pair)


def original_names(pair: OraclePair, folder: Path) -> None:
    """Rename the tensors of an adapter as if it had been trained on the original layout (decoder and adaptor)."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    rules = (("model.model.language_model.", "model.language_model.model."), ("model.lm_head.", "model.language_model.lm_head."),
             ("model.model.aligner.linear1.", "model.aligner.layers.0."), ("model.model.aligner.linear2.", "model.aligner.layers.2."))  # fmt: skip
    for old, new in rules:
        tensors = {
            name.replace(f"base_model.{old}", f"base_model.{new}"): value for name, value in tensors.items()
        }
    assert not any(name.startswith("base_model.model.model.") for name in tensors)
    save_file(tensors, file)


def test_names_of_the_other_layout(siglip_pair: OraclePair, tmp_path: Path) -> None:
    """An adapter that was trained on the original checkpoint, with the same model in transformers' layout."""
    train(
        siglip_pair.oracle,
        tmp_path / "a",
        target_modules=r".*(language_model.*(q_proj|gate_proj)|aligner.linear\d|lm_head)",
    )
    save_oracle(merged(siglip_pair.oracle, tmp_path / "a"), tmp_path / "merged")
    original_names(siglip_pair, tmp_path / "a")
    ours = open_checkpoint(str(siglip_pair.checkpoint.folder), adapters=[AdapterChoice(tmp_path / "a")])
    assert_equal_logits(
        ours.load_model(), open_checkpoint(str(tmp_path / "merged")).load_model(), siglip_pair
    )


def test_a_weighted_adapter(siglip_pair: OraclePair, tmp_path: Path) -> None:
    """Half of the change is the adapter with half of its alpha."""
    settings = {"target_modules": EVERYWHERE, "r": 4}
    train(siglip_pair.oracle, tmp_path / "a", lora_alpha=8, **settings)
    train(siglip_pair.oracle, tmp_path / "half", lora_alpha=4, **settings)
    folder = str(siglip_pair.checkpoint.folder)
    choice = AdapterChoice.parse(f"{tmp_path / 'a'}=0.5")
    assert choice == AdapterChoice(tmp_path / "a", 0.5)
    weighted = open_checkpoint(folder, adapters=[choice])
    half = open_checkpoint(folder, adapters=[AdapterChoice(tmp_path / "half")])
    assert_equal_logits(weighted.load_model(), half.load_model(), siglip_pair)
    assert weighted.digest != open_checkpoint(folder, adapters=[AdapterChoice(tmp_path / "a")]).digest
