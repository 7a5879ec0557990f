"""``serve`` as its clients meet it: the official openai client, and clients that mean no good."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from runtimes.bundle.bundle import Bundle
from runtimes.generation.sampling import GenerationOptions
from runtimes.pipeline import Pipeline
from tests.dsvl_export.cli.command_line import refused
from tests.dsvl_export.serving.server import (
    DESCRIBE,
    LONG,
    MODEL,
    Served,
    ask,
    data_url,
    held,
    sentence,
    serving,
)


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as found:
        yield found


def test_an_answer(client: openai.OpenAI, alone: Pipeline, pictures: list[Path]) -> None:
    expected = alone.chat(DESCRIBE, [pictures[0]])
    found = client.chat.completions.create(model=MODEL, messages=ask(DESCRIBE, pictures[0]))  # type: ignore[arg-type]
    (choice,) = found.choices
    assert choice.message.content == expected.text
    assert choice.finish_reason == "stop"
    assert found.usage
    assert found.usage.prompt_tokens == expected.prompt_tokens
    assert found.usage.completion_tokens == len(expected.tokens)
    assert found.usage.total_tokens == expected.prompt_tokens + len(expected.tokens)


def test_a_stream(client: openai.OpenAI, alone: Pipeline, pictures: list[Path]) -> None:
    expected = alone.chat(DESCRIBE, [pictures[1]])
    stream = client.chat.completions.create(
        model=MODEL, messages=ask(DESCRIBE, pictures[1]), stream=True,  # type: ignore[arg-type]
        stream_options={"include_usage": True},
    )  # fmt: skip
    *chunks, last = stream
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "stop"]
    assert last.usage
    assert last.usage.completion_tokens == len(expected.tokens)


def test_a_stream_comes_as_it_is_written(client: openai.OpenAI) -> None:
    """Steps that were written while the server was busy come in one chunk, the others by themselves."""
    stream = client.chat.completions.create(
        model=MODEL, messages=ask(DESCRIBE), stream=True, extra_body=LONG, seed=1  # type: ignore[arg-type]
    )  # fmt: skip
    assert len(list(stream)) > 20


def test_turns_images_and_system(client: openai.OpenAI, alone: Pipeline, pictures: list[Path]) -> None:
    """Two pictures amid the text, a second turn that reuses the first, a system prompt of the client's."""
    first = alone.chat(DESCRIBE, pictures[:1])
    again = "What number is in the picture?"
    turns = [*ask(DESCRIBE, pictures[0]), {"role": "assistant", "content": first.text}]
    found = client.chat.completions.create(
        model=MODEL,
        messages=[*turns, {"role": "user", "content": again}],  # type: ignore[list-item]
    )
    history = [
        {"role": "user", "content": f"<image_placeholder>{DESCRIBE}"},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": again},
    ]
    assert found.choices[0].message.content == alone.chat(history, pictures[:1]).text
    assert found.usage
    assert found.usage.prompt_tokens_details
    assert (found.usage.prompt_tokens_details.cached_tokens or 0) >= first.prompt_tokens
    parts = [
        {"type": "text", "text": "Compare "},
        {"type": "image_url", "image_url": {"url": data_url(pictures[0]), "detail": "high"}},
        {"type": "text", "text": " and "},
        {"type": "image_url", "image_url": {"url": data_url(pictures[1])}},
    ]
    mine = {"role": "system", "content": "Be brief."}
    found = client.chat.completions.create(
        model=MODEL,
        messages=[mine, {"role": "user", "content": parts}],  # type: ignore[list-item]
    )
    text = "Be brief.\n\nUser: Compare <image_placeholder> and <image_placeholder>\n\nAssistant:"
    assert found.choices[0].message.content == alone.generate(text, pictures[:2]).text


