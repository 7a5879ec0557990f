"""Names of tensors: what transformers loads, ours loads, with the same values."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from reference.checkpoint.checkpoint import open_checkpoint, parameter_shapes
from reference.checkpoint.layouts import canonical_names, parameter_sources
from reference.checkpoint.released import released_config
from runtimes.errors import UserError
from tests.conftest import OraclePair
from tests.oracles.models import save_oracle

Rename = Callable[[str], str]


def rule(*pairs: tuple[str, str]) -> Rename:
    """Applies regular expressions one after the other."""

    def rename(name: str) -> str:
        for pattern, replacement in pairs:
            name = re.sub(pattern, replacement, name)
        return name

    return rename


FLAT = (r"^model\.(vision_model\.)+", "model.vision_model.")
NESTED = (r"^model\.(vision_model\.)+", "model.vision_model.vision_model.")
BARE = (r"^model\.", "")
LANGUAGE = (r"^(model\.)?language_model\.", r"\1language_model.model.")

LOADED_BY_BOTH: dict[str, Rename] = {
    "flat": rule(FLAT),
    "nested": rule(NESTED),
    "flat without model": rule(FLAT, BARE),
    "nested without model": rule(NESTED, BARE),
    "SigLIP without model": rule(NESTED, (r"^model\.vision_model\.", "vision_model.")),
    "language model nested": rule(LANGUAGE),
    "language model nested, without model": rule(
        (r"^model\.language_model\.", "language_model.model.model.")
    ),
    "head inside the model": rule((r"^lm_head\.", "model.lm_head.")),
    "model twice": rule((r"^model\.", "model.model.")),
}
# Names of SigLIP's history, which transformers does not accept for Janus.
LOADED_BY_SIGLIP = ("nested", "nested without model", "SigLIP without model")
LOADED_BY_OURS: dict[str, Rename] = {
    "language model nested, bare": rule(BARE, LANGUAGE),
    "head in the language model": rule((r"^lm_head\.", "language_model.lm_head.")),
    "head in the model's language model": rule((r"^lm_head\.", "model.language_model.lm_head.")),
    "DistributedDataParallel": rule((r"^", "module.")),
    "DeepSpeed and torch.compile": rule((r"^", "_orig_mod.module.")),
    "merged by PEFT": rule((r"^", "base_model.model.")),
    "held by a trainer": rule((r"^", "policy.actor_module.")),
    "torch.compile": rule((r"^", "_orig_mod.")),
    "torch.compile inside": rule((r"^model\.", "model._orig_mod.")),
    "FSDP": rule((r"\.layers\.(\d+)\.", r".layers.\1._fsdp_wrapped_module."), (r"^", "module.")),
}


def renamed(pair: OraclePair, folder: Path, rename: Rename) -> None:
    save_oracle(pair.oracle, folder)
    state = load_file(folder / "model.safetensors")
    save_file({rename(name): tensor for name, tensor in state.items()}, folder / "model.safetensors")


def assert_loaded(pair: OraclePair, folder: Path) -> None:
    found = dict(open_checkpoint(str(folder)).load_model().named_parameters())
    assert all(torch.equal(found[name], value) for name, value in pair.model.named_parameters())


@pytest.mark.parametrize("naming", LOADED_BY_BOTH)
def test_names_that_transformers_loads(pair: OraclePair, tmp_path: Path, naming: str) -> None:
    renamed(pair, tmp_path, LOADED_BY_BOTH[naming])
    if pair.oracle.config.model_type == "janus" and naming in LOADED_BY_SIGLIP:
        assert_loaded(pair, tmp_path)
        return
    theirs, info = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = pair.oracle.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in theirs.state_dict().items())
    assert_loaded(pair, tmp_path)


@pytest.mark.parametrize("naming", LOADED_BY_OURS)
def test_names_that_ours_loads_as_well(pair: OraclePair, tmp_path: Path, naming: str) -> None:
    renamed(pair, tmp_path, LOADED_BY_OURS[naming])
    assert_loaded(pair, tmp_path)


@pytest.mark.parametrize("size", ["1.3b", "7b"])
@pytest.mark.parametrize(
    "rename",
    [
        rule((r"^", "model.")),
        rule((r"^", "module.")),
        rule((r"^", "base_model.model.")),
        rule((r"^language_model\.model\.", "language_model.")),
        rule((r"^language_model\.model\.", "model.language_model.model.model.")),
        rule((r"^language_model\.lm_head\.", "lm_head.")),
        rule((r"^language_model\.lm_head\.", "model.lm_head.")),
    ],
)
def test_names_of_the_original_layout(size: str, rename: Rename) -> None:
    """Each stands for one tensor of the layout, and none for another's."""
    config = released_config(size)
    table = parameter_sources(config, parameter_shapes(config))
    names = [name for source in table.values() for name in source.names]
    assert canonical_names(config, map(rename, names)) == {name: [rename(name)] for name in names}


def test_a_tensor_under_two_names(siglip_pair: OraclePair, tmp_path: Path) -> None:
    save_oracle(siglip_pair.oracle, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["model.lm_head.weight"] = state["lm_head.weight"] + 1
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="1 under two names: lm_head.weight and model.lm_head.weight"):
        open_checkpoint(str(tmp_path))
