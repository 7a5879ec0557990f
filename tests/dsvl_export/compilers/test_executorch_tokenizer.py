"""The tokenizer file for ExecuTorch's stock runner: the same tokens as Hugging Face's, or none and a reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dsvl_export.cli.app import app
from dsvl_export.compilers.executorch_program.tokenizer import translate, write_runner_tokenizer
from reference.checkpoint.checkpoint import open_checkpoint
from runtimes.backends.executorch_tokenizer import (
    RUNNER_TOKENIZER,
    TEXTS,
    encode_and_decode,
    tokenizer_differences,
)
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.manifest import MANIFEST
from runtimes.errors import UserError
from runtimes.text.prompt import EOS, IMAGE_PLACEHOLDER

pytest.importorskip("pytorch_tokenizers", reason="executorch is not installed here")
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def split(regex: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


# Steps of public tokenizers, on the vocabulary of tiny.
STEPS: Mapping[str, list[dict[str, Any]]] = {
    "deepseek": [
        split("[\r\n]"),
        split(r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳ]+"),
        split(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"),
        split(r"\s+$"),
        split("[一-龥ࠀ-一가-퟿]+"),
        {"type": "Digits", "individual_digits": True},
        BYTES,
    ],
    "gpt4": [
        split(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+",
            "Removed",
            invert=True,
        ),
        BYTES,
    ],
    "merged": [split("[ -/]", "MergedWithPrevious"), split("[A-M]", "MergedWithNext"), split(r"\d", "Contiguous"), BYTES],
}  # fmt: skip


def tiny_tokenizer() -> Path:
    return open_checkpoint("tiny").tokenizer_files[0]


def metaspace(folder: Path, scheme: str) -> Path:
    """A tokenizer in Llama's style; ``legacy`` has the mark put in by normalizers."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if scheme == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=scheme == "never")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", EOS, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS[:4], trainer)
    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = [item for item in raw["added_tokens"] if not item["content"].startswith("<0x")]
    image = {**raw["added_tokens"][-1], "content": IMAGE_PLACEHOLDER, "id": len(raw["model"]["vocab"])}
    raw["added_tokens"].append(image)
    file = folder / f"{scheme}.json"
    file.write_text(json.dumps(raw), encoding="utf-8")
    return file


def test_the_original_file_is_read_otherwise(tmp_path: Path) -> None:
    """What the rewritten file is for: the runner gives no tokens at all for a line without a line break."""
    found, _ = encode_and_decode(tiny_tokenizer(), ["What number is in the picture?"])
    assert found == [[]]
    different, compared = tokenizer_differences(tiny_tokenizer(), tiny_tokenizer())
    assert "What number is in the picture?" in different and len(different) < compared


def test_a_changed_vocabulary_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "runner.json"
    assert write_runner_tokenizer(file, tiny_tokenizer()).startswith("equal on 1")
    raw = json.loads(file.read_text())
    vocabulary = raw["model"]["vocab"]
    vocabulary["Q"], vocabulary["X"] = vocabulary["X"], vocabulary["Q"]
    file.write_text(json.dumps(raw))
    different, _ = tokenizer_differences(file, tiny_tokenizer())
    assert {"Q", "X"} <= set(different)


@pytest.mark.parametrize("name", STEPS)
def test_steps_of_public_tokenizers(name: str, tmp_path: Path) -> None:
    raw = json.loads(tiny_tokenizer().read_text())
    raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": STEPS[name]}
    raw["normalizer"] = {"type": "Sequence", "normalizers": []}
    original, file = tmp_path / "tokenizer.json", tmp_path / "runner.json"
    original.write_text(json.dumps(raw))
    assert write_runner_tokenizer(file, original).startswith("equal on")
    assert file.exists()


@pytest.mark.parametrize("scheme", ["legacy", "always", "never"])
def test_spaces_as_marks(scheme: str, tmp_path: Path) -> None:
    file = tmp_path / "runner.json"
    assert write_runner_tokenizer(file, metaspace(tmp_path, scheme)).startswith("equal on")


def test_what_cannot_be_equal_is_not_written(tmp_path: Path) -> None:
    """A prefix that only the first text of a prompt gets: the runner is given the texts one by one."""
    file = tmp_path / "runner.json"
    said = write_runner_tokenizer(file, metaspace(tmp_path, "first"))
    assert said.startswith("none: it tokenizes") and IMAGE_PLACEHOLDER[:10] in said
    assert not file.exists()
    raw = json.loads(tiny_tokenizer().read_text())
    raw["pre_tokenizer"] = {"type": "UnicodeScripts"}
    original = tmp_path / "scripts.json"
    original.write_text(json.dumps(raw))
    said = write_runner_tokenizer(file, original)
    assert said.startswith("none: ExecuTorch's tokenizer cannot read") and not file.exists()


def test_export_says_that_there_is_no_file(
    executorch_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path(shutil.copytree(executorch_bundle.folder, tmp_path / "bundle"))
    raw = json.loads((folder / MANIFEST).read_text())
    for artifact in raw["artifacts"]:
        if artifact["precision"] == "fp32":
            artifact["tools"][RUNNER_TOKENIZER] = "none: it tokenizes 3 texts differently: 'a [b] c'"
    (folder / MANIFEST).write_text(json.dumps(raw))
    monkeypatch.setattr("dsvl_export.exporter.export.export_bundle", lambda *_: Bundle.open(folder))
    options = ["--backend", "executorch", "--precision", "fp32", "--no-parity"]
    app(["export", "tiny", *options, "--output", str(folder)], standalone_mode=False)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("No tokenizer for ExecuTorch's runner") == 1
    assert "runner (fp32): it tokenizes 3 texts differently: 'a [b] c'. Apps must pass" in said


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    with pytest.raises(UserError, match="is not a readable tokenizer"):
        tokenizer_differences(broken, broken)


@pytest.mark.parametrize(
    ("pattern", "translated"),
    [
        (r"\d+", r"\p{Nd}+"),
        (r"[^\d\]^$]", r"[^\p{Nd}\]^$]"),
        (r"^a$", r"(?:\A|(?<=\n))a(?=\n|\z)"),
        (r"\\s", r"\\s"),
    ],
)
def test_patterns(pattern: str, translated: str) -> None:
    assert translate(pattern) == translated
