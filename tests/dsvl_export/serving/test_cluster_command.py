"""The command ``serve --ray``: how it starts, what it refuses, how it ends."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from dsvl_export.serving import ray_deployment as deploying
from dsvl_export.serving.app import create_app
from dsvl_export.serving.images import ImageLimits
from dsvl_export.serving.models import ModelOptions
from dsvl_export.serving.replicas import STATUS_SECONDS
from dsvl_export.serving.service import BundleWatch, ServeOptions
from runtimes.bundle.bundle import Bundle
from tests.dsvl_export.cli.command_line import refused
from tests.dsvl_export.compilers.nodes import replicas
from tests.dsvl_export.serving.replicas import OnlyOneReplica
from tests.dsvl_export.serving.server import LONG, MODEL, ask, running, sentence


def test_the_command(tiny_bundle: Bundle, two_nodes: Any, run) -> None:
    """It starts, answers, finishes what runs at SIGTERM, and takes its replicas away."""
    serve = ("serve", str(tiny_bundle.folder), "--port", "0", "--ray", two_nodes.address)
    command = [sys.executable, "-m", "dsvl_export.cli", *serve]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            line = process.stdout.readline()
            assert line.startswith(f"Serving {MODEL} at http://127.0.0.1:")
            replicas(2)
            sentence = "2 replicas need 2 CPUs and 0 GPUs, but only 0 CPUs"
            assert refused(run(*serve), sentence)
            replicas(2)
            body = {"model": MODEL, "messages": ask("Hello."), **LONG, "stream": True}
            url = f"{line.split()[3]}/v1/chat/completions"
            with httpx.stream("POST", url, json=body, timeout=60) as answer:
                lines = answer.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                rest = [text for text in lines if text]
            assert rest[-1] == "data: [DONE]"
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    replicas(0)


@pytest.mark.full
def test_a_server_that_was_killed(tiny_bundle: Bundle, two_nodes: Any) -> None:
    """It leaves its replicas; the next one at its address replaces them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    serve = ("serve", str(tiny_bundle.folder), "--port", port, "--ray", two_nodes.address)
    command, left = [sys.executable, "-m", "dsvl_export.cli", *serve], []
    for kill in (signal.SIGKILL, signal.SIGINT):
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            try:
                assert process.stdout
                assert process.stdout.readline().startswith(f"Serving {MODEL}")
                found = replicas(2)
                assert not set(found) & set(left)
                left = found
            finally:
                process.send_signal(kill)
    replicas(0)


@pytest.mark.full
def test_replicas_that_cannot_start(
    two_nodes: Any, bundle_copy: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = ("serve", str(bundle_copy), "--port", "0", "--ray", two_nodes.address)
    assert refused(run(*serve, "--replicas", "3"), "room for 2 replicas with 1 CPUs, not for 3.")
    assert refused(
        run(*serve, "--threads", "2"), "A replica needs 2 CPUs, but no machine of the cluster has that."
    )
    assert refused(
        run(*serve, "--device", "cuda"),
        "A replica needs 1 CPUs and a GPU, but no machine of the cluster has that.",
    )
    with monkeypatch.context() as patch:
        patch.setattr(deploying, "Replica", OnlyOneReplica)
        assert refused(run(*serve), "There is no place for a second one.")
    with monkeypatch.context() as patch:
        patch.setattr(BundleWatch, "fingerprint", "of another")
        assert refused(run(*serve, "--replicas", "1"), "is another bundle than the served one")
    embedding = bundle_copy / Bundle.open(bundle_copy).manifest.token_embedding
    embedding.write_bytes(embedding.read_bytes()[:-1] + b"x")
    assert refused(run(*serve, "--replicas", "1"), "token_embedding")
    replicas(0)


@pytest.mark.full
def test_a_cluster_that_ends(tiny_bundle: Bundle, two_nodes: Any) -> None:
    """While it is served: refused in a sentence, and closed without another word."""
    from ray import serve

    with deploying.deploy_replicas(
        two_nodes.address, tiny_bundle, ModelOptions(threads=1), ImageLimits(), 1, "ending"
    ) as service:
        with running(create_app(service, ServeOptions(local=True))) as url:
            body = {"model": MODEL, "messages": ask("Hello.")}
            assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code == 200
            serve.delete("ending")
            time.sleep(STATUS_SECONDS)
            health = httpx.get(f"{url}/healthz")
            assert (health.status_code, health.json()["detail"]) == (503, "No replica is running now.")
            refusal = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
            assert (refusal.status_code, sentence(refusal)) == (
                503,
                "3 replicas died at this request; check the log of the cluster.",
            )
            assert not service.running.total()


def test_what_is_no_cluster(run, tiny_bundle: Bundle) -> None:
    serve = ("serve", str(tiny_bundle.folder), "--port", "0")
    assert refused(run(*serve, "--ray", "127.0.0.1:1"), "Cannot connect to a Ray cluster at '127.0.0.1:1'")
    assert refused(run(*serve, "--ray", "ray://127.0.0.1:1"), "serve must run on a machine of the cluster")
    assert refused(run(*serve, "--replicas", "2"), "pass --ray ADDRESS too.")
