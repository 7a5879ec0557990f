"""Exports of checkpoints with a chat template of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsvl_export.exporter.export import export
from reference.checkpoint.checkpoint import open_checkpoint
from reference.goldens.record import record_reference_texts
from runtimes.bundle.bundle import Bundle
from runtimes.errors import UserError
from runtimes.goldens.texts import TEXT_GOLDENS, TextGoldens, rerecord_texts, text_differences
from runtimes.pipeline import Pipeline
from runtimes.text.tokenizer import Tokenizer
from tests.reference.checkpoint.test_chat_template import TEMPLATES, checkpoint_with

QUESTION = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"


def differences(bundle: Bundle, checkpoint: str) -> list[str]:
    """What the parity stage ``text`` finds, with the recorded goldens and with those of the checkpoint."""
    tokenizer = Tokenizer(bundle.path("tokenizer/tokenizer.json"), bundle.manifest.prompt)
    built_in = bundle.manifest.prompt.keeps_built_in
    live = record_reference_texts(open_checkpoint(checkpoint, built_in_prompt=built_in))
    expected = [TextGoldens.load(bundle.path(f"goldens/{TEXT_GOLDENS}")), live]
    return [line for texts in expected for line in text_differences(rerecord_texts(texts, tokenizer), texts)]


def test_a_template_is_used_everywhere_and_can_be_left_out(tmp_path: Path) -> None:
    """The same folder with the checkpoint's template and then with the built-in prompt."""
    (tmp_path / "checkpoint").mkdir()
    template = (TEMPLATES / "qwen2.jinja").read_text()
    checkpoint = str(checkpoint_with(tmp_path / "checkpoint", template, added="qwen2"))
    bundle = export(checkpoint, tmp_path / "bundle")
    prompt = str(Pipeline.open(bundle).format("Hi", 0))
    assert prompt == f"{QUESTION}<|im_start|>assistant\n"
    assert differences(bundle, checkpoint) == []

    bundle = export(checkpoint, tmp_path / "bundle", chat_template="built-in")
    assert str(Pipeline.open(bundle).format("Hi", 0)).endswith("\n\nUser: Hi\n\nAssistant:")
    assert "which is used: it renders '<|im_start|>" in bundle.manifest.prompt.template_difference
    assert differences(bundle, checkpoint) == []


def test_a_template_that_cannot_be_used(tmp_path: Path) -> None:
    """Nothing is written."""
    (tmp_path / "checkpoint").mkdir()
    checkpoint = checkpoint_with(tmp_path / "checkpoint", "{{ messages|length }}")
    with pytest.raises(
        UserError, match="cannot be used: it does not write each message once; use the option"
    ):
        export(checkpoint, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    with pytest.raises(UserError, match="chat template must be checkpoint or built-in, got 'own'"):
        export(checkpoint, tmp_path / "bundle", chat_template="own")
