"""Answers of the tiny model in a format: in every way of decoding, alone and together."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes import scheduler as scheduler_module
from runtimes.bundle.bundle import Bundle
from runtimes.generation.sampling import GenerationOptions
from runtimes.pipeline import Pipeline
from runtimes.scheduler import Scheduler
from runtimes.structured.response_format import FormatError, ResponseFormat
from tests.runtimes.structured.schemas import random_schema, with_definitions
from tests.runtimes.test_scheduler import Client, prompt

jsonschema = pytest.importorskip("jsonschema", reason="the extra structured is not installed")
pytest.importorskip("llguidance", reason="the extra structured is not installed")
FIELDS = {"the number in the picture": {"type": "integer", "minimum": 0, "maximum": 999},
          "color": {"enum": ["red", "green", "blue"]}, "a note": {"type": "string", "maxLength": 6}}  # fmt: skip
RECORD: dict[str, Any] = {
    "type": "object", "properties": FIELDS, "required": list(FIELDS), "additionalProperties": False,
}  # fmt: skip
QUESTION = "What number is in the picture?"


@pytest.fixture
def pipeline(tiny_bundle: Bundle) -> Pipeline:
    return Pipeline.open(tiny_bundle, "onnxruntime", "fp32", threads=1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_speculation_and_forced_tokens_change_nothing(
    pipeline: Pipeline, pictures: list[Path], temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token decoded by itself gives the same answer; forced ones need no step of their own."""
    steps: list[int] = []
    plain = pipeline.chain.decoder.decode

    def decode(embeds: np.ndarray, rows: np.ndarray, cache: Any) -> np.ndarray:
        steps.append(len(rows))
        return plain(embeds, rows, cache)

    monkeypatch.setattr(pipeline.chain.decoder, "decode", decode)
    speculated = 0
    for number in range(6):
        base = {"temperature": temperature, "seed": number, "response_format": RECORD, "logprobs": 2}
        steps.clear()
        plainly = pipeline.chat(QUESTION, pictures[:1], GenerationOptions(100, drafts=False, **base))
        assert set(steps) == {1} and len(steps) < len(plainly.tokens) - plainly.forced_tokens + 5
        drafted = pipeline.chat(QUESTION, pictures[:1], GenerationOptions(100, **base))
        speculated += drafted.drafted_tokens
        assert (drafted.text, drafted.tokens) == (plainly.text, plainly.tokens)
        assert drafted.forced_tokens == plainly.forced_tokens > 20
        jsonschema.validate(json.loads(plainly.text), RECORD)
    assert speculated > 0


def test_many_forced_tokens_are_decoded_in_pieces(pipeline: Pipeline) -> None:
    wanted = {"const": "some words " * 20}
    whole = pipeline.chat("Hello", [], GenerationOptions(500, response_format=wanted, logprobs=0))
    pipeline.reset()
    pipeline.chain.prefill_chunk = 32
    pieces = pipeline.chat("Hello", [], GenerationOptions(500, response_format=wanted, logprobs=0))
    assert (pieces.text, pieces.tokens) == (whole.text, whole.tokens) and whole.forced_tokens > 100


def test_the_next_turn_continues_with_what_the_cache_holds(pipeline: Pipeline, pictures: list[Path]) -> None:
    """Forced tokens at the end of an answer are not in the cache; all before them are."""
    options = GenerationOptions(100, response_format={"const": {"a": "the end of this answer is forced"}})
    first = pipeline.chat(QUESTION, pictures[:1], options)
    messages = [("user", QUESTION), ("assistant", first.text), ("user", "What color is it?")]
    turns = [{"role": role, "content": text} for role, text in messages]
    again = pipeline.chat(turns, pictures[:1])
    assert again.reused_tokens > first.prompt_tokens - 2
    pipeline.reset()
    assert pipeline.chat(turns, pictures[:1]).tokens == again.tokens


