"""Downloads from the Hugging Face hub, against a stand-in of its HTTP API."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtimes.errors import UserError
from runtimes.hub import HubId
from tests.hub_server import Hub, Repository, running_hub

ASK = """
import sys
from runtimes.errors import UserError
from runtimes.hub import HubId, download
try:
    snapshot = download(HubId.parse(sys.argv[1]), *[part.split(",") for part in sys.argv[2:]])
    print(snapshot.folder, snapshot.commit)
except UserError as error:
    print("refused:", error)
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as found:
        yield found


def ask(hub: Hub, home: Path, *arguments: str, **environment: str) -> str:
    """In a process of its own, since ``huggingface_hub`` reads its environment when it is imported."""
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", ASK, *arguments],
        env={**os.environ, **settings, **environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_names() -> None:
    assert HubId.parse("org/name") == HubId("org/name")
    assert HubId.parse("org/name@v1.0/x") == HubId("org/name", "v1.0/x")
    assert str(HubId("org/name", "main")) == "org/name@main"
    for text in (
        "name",
        "/org/name",
        "./org/name",
        "../name",
        "a/b/c",
        "org/name@",
        "~/name",
        "org/.",
        "a b/c",
        "",
    ):
        assert HubId.parse(text) is None, text


def test_a_revision_and_its_commit(hub: Hub, tmp_path: Path) -> None:
    repository = hub.repositories["org/name"] = Repository()
    first = repository.commit(
        {"config.json": b"1", "model.bin": b"x" * 10, "sub/config.json": b"2"}, "main", "v1"
    )
    second = repository.commit({"config.json": b"3"}, "main")
    folder, commit = ask(hub, tmp_path, "org/name@v1", "*.json", "*/*").split()
    assert commit == first
    assert sorted(path.name for path in Path(folder).iterdir()) == ["config.json"]
    assert (Path(folder) / "config.json").read_bytes() == b"1"
    assert ask(hub, tmp_path, "org/name").split()[1] == second
    assert ask(hub, tmp_path, f"org/name@{first}").split()[1] == first


def test_an_interrupted_download_resumes(hub: Hub, tmp_path: Path) -> None:
    data = os.urandom(12_000_000)  # written in parts of 10 MB
    hub.repositories["org/name"] = repository = Repository()
    repository.commit({"model.safetensors": data})
    hub.cut = 11_000_000
    first = ask(hub, tmp_path, "org/name")
    hub.cut = None
    folder = Path(ask(hub, tmp_path, "org/name").split()[0])
    assert (folder / "model.safetensors").read_bytes() == data
    ranges = [span for method, path, span in hub.requests if method == "GET" and "resolve" in path and span]
    assert any(not span.startswith("bytes=0-") for span in ranges), (first, ranges)


def test_private_and_gated(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["org/private"] = private = Repository(token="secret")
    hub.repositories["org/gated"] = gated = Repository(token="secret", gated=True)
    for repository in (private, gated):
        repository.commit({"config.json": b"1"})
    assert "no repository org/private, or it is private" in ask(hub, tmp_path, "org/private")
    assert "org/gated is gated; accept its terms" in ask(hub, tmp_path, "org/gated")
    for name in ("org/private", "org/gated"):
        assert "refused" not in ask(hub, tmp_path, name, HF_TOKEN="secret")


def test_what_is_not_there(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["org/name"] = repository = Repository()
    repository.commit({"config.json": b"1"})
    assert ask(hub, tmp_path, "org/other").startswith("refused: The hub has no repository org/other")
    assert ask(hub, tmp_path, "org/name@v9").startswith("refused: org/name has no revision 'v9'")


def test_without_a_network(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["org/name"] = repository = Repository()
    commit = repository.commit({"config.json": b"1"})
    assert "HF_HUB_OFFLINE is set" in ask(hub, tmp_path, "org/name", HF_HUB_OFFLINE="1")
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    refused = ask(hub, tmp_path, "org/name", **nowhere)
    assert refused.startswith(
        "refused: The hub (http://127.0.0.1:9) cannot be reached, and org/name is not complete"
    )
    assert ask(hub, tmp_path, "org/name").split()[1] == commit
    assert ask(hub, tmp_path, "org/name", HF_HUB_OFFLINE="1").split()[1] == commit
    assert ask(hub, tmp_path, "org/name", **nowhere).split()[1] == commit


def test_a_full_disk(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = importlib.import_module("huggingface_hub")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    from runtimes.hub import download

    with pytest.raises(
        UserError, match="The disk is full .*run the same command again: the download resumes"
    ):
        download(HubId("org/name"))
