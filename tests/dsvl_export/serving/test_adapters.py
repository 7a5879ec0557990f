"""``serve`` with switchable adapters: each is a model, as the official openai client sees it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from dsvl_export.exporter.adapters import remove_adapters
from runtimes.bundle.bundle import Bundle
from runtimes.memory import decoder_weights
from runtimes.pipeline import Pipeline
from tests.dsvl_export.serving.server import DESCRIBE, MODEL, Served, ask, sentence, serving

ADAPTERS = (None, "all", "some")


@pytest.fixture(scope="module")
def adapted(switchable_bundle: Bundle) -> Iterator[Served]:
    with serving(switchable_bundle, slots=4) as found:
        yield found


@pytest.fixture(scope="module")
def client(adapted: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{adapted.url}/v1", api_key="any", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def expected(switchable_bundle: Bundle, pictures: list[Path]) -> dict[tuple[str | None, int], str]:
    """Answers of a pipeline of its own for each adapter; all differ."""
    answers = {}
    for adapter in ADAPTERS:
        pipeline = Pipeline.open(switchable_bundle, "onnxruntime", "fp32", threads=1, adapter=adapter)
        for index in range(2):
            answers[adapter, index] = pipeline.chat(DESCRIBE, [pictures[index]]).text
    assert len({answers[adapter, 0] for adapter in ADAPTERS}) == 3
    return answers


def test_the_list_of_models(client: openai.OpenAI, switchable_bundle: Bundle) -> None:
    models = {model.id: model.to_dict() for model in client.models.list()}
    others = [
        f"onnxruntime/{name}:{adapter}"
        for name in ("fp16", "int4", "8da4w-g128")
        for adapter in ("all", "some")
    ]
    assert set(models) == {*map("/".join, switchable_bundle.choices()), "all", "some", *others}
    assert models["all"]["parent"] == MODEL
    assert models["onnxruntime/int4:some"]["parent"] == "onnxruntime/int4"
    assert "parent" not in models[MODEL]
    assert client.models.retrieve("all").id == client.models.retrieve(f"{MODEL}:all").id == "all"


def test_each_adapter_answers(client: openai.OpenAI, pictures: list[Path], expected) -> None:
    """The same question in turns: nothing of another adapter's cache is reused, one's own is."""
    for turn in range(2):
        for adapter in ADAPTERS:
            found = client.chat.completions.create(
                model=adapter or MODEL, messages=ask(DESCRIBE, pictures[0])
            )
            assert found.choices[0].message.content == expected[adapter, 0]
            assert found.model == (adapter or MODEL)
            assert found.usage and found.usage.prompt_tokens_details
            cached = found.usage.prompt_tokens_details.cached_tokens
            assert cached == (found.usage.prompt_tokens - 1 if turn else 0)


def test_all_at_once(adapted: Served, pictures: list[Path], expected) -> None:
    """Twelve requests of three kinds in four rows; the pictures are encoded once for all adapters."""
    jobs = [(adapter, index) for index in range(2) for adapter in ADAPTERS] * 2

    def answer(job: tuple[str | None, int]) -> str:
        adapter, index = job
        body = {"model": adapter or MODEL, "messages": ask(DESCRIBE, pictures[index])}
        return str(adapted.post(body).json()["choices"][0]["message"]["content"])

    with ThreadPoolExecutor(len(jobs)) as pool:
        assert list(pool.map(answer, jobs)) == [expected[job] for job in jobs]
    (model,) = adapted.models.open_models
    assert model.scheduler.chain.images_encoded == 2
    health = httpx.get(f"{adapted.url}/healthz").json()
    assert health["models"] == [MODEL, "all", "some"]


@pytest.mark.parametrize("name", ["none", f"{MODEL}:none", "onnxruntime/none:all", ":all", "all:", "ALL"])
def test_unknown_names(adapted: Served, name: str) -> None:
    response = adapted.post({"model": name, "messages": ask(DESCRIBE)})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "all, some" in sentence(response)


def test_another_precision(switchable_bundle: Bundle) -> None:
    """Its base model is opened with it."""
    with serving(switchable_bundle) as found:
        body = {"model": "onnxruntime/fp16:all", "messages": ask(DESCRIBE), "max_tokens": 4}
        response = found.post(body)
        assert response.status_code == 200, response.text
        assert response.json()["model"] == "onnxruntime/fp16:all"
        assert [model.name for model in found.models.open_models] == [MODEL, "onnxruntime/fp16"]


def test_a_changed_adapter_of_another_precision(switchable_bundle: Bundle, tmp_path: Path) -> None:
    """Its hash is checked when it is opened, as that of the default model's adapters."""
    folder = Path(shutil.copytree(switchable_bundle.folder, tmp_path / "bundle"))
    file = folder / "adapters/onnxruntime/fp16/all/all.onnx_adapter"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with serving(Bundle.open(folder)) as found:
        response = found.post({"model": "onnxruntime/fp16:all", "messages": ask(DESCRIBE)})
        assert response.status_code == 503
        assert "all.onnx_adapter" in sentence(response)


def test_an_adapter_that_cannot_be_opened(switchable_bundle: Bundle, tmp_path: Path) -> None:
    """The other models go on answering."""
    folder = Path(shutil.copytree(switchable_bundle.folder, tmp_path / "bundle"))
    (folder / "adapters/onnxruntime/fp32/all/all.onnx_adapter").write_bytes(b"damaged")
    with serving(Bundle.open(folder)) as found:
        response = found.post({"model": "all", "messages": ask(DESCRIBE)})
        assert response.status_code == 503
        assert "all.onnx_adapter has 7 bytes" in sentence(response)
        for name in ("some", MODEL):
            assert found.post({"model": name, "messages": ask(DESCRIBE), "max_tokens": 2}).status_code == 200


def test_an_adapter_that_is_removed_while_it_is_served(switchable_copy: Path) -> None:
    """Its model says so; the other models go on answering."""
    with serving(Bundle.open(switchable_copy)) as found:
        remove_adapters(switchable_copy, ["all"])
        for name, status in (("all", 503), ("some", 200), (MODEL, 200)):
            response = found.post({"model": name, "messages": ask(DESCRIBE), "max_tokens": 2})
            assert response.status_code == status, response.text
        assert "all.onnx_adapter of the bundle changed while it was served" in sentence(
            found.post({"model": "all", "messages": ask(DESCRIBE)})
        )
        assert httpx.get(f"{found.url}/healthz").status_code == 200


def test_an_adapter_without_memory_for_it(switchable_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first adapter loads the decoder's weights once more; the KV caches of others fill later."""
    with serving(switchable_bundle) as found:
        (model,) = found.models.open_models
        free = model.cache_bytes + decoder_weights(switchable_bundle, *MODEL.split("/")) - 1
        monkeypatch.setattr("dsvl_export.serving.models.available_memory", lambda: free)
        response = found.post({"model": "all", "messages": ask(DESCRIBE)})
        assert response.status_code == 503
        assert "fp32 with adapters needs" in sentence(response)
        monkeypatch.setattr("dsvl_export.serving.models.available_memory", lambda: free + 1)
        assert found.post({"model": "all", "messages": ask(DESCRIBE), "max_tokens": 2}).status_code == 200
