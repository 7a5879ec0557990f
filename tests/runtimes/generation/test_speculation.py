"""Drafts by prompt lookup: the same answers in fewer calls, and none where they lose time."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes.bundle.bundle import Bundle
from runtimes.bundle.manifest import Artifact
from runtimes.cache import KVCache
from runtimes.generation.decoding import SpeculativeSequence
from runtimes.generation.sampling import GenerationOptions
from runtimes.generation.speculation import FIRST_SIZE, MAX_SIZE, SUSPENSION, PromptLookup
from runtimes.pipeline import Pipeline

IMAGE = 1
DOCUMENT = list(range(10, 60))


def lookup_with_plain_steps(tokens: list[int], max_size: int = MAX_SIZE) -> PromptLookup:
    lookup = PromptLookup(tokens, max_size, IMAGE)
    for _ in range(2):
        lookup.record_call(0, 0, 1.0)
    return lookup


def test_the_tokens_that_followed_the_same_three_tokens_are_proposed() -> None:
    lookup = lookup_with_plain_steps([*DOCUMENT, 3, 20, 21, 22])
    assert lookup.propose(100) == [23, 24]
    assert lookup.propose(1) == [23]
    assert lookup.propose(0) == lookup.propose(-1) == []
    lookup.extend([99])
    assert lookup.propose(100) == []


def test_the_newest_of_two_occurrences_counts() -> None:
    assert lookup_with_plain_steps([5, 6, 7, 8, 5, 6, 7, 9, 2, 5, 6, 7]).propose(1) == [9]


def test_nothing_is_proposed_before_a_plain_step_was_timed() -> None:
    lookup = PromptLookup([5, 6, 7, 8, 5, 6, 7], MAX_SIZE, IMAGE)
    for _ in range(2):  # the first may be cold
        assert lookup.propose(4) == []
        lookup.record_call(0, 0, 1.0)
    assert lookup.propose(1) == [8]


def test_image_tokens_and_what_a_backend_cannot_judge_are_not_proposed() -> None:
    assert lookup_with_plain_steps([5, 6, 7, 8, IMAGE, 9, 5, 6, 7]).propose(4) == [8]
    assert lookup_with_plain_steps([5, 6, 7, 8, 9, 5, 6, 7], max_size=0).propose(4) == []


def test_more_tokens_are_proposed_while_they_are_accepted() -> None:
    lookup = lookup_with_plain_steps([*DOCUMENT, 3, 10, 11, 12])
    sizes = []
    for _ in range(4):
        proposed = lookup.propose(100)
        sizes.append(len(proposed))
        lookup.extend(proposed)
        lookup.record_call(len(proposed), len(proposed), 1.5)
    assert sizes == [FIRST_SIZE, 2 * FIRST_SIZE, 4 * FIRST_SIZE, MAX_SIZE]
    lookup.record_call(MAX_SIZE, 3, 1.5)
    assert len(lookup.propose(100)) == FIRST_SIZE


@pytest.mark.parametrize("first", [1.0, 3.0, 50.0])
def test_speculation_that_loses_time_is_suspended_longer_and_longer(first: float) -> None:
    """Every proposal is wrong and makes a step twice as long; however long the first step took."""
    lookup = PromptLookup([7] * 4, MAX_SIZE, IMAGE)
    seconds, tokens, places = 0.0, 1500, []
    lookup.record_call(0, 0, first)
    for place in range(tokens):
        proposed = lookup.propose(100)
        cost = 2.0 if proposed else 1.0
        places += [place] if proposed else []
        seconds += cost
        lookup.record_call(len(proposed), 0, cost)
        lookup.extend([7])
    assert tokens / seconds > 0.98
    suspensions = [later - earlier for earlier, later in pairwise(places) if later - earlier > 1]
    assert suspensions == sorted(suspensions)
    assert suspensions[0] >= SUSPENSION


class Parrot:
    """A decoder that writes ``script`` whatever it is given, and counts its calls."""

    def __init__(self, pipeline: Pipeline, script: list[int]) -> None:
        self._inside, self._script = pipeline.chain.decoder, script
        self.contract, self.max_logit_rows, self.tapped = (
            self._inside.contract,
            self._inside.max_logit_rows,
            {},
        )
        self.calls, self.prompt = 0, 0

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        return self._inside.new_cache(batch, capacity)

    def decode(self, inputs_embeds: np.ndarray, logit_rows: np.ndarray, cache: KVCache) -> np.ndarray:
        self.calls += 1
        start = cache.length
        cache.append(inputs_embeds.shape[1])
        self.prompt = self.prompt or cache.length
        logits = np.zeros((1, len(logit_rows), int(self.contract.outputs[0].shape[2])), np.float32)
        for index, row in enumerate(logit_rows):
            place = start + int(row) + 1 - self.prompt
            logits[0, index, self._script[min(place, len(self._script) - 1)]] = 1
        return logits


@pytest.mark.parametrize("capacity", [None, 100])
def test_copying_takes_few_calls_and_gives_the_same(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capacity: int | None
) -> None:
    """On a clock by which every call takes as long."""
    pipeline = Pipeline.open(tiny_bundle, precision="fp32", capacity=capacity)
    tokenizer = pipeline.chain.tokenizer
    text = "The red circle is left of the blue square. The green star is above the white ring."
    document = tokenizer.encode(text)
    script = [*document, tokenizer.spec.eos_id]
    answers = {}
    for drafts in (False, True):
        parrot = Parrot(pipeline, script)
        pipeline.chain.decoder, pipeline._conversations = parrot, []
        monkeypatch.setattr("runtimes.generation.decoding.perf_counter", partial(getattr, parrot, "calls"))
        pipeline.reset()
        options = GenerationOptions(max_new_tokens=len(document) + 1, drafts=drafts)
        answers[drafts] = (pipeline.generate(text, options=options), parrot.calls)
    (plain, plain_calls), (speculated, calls) = answers[False], answers[True]
    assert speculated.tokens == plain.tokens
    assert (speculated.text, speculated.finish_reason) == (plain.text, plain.finish_reason)
    assert calls < plain_calls / 2
    # One call measures how far its logits deviate; the token that ends the answer was proposed too.
    assert speculated.accepted_tokens - (plain_calls - calls) in (1, 2)
    assert plain.drafted_tokens == plain.accepted_tokens == 0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_speculation_changes_no_token(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """Of the real model, greedy and sampled, made to repeat itself; the cache is right after speculation too.

    On a clock by which every call takes as long, so that the same tokens are proposed each time.
    """
    monkeypatch.setattr("runtimes.generation.decoding.perf_counter", partial(next, count()))
    pipeline = Pipeline.open(tiny_bundle, precision="fp32")
    prompts = ["The circle is red. The square is red. The", "The circle is red. The square is red. The star"]
    found: list[list[int]] = []
    drafted = accepted = 0
    for drafts in (False, True):
        pipeline.reset()
        for seed in range(3):
            options = GenerationOptions(60, temperature, repetition_penalty=0.7, seed=seed, drafts=drafts)
            for prompt in prompts:
                answer = pipeline.generate(prompt, options=options)
                found.append(answer.tokens)
                drafted += answer.drafted_tokens
                accepted += answer.accepted_tokens
    half = len(found) // 2
    assert found[:half] == found[half:]
    assert drafted > accepted > 0


def test_the_last_answer_of_a_batch_is_decoded_with_speculation(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others end at once; its tokens are those without speculation."""
    monkeypatch.setattr("runtimes.generation.decoding.perf_counter", partial(next, count()))
    pipeline = Pipeline.open(tiny_bundle, precision="fp32")
    prompts = ["The circle is red. The square is red. The", "A circle.", "The circle is red."]
    settings = GenerationOptions(60, repetition_penalty=0.7)
    plain = replace(settings, drafts=False)
    expected = [pipeline.generate(prompt, options=plain) for prompt in prompts]
    longest = max(range(3), key=lambda index: len(expected[index].tokens))
    found = pipeline.generate_batch([(prompt, []) for prompt in prompts], settings)
    assert [answer.tokens for answer in found] == [answer.tokens for answer in expected]
    assert found[longest].accepted_tokens > 0
    assert pipeline.generate_batch([(prompts[0], [])], settings)[0].accepted_tokens > 0


