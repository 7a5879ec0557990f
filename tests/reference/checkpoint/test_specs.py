"""Which tokens end an answer, by the files of a checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from reference.checkpoint.checkpoint import open_checkpoint
from reference.checkpoint.specs import prompt_spec
from reference.tiny import TINY
from runtimes.errors import UserError

EOS_ID = 502  # of tiny's tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json",
                 "tokenizer_config.json"):  # fmt: skip
        shutil.copyfile(TINY / name, tmp_path / name)
    return tmp_path


def eos_ids(folder: Path, generation: Any, top: Any = None, text: Any = None) -> tuple[int, ...]:
    """Of tiny with these settings; ``...`` leaves the generation config out."""
    if generation is not ...:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    config = json.loads((TINY / "config.json").read_text())
    config["eos_token_id"] = top
    config["language_config"]["eos_token_id"] = text
    (folder / "config.json").write_text(json.dumps(config))
    return prompt_spec(open_checkpoint(str(folder))).eos_ids


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (([EOS_ID, 7],), (EOS_ID, 7)),
        (([7, EOS_ID, 9, 7],), (EOS_ID, 7, 9)),
        ((7,), (EOS_ID, 7)),
        ((None, [8], 9), (EOS_ID,)),
        ((..., [8, 7], 9), (EOS_ID, 8, 7)),
        ((..., None, [9]), (EOS_ID, 9)),
        ((..., None, None), (EOS_ID,)),
        (([-1, 512, 7],), (EOS_ID, 7)),
    ],
)
def test_end_tokens(folder: Path, settings: tuple[Any, ...], expected: tuple[int, ...]) -> None:
    """The tokenizer's end token, and those that transformers takes from the same files."""
    assert eos_ids(folder, *settings) == expected
    if settings[0] is not ...:
        found = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
    else:
        config = json.loads((folder / "config.json").read_text())
        config["text_config"] = config.pop("language_config")
        found = transformers.GenerationConfig.from_model_config(config).eos_token_id
    produced = [found] if isinstance(found, int) else found or []
    assert set(expected) == {EOS_ID, *(number for number in produced if 0 <= number < 512)}


@pytest.mark.parametrize("setting", ["</s>", [1, "2"], True, 1.5, {"id": 1}])
def test_what_is_no_token_id_is_one_sentence(folder: Path, setting: Any) -> None:
    with pytest.raises(UserError, match=r"generation_config.json has the eos_token_id .* neither a token id"):
        eos_ids(folder, setting)


def test_a_generation_config_belongs_to_the_checkpoints_identity(folder: Path) -> None:
    before = open_checkpoint(str(folder)).digest
    eos_ids(folder, [EOS_ID, 7])
    assert open_checkpoint(str(folder)).digest != before


def test_a_tokenizer_without_a_longest_text(folder: Path) -> None:
    """transformers writes 10^30 then, as a float has it."""
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "model_max_length": int(1e30)}))
    checkpoint = open_checkpoint(str(folder))
    assert prompt_spec(checkpoint) == prompt_spec(open_checkpoint("tiny"))
