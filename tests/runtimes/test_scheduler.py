"""Several conversations at once: each answer is what it would be alone, nobody waits for anybody's length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from runtimes import chain
from runtimes.bundle.bundle import Bundle
from runtimes.chain import EncodedImage, Prompt
from runtimes.errors import UserError
from runtimes.generation.answer import Answer
from runtimes.generation.sampling import GenerationOptions
from runtimes.job import BusyError, ClosedError, DeadlineError, Job, Step
from runtimes.pipeline import Pipeline
from runtimes.preprocess import PreprocessSpec, preprocess
from runtimes.scheduler import Scheduler
from runtimes.text.prompt import Message
from tests.runtimes.gate import Gate

DESCRIBE = "Describe the picture."
QUESTIONS = (DESCRIBE, "How many objects are there?", "What number is in the picture?", "What shape is it?")
LONG = GenerationOptions(max_new_tokens=40)
Start = Callable[..., Scheduler]


@pytest.fixture
def pipeline(tiny_bundle: Bundle) -> Pipeline:
    return Pipeline.open(tiny_bundle, "onnxruntime", "fp32", threads=1)


@pytest.fixture(params=[False, True], ids=["one thread", "vision apart"])
def start(pipeline: Pipeline, request: pytest.FixtureRequest) -> Iterator[Start]:
    opened: list[Scheduler] = []

    def make(slots: int = 3, **settings: Any) -> Scheduler:
        pipeline.chain.concurrent = request.param
        opened.append(Scheduler(pipeline.chain, pipeline.capacity, slots, **settings))
        return opened[-1]

    yield make
    for scheduler in opened:
        scheduler.close()


def prompt(pipeline: Pipeline, question: str, *images: Path) -> Prompt:
    return pipeline.chain.prepare(pipeline.format(question, len(images)), images)


def encoded_prompt(pipeline: Pipeline, file: bytes) -> Prompt:
    image = EncodedImage(file, pipeline.chain.preprocessing)
    return pipeline.chain.prepare(pipeline.format(DESCRIBE, 1), [image])


def ask(scheduler: Scheduler, asked: Prompt, options: GenerationOptions = LONG) -> Answer:
    *steps, last = scheduler.stream(asked, options)
    assert last.answer
    assert "".join(step.text for step in [*steps, last]) == last.answer.text
    return last.answer


class Client:
    """A request whose steps are kept, in the order in which all clients of a log got theirs."""

    def __init__(
        self, scheduler: Scheduler, asked: Prompt, log: list[Client] | None = None, **more: Any
    ) -> None:
        self.log = [] if log is None else log
        self.steps: list[Step] = []
        self.last: SimpleQueue[Answer | Exception] = SimpleQueue()
        options = more.pop("options", LONG)
        self.job: Job = scheduler.submit(asked, options, self.take, **more)

    def take(self, step: Step | Exception) -> None:
        self.log.append(self)
        if isinstance(step, Exception):
            self.last.put(step)
        else:
            self.steps.append(step)
            if step.answer:
                self.last.put(step.answer)

    def answer(self) -> Answer:
        last = self.last.get(timeout=60)
        assert isinstance(last, Answer), last
        return last

    def error(self) -> Exception:
        last = self.last.get(timeout=60)
        assert isinstance(last, Exception)
        return last


def test_answers_are_those_of_one_user(pipeline: Pipeline, start: Start, pictures: list[Path]) -> None:
    """Eleven requests in three rows: greedy and sampled, with one, two and no pictures."""
    rows = [(QUESTIONS[index % 4], pictures[index % 3 : index % 3 + 1 + index % 2]) for index in range(10)]
    rows.append(("Hello.", []))
    options = [
        LONG if index % 3 else GenerationOptions(30, temperature=1.0, seed=index)
        for index in range(len(rows))
    ]
    alone = [
        pipeline.chat(question, images, each) for (question, images), each in zip(rows, options, strict=True)
    ]
    scheduler = start()
    clients = [
        Client(scheduler, prompt(pipeline, question, *images), options=each)
        for (question, images), each in zip(rows, options, strict=True)
    ]
    for client, expected in zip(clients, alone, strict=True):
        found = client.answer()
        assert (found.tokens, found.text, found.finish_reason) == (
            expected.tokens, expected.text, expected.finish_reason,
        )  # fmt: skip
    assert (scheduler.running, scheduler.waiting) == (0, 0)


def test_steps_come_in_turns(pipeline: Pipeline, start: Start, pictures: list[Path]) -> None:
    """Once all are writing, nobody is two tokens ahead of anybody, and one call decodes for all."""
    scheduler = start()
    gate, log = Gate(scheduler), []
    # Long enough that the first is not done before a slow machine has encoded the last one's image.
    options = GenerationOptions(300, ignore_eos=True)
    clients = [
        Client(scheduler, prompt(pipeline, DESCRIBE, picture), log, options=options)
        for picture in pictures[:3]
    ]
    gate.open.set()
    answers = [client.answer() for client in clients]
    assert min(len(answer.tokens) for answer in answers) > 5
    begun = max(log.index(client) for client in clients) + 1
    ended = min(max(place for place, each in enumerate(log) if each is client) for client in clients)
    assert ended - begun > 6
    for place in range(begun, ended):
        counts = [log[begun : place + 1].count(client) for client in clients]
        assert max(counts) - min(counts) <= 1


def test_a_late_short_request_overtakes_a_long_prompt(
    pipeline: Pipeline, start: Start, pictures: list[Path]
) -> None:
    scheduler = start(chunk=4)
    gate, log = Gate(scheduler), []
    writing = Client(scheduler, prompt(pipeline, DESCRIBE, pictures[0]), log)
    long = Client(scheduler, prompt(pipeline, "Compare them. " * 12, *pictures[:3]), log)
    short = Client(scheduler, prompt(pipeline, "Hello."), log)
    gate.open.set()
    for client in (writing, long, short):
        client.answer()
    assert log.index(short) < log.index(long)
    before = log[: log.index(long)]
    assert before.count(writing) > 10  # the long prompt did not stop who was writing


def test_beginnings_are_reused_across_rows(pipeline: Pipeline, start: Start, pictures: list[Path]) -> None:
    scheduler = start()
    first, second = (prompt(pipeline, question, pictures[0]) for question in QUESTIONS[:2])
    image = max(index for index, (digest, _) in enumerate(first.keys) if digest)
    begun = ask(scheduler, first)
    assert begun.reused_tokens == len(pipeline.chain.prefix.tokens)
    # Another question about the picture: from a copy, as the first conversation may go on.
    answer = ask(scheduler, second)
    assert answer.reused_tokens > image
    assert answer.tokens == pipeline.chat(QUESTIONS[1], [pictures[0]], LONG).tokens
    # The first conversation goes on in its own row.
    turns = [Message("user", DESCRIBE), Message("assistant", begun.text), Message("user", QUESTIONS[2])]
    next_turn = pipeline.chain.prepare(pipeline.format(turns, 1), pictures[:1])
    assert ask(scheduler, next_turn).reused_tokens >= len(first.keys) + len(begun.tokens) - 1
    encoded = pipeline.chain.images_encoded
    again = ask(scheduler, prompt(pipeline, QUESTIONS[2], pictures[0]))
    assert again.reused_tokens > image
    assert pipeline.chain.images_encoded == encoded


def test_a_row_that_is_being_written_lends_its_beginning(
    pipeline: Pipeline, start: Start, pictures: list[Path]
) -> None:
    scheduler = start()
    log: list[Client] = []
    one = Client(scheduler, prompt(pipeline, DESCRIBE, pictures[0]), log)
    while not one.steps:
        pass
    other = Client(scheduler, prompt(pipeline, QUESTIONS[1], pictures[0]), log)
    assert other.answer().reused_tokens > 20
    assert one.answer().tokens == pipeline.chat(DESCRIBE, [pictures[0]], LONG).tokens
    assert other.steps[-1].answer.tokens == pipeline.chat(QUESTIONS[1], [pictures[0]], LONG).tokens  # type: ignore[union-attr]


def test_canceled_requests_free_their_rows(pipeline: Pipeline, start: Start, pictures: list[Path]) -> None:
    scheduler = start(slots=1)
    gate = Gate(scheduler)
    jobs = [Client(scheduler, prompt(pipeline, DESCRIBE, picture)) for picture in pictures[:3]]
    jobs[0].job.cancel()
    jobs[1].job.cancel()
    gate.open.set()
    assert jobs[2].answer().finish_reason == "eos"
    assert not jobs[0].steps
    assert not jobs[1].steps
    for step in scheduler.stream(prompt(pipeline, DESCRIBE, pictures[0]), LONG):
        assert step
        break  # leaving is canceling
    assert ask(scheduler, prompt(pipeline, DESCRIBE, pictures[1])).finish_reason == "eos"


def test_limits(pipeline: Pipeline, start: Start, pictures: list[Path]) -> None:
    scheduler = start(slots=1, queue=1)
    gate = Gate(scheduler)
    asked = prompt(pipeline, DESCRIBE, pictures[0])
    late, waiting = Client(scheduler, asked, seconds=0.0), Client(scheduler, asked)
    with pytest.raises(BusyError, match="1 requests are being answered and 1 are waiting; try again"):
        Client(scheduler, asked)
    gate.open.set()
    assert isinstance(late.error(), DeadlineError)
    assert "not complete after" in str(Client(scheduler, asked, seconds=0.0).error())
    assert waiting.answer().finish_reason == "eos"
    with pytest.raises(UserError, match=r"has \d+ tokens but the KV cache holds"):
        Client(scheduler, prompt(pipeline, "word " * 2000))


def test_closing_finishes_what_was_asked(pipeline: Pipeline, start: Start, pictures: list[Path]) -> None:
    scheduler = start(slots=1)
    clients = [Client(scheduler, prompt(pipeline, DESCRIBE, picture)) for picture in pictures[:3]]
    scheduler.close()
    assert all(client.answer().finish_reason == "eos" for client in clients)
    with pytest.raises(ClosedError, match="is stopping"):
        Client(scheduler, prompt(pipeline, DESCRIBE, pictures[0]))


def test_one_answers_fault_is_its_own(
    pipeline: Pipeline, start: Start, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in one row's logits; then a step that fails as a whole; then all goes on."""
    scheduler, plain = start(slots=2), pipeline.chain.decode
    broken: list[str] = ["row"]

    def decode(tokens: np.ndarray, cache: Any, first: int = 0) -> np.ndarray:
        logits = plain(tokens, cache, first)
        if broken == ["row"] and len(tokens) == 2:
            logits[1] = np.nan
            broken.clear()
        if broken == ["call"]:
            broken.clear()
            raise UserError("The decoder failed.")
        return logits

    monkeypatch.setattr(pipeline.chain, "decode", decode)
    for picture in pictures[:2]:
        pipeline.chain.embed_prompt("<image_placeholder>", [picture])  # so that both are read at once
    gate = Gate(scheduler)
    one, other = (Client(scheduler, prompt(pipeline, DESCRIBE, picture)) for picture in pictures[:2])
    gate.open.set()
    assert "NaN or infinite logits" in str(other.error())
    expected = one.answer().tokens
    broken.append("call")
    assert str(Client(scheduler, prompt(pipeline, DESCRIBE, pictures[0])).error()) == "The decoder failed."
    assert ask(scheduler, prompt(pipeline, DESCRIBE, pictures[0])).tokens == expected


