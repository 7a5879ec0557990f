"""The command ``serve --ray``: how it starts, what it refuses, how it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from runtimes.bundle import Bundle
from tests.dsvl_export.command_line import refused
from tests.dsvl_export.nodes import ray_nodes, replicas
from tests.dsvl_export.serving import LONG, MODEL, ask


@pytest.fixture
def pair_of_nodes() -> Iterator[Any]:
    with ray_nodes(2) as found:
        yield found


def test_the_command(tiny_bundle: Bundle, pair_of_nodes: Any, run) -> None:
    """It starts, answers, finishes what runs at SIGTERM, and takes its replicas away."""
    serve = ("serve", str(tiny_bundle.folder), "--port", "0", "--ray", pair_of_nodes.address)
    command = [sys.executable, "-m", "dsvl_export.cli", *serve]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            line = process.stdout.readline()
            assert line.startswith(f"Serving {MODEL} at http://127.0.0.1:")
            replicas(2)
            sentence = "2 replicas need 2 CPUs, but other work has the cluster's; free are 0 CPUs."
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


def test_replicas_that_cannot_start(pair_of_nodes: Any, bundle_copy: Path, run) -> None:
    serve = ("serve", str(bundle_copy), "--port", "0", "--ray", pair_of_nodes.address)
    assert refused(run(*serve, "--replicas", "3"), "room for 2 replicas of 1 CPUs, not for 3.")
    embedding = bundle_copy / Bundle.open(bundle_copy).manifest.token_embedding
    embedding.write_bytes(embedding.read_bytes()[:-1] + b"x")
    assert refused(run(*serve), "token_embedding")
    replicas(0)


def test_what_is_no_cluster(run, tiny_bundle: Bundle) -> None:
    serve = ("serve", str(tiny_bundle.folder), "--port", "0")
    assert refused(run(*serve, "--ray", "127.0.0.1:1"), "There is no Ray cluster at '127.0.0.1:1'")
    assert refused(run(*serve, "--ray", "ray://127.0.0.1:1"), "serve runs on a machine of the cluster")
    assert refused(run(*serve, "--replicas", "2"), "give --ray ADDRESS.")