def test_options(client: openai.OpenAI, alone: Pipeline, pictures: list[Path]) -> None:
    asked: Any = {"model": MODEL, "messages": ask(DESCRIBE, pictures[0])}
    sampled = client.chat.completions.create(**asked, temperature=1.5, top_p=0.9, seed=7, max_tokens=12)
    options = GenerationOptions(12, 1.5, top_p=0.9, seed=7)
    expected = alone.chat(DESCRIBE, [pictures[0]], options)
    assert sampled.choices[0].message.content == expected.text
    cut = client.chat.completions.create(**asked, max_completion_tokens=3)
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage
    assert cut.usage.completion_tokens == 3
    whole = alone.chat(DESCRIBE, [pictures[0]]).text
    stopped = client.chat.completions.create(**asked, stop=[whole[8:12]])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].message.content == whole[:8]
    ignored = client.chat.completions.create(**asked, user="me", n=1, frequency_penalty=0)
    assert ignored.choices[0].message.content == whole


def test_logprobs(client: openai.OpenAI, pictures: list[Path]) -> None:
    asked: Any = {"model": MODEL, "messages": ask(DESCRIBE, pictures[0]), "logprobs": True}
    whole = client.chat.completions.create(**asked, top_logprobs=2).choices[0]
    assert whole.logprobs
    entries = whole.logprobs.content or []
    assert "".join(entry.token for entry in entries).strip() == whole.message.content
    for entry in entries:
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0
        assert len(entry.top_logprobs) == 2
        assert bytes(entry.bytes or []).decode() == entry.token
    stream = client.chat.completions.create(**asked, stream=True)
    found = [
        entry
        for chunk in stream
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content or []
    ]
    assert [entry.token for entry in found] == [entry.token for entry in entries]
    assert not found[0].top_logprobs


def test_models(client: openai.OpenAI, served: Served) -> None:
    assert [model.id for model in client.models.list()] == [MODEL, "onnxruntime/fp16"]
    assert client.models.retrieve(MODEL).owned_by == "dsvl-export"
    assert httpx.get(f"{served.url}/healthz").json() == {"status": "ok", "models": [MODEL]}
    with pytest.raises(openai.NotFoundError, match="There is no model 'gpt'"):
        client.models.retrieve("gpt")


def test_many_at_once(client: openai.OpenAI, served: Served, alone: Pipeline, pictures: list[Path]) -> None:
    """Twenty requests in eight slots: nobody gets anybody else's answer, and all answers are a single user's."""
    rows = [(f"Describe the picture. {index}", pictures[index % 4]) for index in range(20)]
    expected = [alone.chat(question, [picture]).text for question, picture in rows]

    def one(row: tuple[str, Path]) -> str | None:
        found = client.chat.completions.create(model=MODEL, messages=ask(*row))  # type: ignore[arg-type]
        return found.choices[0].message.content

    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(one, rows)) == expected
    served.rests()


def test_switching_models(tiny_bundle: Bundle, pictures: list[Path]) -> None:
    """One model at a time: another is opened when the first rests, and refused while it answers."""
    with serving(tiny_bundle, keep=1) as found:
        body = {"model": "onnxruntime/fp16", "messages": ask(DESCRIBE, pictures[0])}
        assert found.post(body).json()["model"] == "onnxruntime/fp16"
        assert [model.name for model in found.models.open_models] == ["onnxruntime/fp16"]
        with held(found, body):
            refusal = found.post({**body, "model": MODEL})
            assert (refusal.status_code, refusal.headers["retry-after"]) == (503, "5")
            assert "1 models are answering" in sentence(refusal)
        named = found.post({**body, "model": tiny_bundle.folder.name})
        assert named.json()["model"] == MODEL


@pytest.mark.parametrize("verify", [True, False])
def test_a_damaged_model_does_not_close_the_open_one(
    tiny_bundle: Bundle, tmp_path: Path, pictures: list[Path], verify: bool
) -> None:
    """Its hash is checked before another model is closed; unchecked, the closed one is opened again."""
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.folder, folder)
    file = folder / tiny_bundle.artifact("decoder", "onnxruntime", "fp16").files[0]
    file.write_bytes(file.read_bytes()[:1000])
    with serving(Bundle.open(folder), keep=1, verify=verify) as found:
        before = found.models.open_models
        refusal = found.post({"model": "onnxruntime/fp16", "messages": ask("Hello.")})
        assert (refusal.status_code, refusal.headers["retry-after"]) == (503, "5")
        assert file.name in sentence(refusal)
        assert [model.name for model in found.models.open_models] == [MODEL]
        assert (found.models.open_models == before) == verify
        again = found.post({"model": "onnxruntime/fp16", "messages": ask("Hello.")})
        assert (again.status_code, again.json()) == (503, refusal.json())
        assert found.post({"model": MODEL, "messages": ask(DESCRIBE, pictures[0])}).status_code == 200


