"""Commands on hub ids: a checkpoint is exported, a bundle is published, run and checked."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from reference.tiny import TINY
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.files import read_json
from tests.dsvl_export.cli.command_line import Done, refused
from tests.hub_server import Hub, Repository, running_hub


@pytest.fixture
def hub() -> Iterator[Hub]:
    """It has tiny as a checkpoint with a tag, beside files that are not downloaded."""
    with running_hub() as found:
        repository = found.repositories["org/tiny"] = Repository()
        files = {
            path.name: path.read_bytes()
            for path in TINY.iterdir()
            if path.suffix in (".json", ".safetensors")
        }
        repository.commit(
            {**files, "pytorch_model.bin": b"not read", "original/model.safetensors": b"nor this"},
            "main",
            "v1",
        )
        yield found


def command(hub: Hub, home: Path, *arguments: str, **environment: str) -> Done:
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "token",
    }
    done = subprocess.run(
        [sys.executable, "-m", "dsvl_export", *arguments], capture_output=True, text=True, cwd=home,
        env={**os.environ, **settings, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment},
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


def test_a_checkpoint_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    export = ("export", "org/tiny@v1", "--no-goldens", "--output", "made")
    assert command(hub, tmp_path, *export).code == 0
    checkpoint = read_json(tmp_path / "made" / "manifest.json")["checkpoint"]
    commit = hub.repositories["org/tiny"].refs["v1"]
    assert (checkpoint["name"], checkpoint["origin"]) == ("tiny", f"org/tiny@{commit}")
    assert not any("original/" in path or path.endswith(".bin") for _, path, _ in hub.requests)
    assert refused(command(hub, tmp_path, "export", "org/tiny@v2", "--output", "b"), "has no revision 'v2'")
    assert refused(command(hub, tmp_path, "export", "org/none", "--output", "b"), "no repository org/none")
    assert not (tmp_path / "b").exists()


@pytest.mark.full
def test_a_bundle_of_the_hub(hub: Hub, tiny_bundle: Bundle, tmp_path: Path) -> None:
    pushed = command(hub, tmp_path, "push", str(tiny_bundle.folder), "org/made", "--license", "mit")
    assert pushed.code == 0, pushed.err
    assert (
        pushed.out == f"Published as {hub.url}/org/made/commit/{hub.repositories['org/made'].refs['main']}.\n"
    )
    there = ("org/made", "--precision", "fp16")
    ask = ("--precision", "fp16", "--prompt", "Hello.", "--max-new-tokens", "4")
    local = command(hub, tmp_path, "run", str(tiny_bundle.folder), *ask)
    assert local.out
    assert command(hub, tmp_path, "run", "org/made", *ask).out == local.out
    judged = command(hub, tmp_path, "parity", *there, HF_HUB_OFFLINE="1")
    assert judged.code == 0, judged.err
    assert "pass --report FOLDER to keep the report" in judged.err
    assert not list((tmp_path / "hf").rglob("parity-*.json"))
    assert refused(command(hub, tmp_path, "run", "org/none", "--prompt", "Hello."), "no repository org/none")


def test_push_names_what_is_wrong(hub: Hub, tiny_copy: Path, bundle_copy: Path, tmp_path: Path) -> None:
    assert refused(command(hub, tmp_path, "push", str(bundle_copy), "made"), "give ORG/NAME")
    (bundle_copy / "token_embedding/token_embedding.safetensors").write_bytes(b"x")
    assert refused(command(hub, tmp_path, "push", str(bundle_copy), "org/broken"), "token_embedding")
    assert "org/broken" not in hub.repositories
