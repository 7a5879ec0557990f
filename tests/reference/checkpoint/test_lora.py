"""LoRA adapters that are refused, each with one sentence."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reference.checkpoint.checkpoint import Checkpoint, open_checkpoint, parameter_shapes
from reference.checkpoint.config_file import parse_config
from reference.checkpoint.lora_adapter import AdapterChoice
from reference.checkpoint.lora_targets import Targets
from reference.checkpoint.released import RELEASED_CONFIGS
from runtimes.errors import UserError

LAYER = "base_model.model.language_model.model.layers.0.self_attn.q_proj"
Edit = Callable[[dict[str, Any], dict[str, Tensor]], None]


def write_adapter(folder: Path, rank: int = 2, scale: float = 1.0, **settings: Any) -> Path:
    """An adapter for one layer of tiny."""
    width = open_checkpoint("tiny").config.decoder.width
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    tensors = {
        f"{LAYER}.lora_A.weight": scale * torch.randn(rank, width, generator=generator),
        f"{LAYER}.lora_B.weight": torch.randn(width, rank, generator=generator),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["q_proj"], **settings}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def edited(folder: Path, edit: Edit) -> None:
    """Change an adapter's settings and tensors."""
    file = folder / "adapter_config.json"
    settings, tensors = json.loads(file.read_text()), load_file(folder / "adapter_model.safetensors")
    edit(settings, tensors)
    file.write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")


def opened(*folders: Path | str) -> Checkpoint:
    return open_checkpoint("tiny", adapters=[AdapterChoice.parse(str(folder)) for folder in folders])


def test_an_aligner_that_only_the_original_layout_has() -> None:
    """Three layers: transformers' DeepSeek-VL has no name for the third one."""
    raw = copy.deepcopy(RELEASED_CONFIGS["1.3b"])
    raw["aligner_config"]["params"]["depth"] = 3
    config = parse_config(raw, "config.json")
    targets = Targets(config, parameter_shapes(config))
    assert targets["aligner.layers.4.weight"].parameter == "adaptor.layers.4.weight"
    assert targets["model.aligner.linear2.weight"].parameter == "adaptor.layers.2.weight"


