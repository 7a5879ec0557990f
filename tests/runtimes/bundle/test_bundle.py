"""Bundles of strangers: what leads out of them is not read, unless the manifest's hash proves it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from dsvl_export.parity_check import parity
from dsvl_export.parity_check.goldens import Goldens
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.manifest import MANIFEST
from runtimes.bundle.tensor_files import save_tensors
from runtimes.errors import UserError
from runtimes.goldens.golden import load_golden
from runtimes.pipeline import Pipeline


@pytest.fixture
def cached(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """A bundle as huggingface_hub's cache keeps it: every file is a link to a blob outside."""
    blobs, snapshot = tmp_path / "models--me/blobs", tmp_path / "models--me/snapshots/abc"
    blobs.mkdir(parents=True)
    for file in tiny_bundle.folder.rglob("*"):
        if file.is_file() and ".staging" not in file.parts:
            blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copyfile(file, blob)
            link = snapshot / file.relative_to(tiny_bundle.folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_a_bundle_of_links_to_blobs_runs(cached: Path, tiny_bundle: Bundle, pictures: list[Path]) -> None:
    answers = {
        Pipeline.open(folder, verify=verify).chat("What is this?", pictures[:1]).text
        for folder, verify in ((tiny_bundle.folder, True), (cached, True), (cached, False))
    }
    assert len(answers) == 1
    assert Bundle.open(cached).problems() == []
    assert parity(cached, precision="fp32").verdict == "passed"


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "onnxruntime/fp32/adaptor/adaptor.onnx"])
def test_links_to_other_content_are_not_read(cached: Path, name: str, verify: bool, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes((cached / name).read_bytes()[:-1] + b" ")
    (cached / name).unlink()
    (cached / name).symlink_to(secret)
    with pytest.raises(UserError, match=r"has a wrong SHA-256"):
        Pipeline.open(cached, verify=verify)
    with pytest.raises(UserError, match="leads outside the bundle"):
        Bundle.open(cached).path(name)


def test_a_loop_of_links_is_one_sentence(cached: Path) -> None:
    (cached / "tokenizer/tokenizer.json").unlink()
    (cached / "tokenizer/tokenizer.json").symlink_to("tokenizer.json")
    with pytest.raises(UserError):
        Pipeline.open(cached)


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "a\\x", "C:x", "a\0b", ""])
def test_paths_that_leave_the_bundle_are_refused(path: str, bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    with pytest.raises(UserError, match="leads outside the bundle"):
        bundle.path(path)
    raw = json.loads((bundle_copy / MANIFEST).read_text())
    raw["files"][path] = {"bytes": 1, "sha256": "0" * 64}
    (bundle_copy / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(UserError):
        Bundle.open(bundle_copy)


def test_names_that_become_names_of_files_are_checked(bundle_copy: Path) -> None:
    raw = json.loads((bundle_copy / MANIFEST).read_text())
    raw["contracts"]["../../x"] = raw["contracts"]["fp32"]
    raw["artifacts"][0]["precision"] = "../../x"  # its report would be ../../x.json
    (bundle_copy / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(UserError, match="cannot be the name of a file"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize("name", ["../../../secret.png", "/secret.png", "..", "folder/00.png", "a\\b.png"])
def test_golden_images_stay_in_the_bundle(bundle_copy: Path, name: str) -> None:
    file = next((bundle_copy / "goldens").glob("*.safetensors"))
    with safe_open(file, framework="np") as handle:
        texts = handle.metadata()
    save_tensors(load_file(file), file, {**texts, "images": json.dumps([name])})
    with pytest.raises(UserError, match="which is not in the bundle"):
        load_golden(file)


def test_golden_images_are_in_the_manifest(bundle_copy: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    goldens = Goldens.of_bundle(bundle)
    with safe_open(goldens.files[0], framework="np") as handle:
        texts = handle.metadata()
    (bundle_copy / "goldens/images/planted.png").symlink_to(tmp_path / "secret.png")
    save_tensors(load_file(goldens.files[0]), goldens.files[0], {**texts, "images": '["planted.png"]'})
    with pytest.raises(UserError, match="names an image that the manifest does not list"):
        goldens.load(0, texts["checkpoint"])


def test_the_schema_is_compiled_once(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling it takes 40 ms, checking a manifest less than 1 ms."""
    Bundle.open(tiny_bundle.folder)
    monkeypatch.delattr("fastjsonschema.compile")
    assert Bundle.open(tiny_bundle.folder).manifest == tiny_bundle.manifest
