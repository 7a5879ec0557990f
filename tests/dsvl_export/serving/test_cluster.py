"""``serve --ray`` on a real Ray cluster of several nodes: the same face, and no request lost with a replica."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from dsvl_export.serving import ray_deployment as deploying
from dsvl_export.serving.app import create_app
from dsvl_export.serving.images import ImageLimits
from dsvl_export.serving.models import ModelOptions
from dsvl_export.serving.replicas import ClusterService
from dsvl_export.serving.service import ServeOptions
from runtimes.bundle.bundle import Bundle
from runtimes.generation.sampling import GenerationOptions
from runtimes.pipeline import Pipeline
from tests.dsvl_export.compilers.nodes import add_node, replicas
from tests.dsvl_export.serving.replicas import SlowReplica
from tests.dsvl_export.serving.server import DESCRIBE, MODEL, ask, running, sentence

NAME = "tested"
LONG = {"ignore_eos": True, "max_tokens": 200}  # a second


@pytest.fixture(scope="module")
def service(nodes: Any, tiny_bundle: Bundle) -> Iterator[ClusterService]:
    choice = ModelOptions(threads=1, slots=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deploying, "Replica", SlowReplica)
        with deploying.deploy_replicas(
            nodes.address, tiny_bundle, choice, ImageLimits(), None, NAME
        ) as found:
            yield found
    replicas(0, NAME)


@pytest.fixture(scope="module")
def url(service: ClusterService) -> Iterator[str]:
    with running(create_app(service, ServeOptions(local=True, seconds=120))) as found:
        yield found


@pytest.fixture(scope="module")
def handle(service: ClusterService) -> Any:
    """Of the deployment."""
    from ray import serve

    return serve.get_app_handle(NAME)


def post(url: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json={"model": MODEL, **body}, timeout=120)


def streamed(url: str, body: dict[str, Any]) -> tuple[str, str | None]:
    """A stream's text, and the error that ended it."""
    text = ""
    asked = {"model": MODEL, "stream": True, **body}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=asked, timeout=120) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    return text, str(event["error"]["message"])
                text += event["choices"][0]["delta"].get("content") or ""
    return text, None


def rests(service: ClusterService) -> None:
    """Wait until nothing is answered any more."""
    until = time.monotonic() + 20
    while service.running.total():
        assert time.monotonic() < until, "a request was not given up"
        time.sleep(0.01)


def test_the_same_face(
    url: str, service: ClusterService, nodes: Any, alone: Pipeline, pictures: list[Path]
) -> None:
    """Answers, streams, log probabilities and seeds are those of one machine, from all replicas."""
    replicas(len(nodes.list_all_nodes()), NAME)
    options = GenerationOptions(40, 1.3, top_p=0.9, seed=7)
    jobs = [(DESCRIBE, picture) for picture in pictures] * 3
    expected = [alone.chat(question, [picture]).text for question, picture in jobs]
    sampled = [alone.chat(question, [picture], options).text for question, picture in jobs]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:

        def answered(job: tuple[str, Path], **more: Any) -> Any:
            return client.chat.completions.create(model=MODEL, messages=ask(*job), **more)  # type: ignore[call-overload]

        with ThreadPoolExecutor(6) as pool:
            whole = list(pool.map(answered, jobs))
            seeded = list(
                pool.map(lambda job: answered(job, temperature=1.3, top_p=0.9, seed=7, max_tokens=40), jobs)
            )
            texts = list(pool.map(lambda job: streamed(url, {"messages": ask(*job)}), jobs))
        (choice,) = answered(jobs[0], logprobs=True, top_logprobs=2).choices
        assert [model.id for model in client.models.list().data] == service.names
    assert [found.choices[0].message.content for found in whole] == expected
    assert [found.choices[0].message.content for found in seeded] == sampled
    assert texts == [(text, None) for text in expected]
    assert "".join(entry.token for entry in choice.logprobs.content).strip() == expected[0]
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok", "models": [MODEL]}
    assert httpx.get(url).text.startswith("<!doctype html>")
    rests(service)
    assert f'dsvl_running_requests{{model="{MODEL}"}} 0.0' in httpx.get(f"{url}/metrics").text