def test_the_change(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "decoder.layers.0.self_attn.q_proj.weight"
    base, found = open_checkpoint("tiny").load(name), opened(folder).load(name)
    expected = (
        base.double()
        + 2 * tensors[f"{LAYER}.lora_B.weight"].double() @ tensors[f"{LAYER}.lora_A.weight"].double()
    )
    assert found.dtype == torch.float32 != base.dtype
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()
    other = "decoder.layers.1.self_attn.q_proj.weight"
    assert torch.equal(opened(folder).load(other), open_checkpoint("tiny").load(other))


def other_base(settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.lora_A.weight"] = torch.zeros(2, 77)


def other_vocabulary(settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.language_model.lm_head.weight"] = torch.zeros(530, 128)


def nothing_fits(settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[name.replace("self_attn", "attention")] = tensors.pop(name)


def a_part_fits(settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[name.replace("layers.0", "layers.99")] = tensors[name].clone()


def half(settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    del tensors[f"{LAYER}.lora_B.weight"]


def nan(settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.lora_B.weight"][0, 0] = float("nan")


def twice(settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.lora_A.other.weight"] = tensors[f"{LAYER}.lora_A.weight"].clone()


def under_both_layouts(settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        other = name.replace("model.language_model.model.", "model.model.language_model.")
        tensors[other] = tensors[name].clone()


def of_integers(settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[name] = tensors[name].to(torch.int8)


def another_part(settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.lora_A.bias"] = torch.zeros(2)


def setting(**changes: Any) -> Edit:
    return lambda settings, tensors: settings.update(changes)


REFUSED: dict[str, tuple[Edit, str]] = {
    "another base": (other_base, r"was made for another model: 1 tensors have other shapes: .*q_proj.lora_A.weight is \[2, 77\]"),
    "another vocabulary": (other_vocabulary, r"was trained with another vocabulary: .*lm_head.weight is \[530, 128\], .*; resize the base"),
    "nothing fits": (nothing_fits, r"none of its tensors belong to it; 2 do not: .*attention\.q_proj\.lora_A"),
    "a part fits": (a_part_fits, r"only a part of its tensors belong to it; 2 do not: .*layers\.99"),
    "one matrix": (half, "only one of the two LoRA matrices of language_model"),
    "rank 0": (setting(r=0), "r is 0, expected an integer from 1"),
    "another rank": (setting(r=8), "has rank 2 in .*, but adapter_config.json says 8"),
    "alpha": (setting(lora_alpha="x"), "lora_alpha is 'x', expected a number"),
    "NaN": (nan, "lora_B.weight of the adapter .* holds NaN or infinity"),
    "DoRA without magnitudes": (setting(use_dora=True), "has no magnitude vector"),
    "IA3": (setting(peft_type="IA3"), "an adapter of the type IA3; only LoRA and DoRA can be merged"),
    "PiSSA": (setting(init_lora_weights="pissa_niter_16"), "base model's weights were changed when the training began"),
    "activated": (setting(alora_invocation_tokens=[3]), "which cannot be merged"),
    "a pattern": (setting(rank_pattern={"q_proj(": 2}), "is not a pattern"),
    "a slow pattern": (setting(rank_pattern={"(([a-z_.0-9])+)+!": 2}), "rank_pattern has a pattern that is too complex; name the modules"),
    "a huge pattern": (setting(rank_pattern={"a{99999999999}": 2}), "is not a pattern"),
    "a tensor twice": (twice, "which are the same tensor"),
    "under both layouts' names": (under_both_layouts, "changes a layer under two names"),
    "integers": (of_integers, "has tensors of other types than floats"),
    "another part": (another_part, "has unknown tensors: .*lora_A.bias"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    edit, sentence = REFUSED[case]
    folder = write_adapter(tmp_path / "a")
    edited(folder, edit)
    with pytest.raises(UserError, match=sentence):
        opened(folder).load("decoder.layers.0.self_attn.q_proj.weight")


def test_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no folder"):
        opened(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError, match="has no adapter_config.json, so it is not an adapter in PEFT's layout"
    ):
        opened(tmp_path / "empty")
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights of an adapter"):
        opened(folder)


@pytest.mark.parametrize("layout", ["adapter_model.bin", "pytorch_model.bin", "model.safetensors", "index"])
def test_weights_under_other_names(tmp_path: Path, layout: str) -> None:
    """As torch.save writes them, under the names of a model's weights, and in shards."""
    name = "decoder.layers.0.self_attn.q_proj.weight"
    folder = write_adapter(tmp_path / "a")
    expected = opened(folder).load(name)
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "additional_config.json").write_text('{"lora_dtype": null}')  # of ms-swift
    (folder / "args.json").write_text("{}")
    if layout == "index":
        shards = {key: f"adapter_model-0000{n + 1}-of-00002.safetensors" for n, key in enumerate(tensors)}
        for key, shard in shards.items():
            save_file({key: tensors[key]}, folder / shard)
        index = {"weight_map": shards}
        (folder / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    elif layout.endswith(".bin"):
        torch.save({f"module.{key}": tensor for key, tensor in tensors.items()}, folder / layout)
    else:
        save_file(tensors, folder / layout)
    assert torch.equal(opened(folder).load(name), expected)


def test_an_adapter_file_with_code(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": torch.nn.Linear(2, 2)}, folder / "adapter_model.bin")
    with pytest.raises(UserError, match="adapter_model.bin cannot be read as plain weights"):
        opened(folder)


def test_an_adapter_in_a_subfolder(tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    for number in (90, 100):
        write_adapter(tmp_path / "output" / f"checkpoint-{number}")
    sentence = "the folder .*checkpoint-100 is a LoRA adapter, the last of 2: give that one"
    with pytest.raises(UserError, match=f"has no adapter_config.json, .*; {sentence}"):
        opened(tmp_path / "output")
    with pytest.raises(UserError, match=f"has no config.json, .*; {sentence}"):
        open_checkpoint(str(tmp_path / "output"))


def test_two_that_scale_a_layer_differently(tmp_path: Path) -> None:
    """PEFT's ways to combine them differ: the user says what is meant."""
    first = write_adapter(tmp_path / "a")
    second = write_adapter(tmp_path / "b", lora_alpha=1)
    with pytest.raises(
        UserError, match=r"scale .*q_proj differently \(2 and 0.5\); give each a weight, as in --adapter"
    ):
        opened(first, second)
    opened(f"{first}=1", f"{second}=1")


@pytest.mark.parametrize("weight", ["nan", "1e999", "x", ""])
def test_a_weight_that_is_no_number(tmp_path: Path, weight: str) -> None:
    with pytest.raises(UserError, match="is not a number"):
        opened(f"{write_adapter(tmp_path / 'a')}={weight}")