def test_sampling_without_a_seed(served: Served) -> None:
    """Each answer is another one; a seed of any size repeats it; the smallest temperature is greedy."""
    body = {"model": MODEL, "messages": ask("Hello."), "temperature": 2, "max_tokens": 30, "ignore_eos": True}
    texts = [
        served.post({**body, **seed}).json()["choices"][0]["message"]["content"]
        for seed in ({}, {}, {"seed": -1}, {"seed": -1})
    ]
    assert len(set(texts)) == 3
    cold, greedy = (served.post({**body, "temperature": value}).json()["choices"] for value in (9.8e-308, 0))
    assert cold == greedy


def test_a_stream_that_fails_says_so(
    served: Served, client: openai.OpenAI, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = served.models.open_models[0].pipeline.chain
    plain, calls = chain.decode, 0

    def decode(tokens: np.ndarray, cache: Any) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise RuntimeError("a secret path")
        return plain(tokens, cache)

    monkeypatch.setattr(chain, "decode", decode)
    stream = client.chat.completions.create(
        model=MODEL,
        messages=ask(DESCRIBE, pictures[0]),
        stream=True,  # type: ignore[arg-type]
    )
    with pytest.raises(openai.APIError, match="The server failed at this request; its log has the reason"):
        list(stream)
    monkeypatch.undo()
    served.rests()
    failed = f'dsvl_failed_streams_total{{model="{MODEL}"}} 1.0'
    assert failed in httpx.get(f"{served.url}/metrics").text.splitlines()
    assert served.post({"model": MODEL, "messages": ask("Hello.")}).status_code == 200


def test_figures(tiny_bundle: Bundle, pictures: list[Path]) -> None:
    with serving(tiny_bundle) as found:
        body = {"model": MODEL, "messages": ask(DESCRIBE, pictures[0])}
        used = [found.post(body).json()["usage"] for _ in range(2)]
        found.post({**body, "n": 3})
        lines = httpx.get(f"{found.url}/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    model = f'{{model="{MODEL}"}}'
    assert values['dsvl_requests_total{path="/v1/chat/completions",status="200"}'] == "2.0"
    assert values['dsvl_requests_total{path="/v1/chat/completions",status="400"}'] == "1.0"
    assert float(values[f"dsvl_prompt_tokens_total{model}"]) == sum(use["prompt_tokens"] for use in used)
    assert float(values[f"dsvl_completion_tokens_total{model}"]) == sum(
        use["completion_tokens"] for use in used
    )
    stored = 40  # tokens of the stored prefix, which the first request had
    assert float(values[f"dsvl_reused_tokens_total{model}"]) == stored + used[1]["prompt_tokens"] - 1
    assert values[f"dsvl_images_encoded_total{model}"] == "1.0"
    assert values[f"dsvl_first_token_seconds_count{model}"] == "2.0"
    assert values[f"dsvl_running_requests{model}"] == "0.0"


def test_the_command_stops_gracefully(tiny_bundle: Bundle, pictures: list[Path]) -> None:
    """SIGTERM while an answer streams: the answer is finished, then the process ends well."""
    command = [sys.executable, "-m", "dsvl_export.cli", "serve", str(tiny_bundle.folder), "--port", "0"]
    with subprocess.Popen(
        [*command, "--threads", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        line = process.stdout.readline()
        assert line.startswith(f"Serving {MODEL} at http://127.0.0.1:")
        url = line.split()[3]
        body = {"model": MODEL, "messages": ask(DESCRIBE, pictures[0]), **LONG, "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [text for text in lines if text]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Traceback" not in errors


def test_what_cannot_be_served(run, tiny_bundle: Bundle, tmp_path: Path) -> None:
    folder = str(tiny_bundle.folder)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        sentence = f"Cannot listen on 127.0.0.1 port {port}: Address already in use."
        assert refused(run("serve", folder, "--port", port), sentence)
    assert refused(run("serve", str(tmp_path / "none"), "--port", "0"), "none")
    assert refused(run("serve", folder, "--port", "0", "--precision", "int3"), "int3")