def test_who_cannot_be_told_is_dropped(pipeline: Pipeline, start: Start, pictures: list[Path]) -> None:
    scheduler = start(slots=1)

    def gone(step: Any) -> None:
        raise RuntimeError("Event loop is closed")

    scheduler.submit(prompt(pipeline, DESCRIBE, pictures[0]), LONG, gone)
    assert ask(scheduler, prompt(pipeline, DESCRIBE, pictures[1])).finish_reason == "eos"


def test_logprobs(pipeline: Pipeline, start: Start, pictures: list[Path]) -> None:
    scheduler = start()
    options = GenerationOptions(20, logprobs=3)
    answer = ask(scheduler, prompt(pipeline, DESCRIBE, pictures[0]), options)
    assert len(answer.logprobs) == len(answer.tokens)
    for token, entry in zip(answer.tokens, answer.logprobs, strict=True):
        assert entry.token == token == entry.top[0][0]  # greedy
        assert entry.logprob == entry.top[0][1] <= 0
        assert [value for _, value in entry.top] == sorted((value for _, value in entry.top), reverse=True)
        assert sum(np.exp(value) for _, value in entry.top) <= 1 + 1e-9


def test_waiting_image_files_stay_encoded(start: Start, pipeline: Pipeline, pictures: list[Path]) -> None:
    """Only a prompt that has a row decodes its images, one at a time; the answer is that of decoded images."""
    scheduler = start(slots=1)
    decoded: list[str] = []
    plain = EncodedImage.decode

    def decode(image: EncodedImage) -> np.ndarray:
        decoded.append(image.digest)
        return plain(image)

    gate = Gate(scheduler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EncodedImage, "decode", decode)
        files = [picture.read_bytes() for picture in pictures[:3]]
        asked = [encoded_prompt(pipeline, file) for file in files]
        clients = [Client(scheduler, one) for one in asked]
        assert not decoded
        gate.open.set()
        found = [client.last.get(timeout=30) for client in clients]
    assert set(decoded) == {digest for one in asked for digest in one.images}
    assert not any(image.decoded for one in asked for image in one.images.values())
    assert [answer.text for answer in found if isinstance(answer, Answer)] == [
        pipeline.chat(DESCRIBE, [picture], LONG).text for picture in pictures[:3]
    ]


