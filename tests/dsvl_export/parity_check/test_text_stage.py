"""The stage ``text``: a change between text and tokens fails, wherever it is, although all hashes are right."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as LibraryTokenizer

from dsvl_export.parity_check import compare, parity
from dsvl_export.parity_check.result import ParityResult, StageResult
from dsvl_export.parity_check.text import bundled_texts, judge_text
from reference.checkpoint.checkpoint import open_checkpoint
from reference.goldens.record import record_reference_texts
from reference.goldens.texts import GOLDEN_TEXTS, golden_conversations
from runtimes.bundle.bundle import Bundle
from runtimes.errors import UserError
from runtimes.goldens.texts import TextGoldens, rerecord_texts
from runtimes.session import Execution
from runtimes.text.prompt import EOS, IMAGE_PLACEHOLDER, ChatTemplate, PromptText
from runtimes.text.tokenizer import PromptSpec, Tokenizer
from tests.dsvl_export.parity_check.faults import rehash

FILE = "tokenizer/tokenizer.json"
Json = dict[str, Any]


def judged(bundle: Bundle) -> StageResult:
    result = ParityResult("onnxruntime", "fp32", Execution("ran"), "r")
    judge_text(Tokenizer(bundle.path(FILE), bundle.manifest.prompt), bundled_texts(bundle), result)
    return result.stage("text")


def swapped(first: int, second: int) -> Callable[[Json], None]:
    """Two entries of the vocabulary change places."""

    def edit(raw: Json) -> None:
        vocabulary = raw["model"]["vocab"]
        names = {number: name for name, number in vocabulary.items()}
        vocabulary[names[first]], vocabulary[names[second]] = second, first

    return edit


def without_merge(raw: Json) -> None:
    del raw["model"]["merges"][-1]


def other_merge_order(raw: Json) -> None:
    merges = raw["model"]["merges"]
    merges[100], merges[101] = merges[101], merges[100]


def spelled_control_token(raw: Json) -> None:
    raw["added_tokens"][1]["content"] = "<end>"


FAULTS: dict[str, Callable[[Json], Any]] = {
    "decoder": lambda raw: raw.update(decoder={"type": "Fuse"}),
    "normalizer": lambda raw: raw.update(normalizer={"type": "NFC"}),
    "lower case": lambda raw: raw.update(normalizer={"type": "Lowercase"}),
    "digits together": lambda raw: raw["pre_tokenizer"]["pretokenizers"].pop(1),
    "line breaks": lambda raw: raw["pre_tokenizer"]["pretokenizers"].pop(0),
    "letters": swapped(40, 41),
    "first bytes of characters": swapped(200, 201),
    "words": swapped(499, 500),
    "rare bytes": swapped(186, 187),
    "merge": without_merge,
    "order of merges": other_merge_order,
    "added token": spelled_control_token,
    "special": lambda raw: raw["added_tokens"][1].update(special=False),
}


@pytest.mark.parametrize("edit", FAULTS.values(), ids=FAULTS.keys())
def test_another_tokenizer_fails(tiny_bundle: Bundle, tmp_path: Path, edit: Callable[[Json], Any]) -> None:
    goldens = bundled_texts(tiny_bundle)
    assert goldens
    raw = json.loads(tiny_bundle.path(FILE).read_text())
    edit(raw)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(raw))
    result = ParityResult("onnxruntime", "fp32", Execution("ran"), "r")
    judge_text(Tokenizer(file, tiny_bundle.manifest.prompt), goldens, result)
    assert result.stage("text").state == "failed"
    assert "tokenizer.json differs from the checkpoint's" in result.stage("text").detail


def test_behavior_alone_is_seen_too(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same file: another version of the library would show as texts and tokens."""
    decode = LibraryTokenizer.decode
    assert judged(tiny_bundle).state == "passed"
    monkeypatch.setattr(
        "runtimes.text.tokenizer.Tokenizer.pieces",
        lambda self, ids: ["?" if number == 300 else decode(self._tokenizer, [number]) for number in ids],
    )
    assert judged(tiny_bundle).detail.startswith("tokens between 256 and 511 have other texts")
    monkeypatch.undo()
    encode = Tokenizer.encode
    monkeypatch.setattr(
        Tokenizer,
        "encode",
        lambda self, text: encode(self, text if isinstance(text, PromptText) else text.replace("1", "2")),
    )
    assert "has other tokens from position" in judged(tiny_bundle).detail


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"system_prompt": "You are a pirate."}, "system_prompt 'You are a pirate.'"),
        ({"eos_ids": (502, 11)}, "eos_ids [502, 11], the reference has [502]"),
        ({"eos_ids": (503,)}, "eos_ids [503]"),
        ({"bos_id": 502}, "bos_id 502"),
        ({"image_token_id": 503}, "image_token_id 503"),
        ({"image_tokens": 35}, "image_tokens 35"),
        ({"template": ChatTemplate(user="Human: ")}, "template {"),
        ({"template": ChatTemplate(text_separator="")}, "template {"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_another_prompt_fails(tiny_bundle: Bundle, change: Json, field: str) -> None:
    prompt = replace(tiny_bundle.manifest.prompt, **change)
    stage = judged(Bundle(tiny_bundle.folder, replace(tiny_bundle.manifest, prompt=prompt)))
    assert stage.state == "failed"
    assert field in stage.detail


def test_parity_and_compare_judge_text(bundle_copy: Path, tiny_bundle: Bundle) -> None:
    raw = json.loads((bundle_copy / FILE).read_text())
    swapped(499, 500)(raw)
    (bundle_copy / FILE).write_text(json.dumps(raw))
    bundle = rehash(bundle_copy, FILE)
    pair = ("onnxruntime", "fp32")
    for result in (parity(bundle, precision="fp32"), compare(tiny_bundle, bundle, pair, pair)):
        assert result.exit_code == 1
        assert result.stage("text").state == "failed"
    assert parity(tiny_bundle, precision="fp32").stage("text").state == "passed"


def test_goldens_come_from_the_checkpoint(tiny_bundle: Bundle, tiny_copy: Path) -> None:
    """Not from the bundle: its file holds what ``tokenizers`` says of the checkpoint's own file."""
    goldens = bundled_texts(tiny_bundle)
    assert goldens == record_reference_texts(open_checkpoint("tiny"))
    library = LibraryTokenizer.from_file(str(open_checkpoint("tiny").folder / "tokenizer.json"))
    for text in GOLDEN_TEXTS:
        assert goldens.raw[text] == [501, *library.encode(text, add_special_tokens=False).ids]
    texts = {tuple(tokens): text for tokens, text in goldens.answers}
    for tokens in goldens.raw.values():
        if tokens[1:]:
            assert texts[tuple(tokens[1:])] == library.decode(tokens[1:])
    (tiny_copy / "generation_config.json").write_text('{"eos_token_id": [502, 40]}')
    other = record_reference_texts(open_checkpoint(str(tiny_copy)))
    assert other.prompt["eos_ids"] == [502, 40]


def test_text_that_spells_control_tokens_stays_text(tiny_bundle: Bundle) -> None:
    goldens = bundled_texts(tiny_bundle)
    assert goldens
    (place,) = [i for i, text in enumerate(GOLDEN_TEXTS) if EOS in text and IMAGE_PLACEHOLDER in text]
    assert golden_conversations()[place].messages[0].content == GOLDEN_TEXTS[place]
    tokens = goldens.prompts[place]
    assert not {502, 503, 504} & set(tokens)
    assert {502, 503, 504} <= set(goldens.raw[GOLDEN_TEXTS[place]])


def test_a_damaged_file_is_one_sentence(bundle_copy: Path) -> None:
    path = "goldens/text.json"
    raw = json.loads((bundle_copy / path).read_text())
    for change in (
        {"prompts": [["a"]]},
        {"raw": []},
        {"conversations": [{}]},
        {"pieces": 3},
        {"vocabulary": "x"},
    ):
        (bundle_copy / path).write_text(json.dumps({**raw, **change}))
        with pytest.raises(UserError, match=r"text.json does not hold text goldens; export the bundle again"):
            bundled_texts(rehash(bundle_copy, path))


def test_lists_of_other_lengths_differ(tiny_bundle: Bundle) -> None:
    goldens = bundled_texts(tiny_bundle)
    assert goldens
    tokenizer = Tokenizer(tiny_bundle.path(FILE), PromptSpec.from_dict(goldens.prompt))
    assert isinstance(rerecord_texts(goldens, tokenizer), TextGoldens)
    fewer = replace(goldens, pieces=goldens.pieces[:1])
    result = ParityResult("onnxruntime", "fp32", Execution("ran"), "r")
    judge_text(tokenizer, fewer, result)
    assert "tokens between 256 and 511 have other texts" in result.stage("text").detail


def test_a_differing_chat_template_changes_no_verdict(tiny_bundle: Bundle) -> None:
    """It is a warning of the export: the built-in prompt is what is used and judged."""
    spec = replace(tiny_bundle.manifest.prompt, template_difference="The chat template differs.")
    result = ParityResult("onnxruntime", "fp32", Execution("ran"), "r")
    judge_text(Tokenizer(tiny_bundle.path(FILE), spec), bundled_texts(tiny_bundle), result)
    assert result.stage("text").state == "passed", result.stage("text").detail
