"""Exports with LoRA adapters: the bundle is of the merged model, and every command names the adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsvl_export import UserError, export, parity
from dsvl_export.exporter.config import ExportConfig
from reference.checkpoint.checkpoint import open_checkpoint
from reference.checkpoint.lora_adapter import AdapterChoice
from reference.tiny import TINY
from runtimes.bundle.bundle import Bundle
from tests.dsvl_export.cli.command_line import refused
from tests.reference.checkpoint.test_lora import write_adapter


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("lora") / "mine", scale=0.01)


@pytest.fixture(scope="module")
def adapted(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Tiny with the adapter, in fp32."""
    return export("tiny", tmp_path_factory.mktemp("adapted") / "bundle", adapters=[str(adapter)])


def merged_checkpoint(adapter: Path, folder: Path) -> Path:
    """Tiny with the adapter merged into its file, in float32."""
    source = open_checkpoint("tiny", adapters=[AdapterChoice(adapter)])
    folder.mkdir()
    for file in TINY.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = {name: value.float() for name, value in load_file(TINY / "model.safetensors").items()}
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(tensors[name], source.load("decoder.layers.0.self_attn.q_proj.weight"))
    tensors[name] = source.load("decoder.layers.0.self_attn.q_proj.weight")
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_the_artifacts_of_a_merged_checkpoint(adapted: Bundle, adapter: Path, tmp_path: Path) -> None:
    folder = merged_checkpoint(adapter, tmp_path / "merged")
    merged = export(folder, tmp_path / "bundle", goldens=False)
    names = [path for path in merged.manifest.files if path.startswith("onnxruntime/")]
    assert names
    for name in names:
        assert merged.manifest.files[name] == adapted.manifest.files[name]
    assert adapted.manifest.checkpoint["name"] == "tiny+mine"
    assert adapted.manifest.checkpoint["sha256"] != merged.manifest.checkpoint["sha256"]


def test_it_is_judged_by_the_merged_model(adapted: Bundle, adapter: Path) -> None:
    assert parity(adapted).passed
    assert parity(adapted, live="tiny", adapters=[str(adapter)]).passed
    with pytest.raises(UserError, match="tiny is not the checkpoint that .* was exported from"):
        parity(adapted, live="tiny")


def test_the_audit_takes_the_adapter(adapted: Bundle, adapter: Path, run) -> None:
    verify = ("verify", str(adapted.folder), "--weights", "tiny")
    assert run(*verify, "--adapter", str(adapter)).code == 0
    assert run(*verify).code != 0
    assert refused(
        run("verify", str(adapted.folder), "--adapter", str(adapter)), "pass --weights CHECKPOINT too"
    )


def test_a_bundle_of_another_adapter_is_not_extended(adapted: Bundle, adapter: Path) -> None:
    with pytest.raises(UserError, match="another checkpoint"):
        export("tiny", adapted.folder, precisions=["fp16"])
    with pytest.raises(UserError, match="another checkpoint"):
        export("tiny", adapted.folder, precisions=["fp16"], adapters=[f"{adapter}=0.5"])


def test_the_config_keeps_the_adapter(adapted: Bundle, adapter: Path, tmp_path: Path) -> None:
    config = ExportConfig.read(adapted.folder / "configs/onnxruntime/fp32/export.yaml")
    assert config.adapters == (str(adapter),)
    (tmp_path / "export.yaml").write_text("checkpoint: tiny\nadapters: [mine=0.5]\n")
    assert ExportConfig.read(tmp_path / "export.yaml").adapters == (f"{tmp_path / 'mine'}=0.5",)


def test_a_folder_that_is_an_adapter_names_the_command(adapter: Path, tmp_path: Path, run) -> None:
    done = run("export", str(adapter), "--output", str(tmp_path / "b"))
    assert refused(done, f"dsvl-export export CHECKPOINT --adapter {adapter} --output BUNDLE.")
    assert not (tmp_path / "b").exists()