def test_each_image_is_decoded_once(
    start: Start, pipeline: Pipeline, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its embeddings make room for those of the next one before the prompt is complete."""
    monkeypatch.setattr(pipeline.chain, "max_cached_images", 1)
    decoded: list[bytes] = []

    def decode(file: bytes, spec: PreprocessSpec) -> np.ndarray:
        decoded.append(file)
        return preprocess(file, spec)

    monkeypatch.setattr(chain, "preprocess", decode)
    files = [picture.read_bytes() for picture in pictures[1:4]]
    images = [EncodedImage(file, pipeline.chain.preprocessing) for file in files]
    asked = pipeline.chain.prepare(pipeline.format(DESCRIBE, 3), images)
    found = ask(start(slots=1), asked)
    assert decoded == files
    assert found.text == pipeline.chat(DESCRIBE, pictures[1:4], LONG).text


def test_a_damaged_image_file_ends_its_request_alone(
    start: Start, pipeline: Pipeline, pictures: list[Path]
) -> None:
    scheduler = start()
    file = pictures[0].read_bytes()
    damaged = encoded_prompt(pipeline, file[: len(file) // 2])
    bad, good = Client(scheduler, damaged), Client(scheduler, prompt(pipeline, DESCRIBE, pictures[1]))
    assert isinstance(bad.last.get(timeout=30), UserError)
    assert isinstance(good.last.get(timeout=30), Answer)