def test_what_is_refused(url: str, service: ClusterService) -> None:
    """By the front end or by a replica: the same statuses and sentences as on one machine."""
    unknown = post(url, model="onnxruntime/int2", messages=ask("Hello."))
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    broken = post(url, messages=ask(DESCRIBE, b"no picture"))
    assert broken.status_code == 400
    assert sentence(broken).startswith("image 1")
    long = post(url, messages=ask("word " * 3000))
    assert long.status_code == 400
    assert "KV cache" in sentence(long)
    service.max_requests, before = 0, service.max_requests
    try:
        busy = post(url, messages=ask("Hello."))
    finally:
        service.max_requests = before
    assert (busy.status_code, busy.headers["retry-after"]) == (429, "1")
    assert not service.running.total()


def test_clients_that_go_away(url: str, service: ClusterService, handle: Any) -> None:
    """Their replicas stop at once, in the middle of answers of five seconds and before they began."""
    endless = {
        "model": MODEL,
        "messages": ask(DESCRIBE),
        "ignore_eos": True,
        "max_tokens": 900,
        "stream": True,
    }
    for _ in range(2 * service.max_requests // 3):
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=endless, timeout=60) as answer:
            next(answer.iter_lines())
    for _ in range(5):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/chat/completions", json={**endless, "stream": False}, timeout=0.3)
    rests(service)
    until = time.monotonic() + 2
    while any(handle.busy.remote().result() for _ in range(12)):  # any of them is asked
        assert time.monotonic() < until, "a replica goes on"


@pytest.mark.full
def test_a_replica_killed_under_load(
    url: str,
    service: ClusterService,
    nodes: Any,
    alone: Pipeline,
    pictures: list[Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whole answers are complete and right; a stream that breaks had begun, rightly, and says so."""
    options = GenerationOptions(LONG["max_tokens"], ignore_eos=True)
    expected = [alone.chat(DESCRIBE, [picture], options).text for picture in pictures]
    asked = [{"messages": ask(DESCRIBE, picture), **LONG} for picture in pictures] * 3
    victim, *others = replicas(len(nodes.list_all_nodes()), NAME)
    with ThreadPoolExecutor(24) as pool, caplog.at_level(logging.WARNING, "dsvl_export"):
        whole = [pool.submit(post, url, **body) for body in asked]
        streams = [pool.submit(streamed, url, body) for body in asked]
        until = time.monotonic() + 20
        while service.running.total() < 24:
            assert time.monotonic() < until
            time.sleep(0.01)
        time.sleep(0.5)
        os.kill(victim, signal.SIGKILL)
        texts = [each.result().json()["choices"][0]["message"]["content"] for each in whole]
        found = [each.result() for each in streams]
    assert texts == expected * 3
    broken = 0
    for (text, error), right in zip(found, expected * 3, strict=True):
        if error is None:
            assert text == right
        else:
            assert error == "The replica that generated this answer died; send the request again."
            assert text
            assert right.startswith(text)
            broken += 1
    lost = [record for record in caplog.records if "died" in record.getMessage()]
    assert len(lost) > broken  # requests that had not begun were on it as well
    assert victim not in replicas(len(others) + 1, NAME)
    assert post(url, messages=ask("Hello.")).status_code == 200


def test_a_request_that_ends_replicas(
    url: str, service: ClusterService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is given up after three."""
    from ray.exceptions import ActorDiedError

    class Dying:
        calls = 0

        def remote(self, work: Any) -> Dying:
            Dying.calls += 1
            return self

        async def __anext__(self) -> None:
            raise ActorDiedError()

        def cancel(self) -> None:
            raise ActorDiedError()

    monkeypatch.setattr(service, "answer", Dying())
    refusal = post(url, messages=ask("Hello."))
    assert (refusal.status_code, sentence(refusal)) == (
        503,
        "3 replicas died at this request; check the log of the cluster.",
    )
    assert Dying.calls == 3
    assert not service.running.total()


@pytest.mark.full
def test_a_machine_that_is_lost(
    url: str, service: ClusterService, nodes: Any, alone: Pipeline, pictures: list[Path]
) -> None:
    """As a replica, but that no other takes its place."""
    options = GenerationOptions(LONG["max_tokens"], ignore_eos=True)
    expected = [alone.chat(DESCRIBE, [picture], options).text for picture in pictures]
    count = len(nodes.list_all_nodes())
    with ThreadPoolExecutor(8) as pool:
        whole = [pool.submit(post, url, messages=ask(DESCRIBE, picture), **LONG) for picture in pictures * 2]
        time.sleep(0.5)
        nodes.remove_node(nodes.list_all_nodes()[-1], allow_graceful=False)
        try:
            texts = [each.result().json()["choices"][0]["message"]["content"] for each in whole]
            assert texts == expected * 2
            replicas(count - 1, NAME)
            assert httpx.get(f"{url}/healthz").status_code == 200
        finally:
            add_node(nodes)