class Wobbly:
    """A decoder whose calls of several tokens round otherwise: by up to 0.009, which turns near ties over.

    Its logits depend on the position alone, so that any two answers that differ differ by rounding. The
    text repeats itself; every fifth position has a near tie.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.contract, self.max_logit_rows, self.tapped = pipeline.chain.decoder.contract, 1 << 30, {}
        self.new_cache = pipeline.chain.decoder.new_cache
        self._noise = np.random.default_rng(7)

    def decode(self, inputs_embeds: np.ndarray, logit_rows: np.ndarray, cache: KVCache) -> np.ndarray:
        start = cache.length
        cache.append(inputs_embeds.shape[1])
        rows = []
        for row in logit_rows:
            place = start + int(row)
            logits = np.random.default_rng(place % 20).normal(0, 0.5, int(self.contract.outputs[0].shape[2]))
            token = 100 + place % 20
            logits[token] = 8
            if place % 5 == 0:
                logits[token + 50] = 8 - 0.001 * (place % 3)
            rows.append(logits)
        logits = np.array([rows], np.float32)
        if len(logit_rows) > 1:
            logits += self._noise.uniform(-0.009, 0.009, logits.shape).astype(np.float32)
        return logits


@pytest.mark.parametrize(("prompt", "temperature"), [("a b", 0.0), ("The circle", 0.0), ("a b", 1.0)])
def test_neither_rounding_nor_the_clock_changes_an_answer(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, prompt: str, temperature: float
) -> None:
    """Near ties are decoded again, one token a call, whatever time calls take."""
    pipeline = Pipeline.open(tiny_bundle, precision="fp32")
    pipeline.chain.decoder = Wobbly(pipeline)
    accepted = 0
    for seed in range(4):
        answers = []
        for drafts in (False, True, True):
            ticks = np.random.default_rng((seed, len(answers))).uniform(0.5, 2.0, 5000).cumsum()
            monkeypatch.setattr("runtimes.generation.decoding.perf_counter", partial(next, iter(ticks)))
            pipeline.reset()
            options = GenerationOptions(150, temperature, seed=seed, drafts=drafts, ignore_eos=True)
            answers.append(pipeline.generate(prompt, options=options))
        assert [answer.tokens for answer in answers[1:]] == [answers[0].tokens] * 2
        accepted += answers[1].accepted_tokens
    assert accepted > 60


@pytest.mark.parametrize(
    "options", [GenerationOptions(60, 1.0, top_p=0.9), GenerationOptions(60, 1.0, top_k=5)]
)
def test_no_speculation_where_no_choice_is_certain(tiny_bundle: Bundle, options: GenerationOptions) -> None:
    """The order of top_k and top_p follows the rounding; quantized activations jump by whole steps."""
    pipeline = Pipeline.open(tiny_bundle, precision="fp32")
    pipeline.chain.decoder = Wobbly(pipeline)
    assert pipeline.generate("a", options=options).drafted_tokens == 0
    pipeline.chain.exact_rows = False
    assert pipeline.generate("a", options=GenerationOptions(60, ignore_eos=True)).drafted_tokens == 0


def test_precisions_that_have_speculation() -> None:
    def artifact(precision: str, quantizes: bool | None) -> Artifact:
        return Artifact("decoder", "onnxruntime", precision, "cpu", "ort", ("x",), {},
                        quantizes_activations=quantizes)  # fmt: skip

    assert artifact("fp32", None).exact_rows and artifact("int4", False).exact_rows
    assert not artifact("int8", None).exact_rows and not artifact("mine", True).exact_rows


@pytest.mark.parametrize("ending", ["eos", "stop"])
def test_an_answer_that_ends_inside_the_proposed_tokens(
    tiny_bundle: Bundle, pictures: list[Path], monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """The same question again and again: proposed tokens reach past the end, and the next turn knows nothing of that."""
    inside: list[int] = []  # proposed tokens of the call that ended an answer
    take = SpeculativeSequence.accept_logits

    def watched(self: SpeculativeSequence, *given: Any) -> str:
        proposed, text = self._proposed, take(self, *given)
        if self.finished and self.answer.finish_reason == ending:
            inside.append(len(proposed))
        return text

    monkeypatch.setattr(SpeculativeSequence, "accept_logits", watched)
    monkeypatch.setattr("runtimes.generation.decoding.perf_counter", partial(next, count()))
    question = {"role": "user", "content": "Describe the picture."}
    found = []
    for drafts in (False, True):
        pipeline = Pipeline.open(tiny_bundle, precision="fp32")
        whole = pipeline.chat([question], [pictures[0]]).text
        stop = () if ending == "eos" else (".",)
        options = GenerationOptions(drafts=drafts, stop=stop)
        first = {**question, "content": f"<image_placeholder>{question['content']}"}
        turns, answers = [first], []
        for _ in range(4):
            answers.append(pipeline.chat(turns, [pictures[0]], options))
            turns += [{"role": "assistant", "content": whole}, question]
        found.append([(answer.tokens, answer.text, answer.finish_reason) for answer in answers])
        assert all(answer.finish_reason == ending for answer in answers)
        if drafts:
            assert max(inside) > 0
        else:
            inside.clear()
    assert found[0] == found[1]