def check_records(opened: Pipeline, pictures: list[Path]) -> None:
    for seed in range(3):
        options = GenerationOptions(100, temperature=1, seed=seed, response_format=RECORD)
        found = opened.chat(QUESTION, pictures[:1], options)
        jsonschema.validate(json.loads(found.text), RECORD)
        assert found.finish_reason == "eos" and found.forced_tokens > 20


@pytest.mark.parametrize("one_row", [True, False])
def test_openvino(
    openvino_bundle: Bundle, pictures: list[Path], monkeypatch: pytest.MonkeyPatch, one_row: bool
) -> None:
    """Also with the session of an NPU, which gives one logit row in a call."""
    if one_row:
        monkeypatch.setattr("runtimes.backends.openvino.FIXED_SHAPE_DEVICES", ("cpu",))
    opened = Pipeline.open(openvino_bundle, "openvino", "fp32", threads=1)
    assert (opened.chain.decoder.max_logit_rows == 1) == one_row
    check_records(opened, pictures)


@pytest.mark.full
def test_executorch(executorch_bundle: Bundle, pictures: list[Path]) -> None:
    check_records(Pipeline.open(executorch_bundle, "executorch", "fp32", threads=1), pictures)


def test_eight_clients_with_different_schemas(
    pipeline: Pipeline, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each gets the answer that it would get alone; some have no format, some have forced tokens."""
    plain_step, mixed = scheduler_module.decode_step, []

    def step(chain: Any, cache: Any, active: Any) -> Any:
        result = plain_step(chain, cache, active)
        pending = [sequence.pending_tokens for sequence in active.values()]
        mixed.append(max(pending) > 1 and 1 in pending)
        return result

    monkeypatch.setattr(scheduler_module, "decode_step", step)
    source = random.Random(5)
    formats: list[Any] = [with_definitions(random_schema(source)) for _ in range(12)]
    formats += [ResponseFormat.regex(r"[a-z]{3,9}\d"), ResponseFormat.choices(["red", "green"]), None, RECORD]
    options = [
        GenerationOptions(40, temperature=number % 2, seed=number, response_format=wanted, logprobs=1)
        for number, wanted in enumerate(formats)
    ]
    images = [pictures[number % 3 : number % 3 + number % 2] for number in range(len(formats))]
    alone = [pipeline.chat(QUESTION, each, wanted) for each, wanted in zip(images, options, strict=True)]
    scheduler = Scheduler(pipeline.chain, pipeline.capacity, 8)
    try:
        clients = [
            Client(scheduler, prompt(pipeline, QUESTION, *each), options=wanted)
            for each, wanted in zip(images, options, strict=True)
        ]
        together = [client.answer() for client in clients]
    finally:
        scheduler.close()
    assert any(mixed)
    assert [found.tokens for found in together] == [found.tokens for found in alone]
    for found, one in zip(together, alone, strict=True):
        assert (found.text, found.finish_reason) == (one.text, one.finish_reason)
        assert [round(entry.logprob, 3) for entry in found.logprobs] == [
            round(entry.logprob, 3) for entry in one.logprobs
        ]


def test_what_cannot_fit_is_refused_before_anything_runs(
    pipeline: Pipeline, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.chain.vision_encoder, "run", None)
    wanted = {"type": "array", "minItems": 600, "items": {"type": "integer"}}
    with pytest.raises(FormatError, match=r"has 1\d\d\d tokens or more, but the KV cache holds 1024"):
        pipeline.chat(QUESTION, pictures[:1], GenerationOptions(response_format=wanted))


def test_an_answer_ends_where_the_cache_ends(tiny_bundle: Bundle) -> None:
    opened = Pipeline.open(tiny_bundle, "onnxruntime", "fp32", threads=1, capacity=60)
    free = opened.chat("Hello", [], GenerationOptions(500, ignore_eos=True))
    wanted = {"type": "string", "pattern": "^(forced [a-z]){300}$"}
    found = opened.chat("Hello", [], GenerationOptions(500, response_format=wanted))
    assert (free.finish_reason, len(free.tokens)) == ("capacity", 61 - free.prompt_tokens)
    assert (found.finish_reason, len(found.tokens)) == ("capacity", len(free.tokens))
