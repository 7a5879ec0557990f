"""Adapters that a bundle cannot switch, and files that are not what they should be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsvl_export import UserError
from dsvl_export.exporter.adapters import parse_named, remove_adapters
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.files import read_json, write_json
from runtimes.bundle.manifest import MANIFEST
from tests.adapters import PREFIX, write_decoder_adapter
from tests.dsvl_export.cli.command_line import refused


def dora(settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    settings["use_dora"] = True
    for name in [name for name in tensors if name.endswith("lora_B.weight")]:
        tensors[name.replace("lora_B.weight", "lora_magnitude_vector")] = torch.ones(len(tensors[name]))


def vision_target(settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    stem = "base_model.model.aligner.layers.1"
    tensors[f"{stem}.lora_A.weight"] = torch.ones(4, 128)
    tensors[f"{stem}.lora_B.weight"] = torch.ones(128, 4)


def saved_module(settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.language_model.model.norm.weight"] = torch.ones(128)


def embedding(settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{PREFIX}embed_tokens.lora_embedding_A"] = torch.ones(4, 512)
    tensors[f"{PREFIX}embed_tokens.lora_embedding_B"] = torch.ones(128, 4)


def nan(settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors[sorted(tensors)[0]][0, 0] = torch.nan


def other_base(settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "lora_A" in name]:
        tensors[name] = torch.ones(4, 77)


def rank_0(settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    settings["r"] = 0


def too_large(settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    settings["lora_alpha"] = 1e9


Edit = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (dora, "q_proj (DoRA)"),
        (
            vision_target,
            "it changes adaptor.layers.1, but only LoRA of linear layers of the decoder can; merge it",
        ),
        (saved_module, "it changes decoder.norm (replaced), but"),
        (embedding, "it changes token_embedding, but"),
        (nan, "holds NaN or infinity"),
        (other_base, "was made for another model"),
        (rank_0, "r is 0"),
        (too_large, "exceeds the range of fp16"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_refused_adapter_leaves_the_bundle_as_it_was(
    switchable_copy: Path, tmp_path: Path, run, edit: Edit, sentence: str
) -> None:
    folder = write_decoder_adapter(tmp_path / "a", modules=("q_proj",))
    settings = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(settings, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    before = (
        sorted(path for path in switchable_copy.rglob("*") if path.is_file()),
        Bundle.open(switchable_copy).manifest,
    )
    assert refused(run("add-adapter", switchable_copy, f"new={folder}"), sentence)
    after = (
        sorted(path for path in switchable_copy.rglob("*") if path.is_file()),
        Bundle.open(switchable_copy).manifest,
    )
    assert before == after
    if edit is not too_large:  # of fp16 alone
        done = run("export", "tiny", "--switchable-adapter", f"new={folder}", "--output", tmp_path / "b")
        assert refused(done, sentence)
        assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "name", ["", "a/b", "../a", ".a", "-a", "a b", "ä", "a" * 65, "a\n", "onnxruntime/fp32"]
)
def test_names_that_are_no_file_names(name: str, decoder_adapters: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="cannot be the name of an adapter"):
        parse_named([f"{name}={decoder_adapters['all']}"])


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (["german"], "as NAME=FOLDER, not 'german'"),
        (["german="], "as NAME=FOLDER, not 'german='"),
        (["a=x", "a=y"], "Two adapters have the name 'a'"),
        (["German=x", "german=y"], "the adapters 'German' and 'german' differ only in case"),
        (["a=x=nan"], "The weight 'nan' of the adapter x is not a number"),
    ],
)
def test_malformed_choices(texts: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse_named(texts)


def test_a_name_that_differs_from_another_in_case(
    switchable_copy: Path, decoder_adapters: dict[str, Path], run
) -> None:
    """Some file systems do not tell the files apart."""
    named = f"ALL={decoder_adapters['some']}"
    sentence = "the adapters 'all' and 'ALL' differ only in case"
    assert refused(run("add-adapter", switchable_copy, named), sentence)
    done = run("export", "tiny", "--switchable-adapter", named, "--output", switchable_copy)
    assert refused(done, sentence)
    assert Bundle.open(switchable_copy).problems() == []


def test_adapters_of_an_export_that_is_not_switchable(
    decoder_adapters: dict[str, Path], tmp_path: Path, run
) -> None:
    named = f"new={decoder_adapters['all']}"
    done = run("export", "tiny", "--no-switchable", "--switchable-adapter", named, "--output", tmp_path / "b")
    assert refused(done, f"is not switchable, but has the switchable adapter {named}")
    (tmp_path / "export.yaml").write_text(
        f"checkpoint: tiny\nswitchable_adapters: [{named}]\nonnxruntime: {{switchable: false}}\n"
    )
    done = run("export", "--config", tmp_path / "export.yaml", "--output", tmp_path / "b")
    assert refused(done, "is not switchable, but has the switchable adapter")
    assert not (tmp_path / "b").exists()


def test_the_same_adapter_twice(decoder_adapters: dict[str, Path], tmp_path: Path, run) -> None:
    folder = decoder_adapters["all"]
    done = run(
        "export", "tiny", "--adapter", folder, "--adapter", f"{folder}=0.5", "--output", tmp_path / "b"
    )
    assert refused(done, f"The adapter {folder} is given twice")


@pytest.mark.parametrize(
    "backend", ["coreml", "coreai", "executorch", "openvino", "tensorrt", "tensorrt_rtx"]
)
def test_other_backends_are_refused(
    tiny_bundle: Bundle, decoder_adapters: dict[str, Path], tmp_path: Path, run, backend: str
) -> None:
    folder = Path(shutil.copytree(tiny_bundle.folder, tmp_path / "bundle"))
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    for artifact in manifest["artifacts"]:
        artifact["backend"] = backend
    file.write_text(json.dumps(manifest))
    named = f"new={decoder_adapters['all']}"
    assert refused(
        run("add-adapter", folder, named),
        f"is for {backend} fp32, {backend} fp16, which cannot switch adapters",
    )
    assert refused(
        run("run", folder, "-p", "Hello", "--adapter", "new"), f"The backend {backend} cannot switch adapters"
    )
    if backend == "coreml":
        done = run(
            "export", "tiny", "--backend", backend, "--switchable-adapter", named, "--output", tmp_path / "b"
        )
        assert refused(done, f"The backend {backend} cannot switch adapters")
        assert not (tmp_path / "b").exists()


def test_a_plain_bundle_is_refused(
    tiny_bundle: Bundle, decoder_adapters: dict[str, Path], tmp_path: Path, run
) -> None:
    folder = Path(shutil.copytree(tiny_bundle.folder, tmp_path / "bundle"))
    done = run("add-adapter", folder, f"new={decoder_adapters['all']}")
    assert refused(done, "was exported without switchable adapters (onnxruntime fp32, onnxruntime fp16)")
    assert refused(
        run("chat", folder, "--adapter", "new"), "was exported without switchable adapters, so new cannot be"
    )
    assert refused(run("remove-adapter", folder, "new"), "has no adapter 'new'; it has none")


def test_a_damaged_file_is_refused(switchable_copy: Path, run) -> None:
    ask = ("run", switchable_copy, "-p", "Hello", "--precision", "fp32", "--adapter", "all")
    file = switchable_copy / "adapters/onnxruntime/fp32/all/all.onnx_adapter"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert refused(
        run(*ask), "all.onnx_adapter has a wrong SHA-256; add it again with 'dsvl-export add-adapter"
    )
    file.write_bytes(b"no adapter")
    assert refused(run(*ask, "--no-verify"), "is not an adapter that ONNX Runtime can read")
    shutil.copyfile(switchable_copy / "adapters/onnxruntime/fp16/all/all.onnx_adapter", file)
    assert refused(run(*ask, "--no-verify"), "does not fit the decoder")
    file.unlink()
    assert refused(run(*ask), "all.onnx_adapter is missing")
    assert run("run", switchable_copy, "-p", "Hello", "--adapter", "some", "--max-new-tokens", "2").code == 0


@pytest.mark.parametrize("file", ["all.onnx_adapter", "onnxruntime/fp32/decoder/decoder.onnx"])
def test_files_outside_of_an_adapters_folder_are_refused(
    switchable_bundle: Bundle, tmp_path: Path, file: str
) -> None:
    """``remove-adapter`` removes the folder of an adapter's file."""
    folder = Path(shutil.copytree(switchable_bundle.folder, tmp_path / "bundle"))
    raw = read_json(folder / MANIFEST)
    entry = raw["adapters"][0]
    raw["files"][file] = raw["files"][entry["file"]]
    entry["file"] = file
    write_json(folder / MANIFEST, raw)
    before = sorted(folder.rglob("*"))
    with pytest.raises(
        UserError, match=f"the file '{file}' for the adapter 'all', expected one in adapters/"
    ):
        remove_adapters(folder, ["all"])
    assert sorted(folder.rglob("*")) == before
