"""The chain as a user meets it: chat, streaming, several turns and images, batches, stops."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest

from reference.checkpoint.checkpoint import open_checkpoint
from reference.session import reference_chain
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.manifest import Engine
from runtimes.errors import UserError
from runtimes.generation.sampling import GenerationOptions
from runtimes.images import load_image
from runtimes.memory import required_memory
from runtimes.pipeline import MAX_STREAMS, Pipeline
from runtimes.preprocess import preprocess
from runtimes.text.prompt import IMAGE_PLACEHOLDER, Message

SHORT = GenerationOptions(max_new_tokens=3)
LONG = GenerationOptions(max_new_tokens=40)
DESCRIBE = "Describe the picture."


@pytest.fixture
def pipeline(tiny_bundle: Bundle) -> Pipeline:
    return Pipeline.open(tiny_bundle, precision="fp32")


def test_answer_equals_the_reference(pipeline: Pipeline, tiny_bundle: Bundle, pictures: list[Path]) -> None:
    table = tiny_bundle.path(tiny_bundle.manifest.token_embedding)
    reference = Pipeline(reference_chain(open_checkpoint("tiny"), table), pipeline.system_prompt, 600)
    for picture in pictures:
        answer = pipeline.chat(DESCRIBE, [picture], LONG)
        assert answer.tokens == reference.chat(DESCRIBE, [picture], LONG).tokens
        assert answer.finish_reason == "eos"
        assert answer.text.startswith("The ")


def test_every_kind_of_image_source(pipeline: Pipeline, pictures: list[Path]) -> None:
    image = load_image(pictures[0])
    sources = [pictures[0], str(pictures[0]), pictures[0].read_bytes(), image, np.asarray(image)]
    answers = {pipeline.chat(DESCRIBE, [source], LONG).text for source in sources}
    assert len(answers) == 1
    assert pipeline.chain.images_encoded == 1


def test_streamed_pieces_make_the_answer(pipeline: Pipeline, pictures: list[Path]) -> None:
    pieces = [piece for piece, _ in pipeline.stream_chat(DESCRIBE, [pictures[0]], LONG)]
    assert len([piece for piece in pieces if piece]) > 5
    assert "".join(pieces) == pipeline.chat(DESCRIBE, [pictures[0]], LONG).text


def test_second_turn_prefills_only_what_is_new(
    pipeline: Pipeline, tiny_bundle: Bundle, pictures: list[Path]
) -> None:
    first = Message("user", "What number is in the picture?")
    answer = pipeline.chat([first], [pictures[0]])
    assert answer.reused_tokens == len(pipeline.chain.prefix.tokens)
    turns = [first, Message("assistant", answer.text), Message("user", DESCRIBE)]
    second = pipeline.chat(turns, [pictures[0]], LONG)
    assert second.reused_tokens >= answer.prompt_tokens
    assert pipeline.chain.images_encoded == 1
    fresh = Pipeline.open(tiny_bundle, precision="fp32").chat(turns, [pictures[0]], LONG)
    assert second.tokens == fresh.tokens


def test_another_question_reuses_the_image(pipeline: Pipeline, pictures: list[Path]) -> None:
    pipeline.chat("How many shapes are in the picture?", [pictures[0]])
    again = pipeline.chat(DESCRIBE, [pictures[0]], LONG)
    assert again.reused_tokens > pipeline.chain.tokenizer.spec.image_tokens
    pipeline.reset()
    assert pipeline.chat(DESCRIBE, [pictures[0]], LONG).reused_tokens == len(pipeline.chain.prefix.tokens)


def test_another_image_is_not_mistaken_for_the_last(
    pipeline: Pipeline, tiny_bundle: Bundle, pictures: list[Path]
) -> None:
    """The prompts are equal token by token; only the pictures differ."""
    pipeline.chat(DESCRIBE, [pictures[0]], LONG)
    answer = pipeline.chat(DESCRIBE, [pictures[1]], LONG)
    fresh = Pipeline.open(tiny_bundle, precision="fp32").chat(DESCRIBE, [pictures[1]], LONG)
    assert answer.tokens == fresh.tokens
    assert answer.reused_tokens < pipeline.chain.tokenizer.spec.image_tokens


def test_an_abandoned_stream_leaves_a_usable_pipeline(pipeline: Pipeline, pictures: list[Path]) -> None:
    expected = pipeline.chat(DESCRIBE, [pictures[0]], LONG).tokens
    pipeline.reset()
    stream = pipeline.stream_chat(DESCRIBE, [pictures[0]], LONG)
    for _ in range(4):
        next(stream)
    stream.close()
    assert pipeline.chat(DESCRIBE, [pictures[0]], LONG).tokens == expected


@pytest.fixture
def alone(pipeline: Pipeline, pictures: list[Path]) -> list[list[int]]:
    """The answer about each picture, asked one after the other."""
    return [pipeline.chat(DESCRIBE, [picture], LONG).tokens for picture in pictures]


def test_interleaved_streams_are_right(
    pipeline: Pipeline, pictures: list[Path], alone: list[list[int]]
) -> None:
    """In one thread; calls between their steps too, and what ended or was dropped frees its place."""
    streams = [pipeline.stream_chat(DESCRIBE, [picture], LONG) for picture in pictures]
    answers = {}
    for steps in zip_longest(*streams):
        answers |= {place: step[1].tokens for place, step in enumerate(steps) if step}
        assert pipeline.chat(DESCRIBE, [pictures[1]], SHORT).tokens == alone[1][:3]
    assert list(answers.values()) == alone
    assert pipeline.chat(DESCRIBE, [pictures[1]], LONG).reused_tokens
    assert len(pipeline._conversations) == 1


def test_streams_that_are_left_open(pipeline: Pipeline, pictures: list[Path], alone: list[list[int]]) -> None:
    """They block nobody; too many are refused; one that is dropped or closed makes room."""
    streams = [pipeline.stream_chat("Hi", [], SHORT) for _ in range(MAX_STREAMS)]
    assert all(next(stream) for stream in streams)
    with pytest.raises(UserError, match="16 streams of this pipeline are open; finish or close one first"):
        pipeline.chat(DESCRIBE, [pictures[0]], LONG)
    streams.pop()
    assert pipeline.chat(DESCRIBE, [pictures[0]], LONG).tokens == alone[0]
    next(late := pipeline.stream_chat("Hi", [], SHORT))
    late.close()
    assert pipeline.chat(DESCRIBE, [pictures[1]], LONG).tokens == alone[1]


def test_eight_threads(pipeline: Pipeline, pictures: list[Path], alone: list[list[int]]) -> None:
    """Calls and streams of one pipeline; the steps of a stream may run in different threads."""

    def call(place: int) -> list[int]:
        return pipeline.chat(DESCRIBE, [pictures[place]], LONG).tokens

    def read(place: int) -> list[int]:
        *_, (_, answer) = pipeline.stream_chat(DESCRIBE, [pictures[place]], LONG)
        return answer.tokens

    places = list(range(len(pictures))) * 6
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit((call, read)[turn % 2], place) for turn, place in enumerate(places)]
        wandering = pipeline.stream_chat(DESCRIBE, [pictures[0]], LONG)
        answer = None
        while step := pool.submit(next, wandering, None).result():
            answer = step[1]
        assert [job.result() for job in jobs] == [alone[place] for place in places]
    assert answer is not None and answer.tokens == alone[0]


def test_one_image_instead_of_a_list(pipeline: Pipeline, pictures: list[Path]) -> None:
    assert (
        pipeline.chat(DESCRIBE, str(pictures[0]), LONG).text
        == pipeline.chat(DESCRIBE, [pictures[0]], LONG).text
    )


def test_two_images_in_one_prompt(pipeline: Pipeline, pictures: list[Path]) -> None:
    """The order of the images matters, and each is encoded once."""
    text = "<image_placeholder> is Figure 1.\n<image_placeholder> is Figure 2.\nDescribe Figure 2."
    one = pipeline.chat(text, [pictures[0], pictures[1]], LONG)
    other = pipeline.chat(text, [pictures[1], pictures[0]], LONG)
    assert one.prompt_tokens > 2 * pipeline.chain.tokenizer.spec.image_tokens
    assert one.text != other.text
    assert pipeline.chain.images_encoded == 2


@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_chunked_prefill_changes_nothing(pipeline: Pipeline, pictures: list[Path], chunk: int) -> None:
    expected = pipeline.chat(DESCRIBE, [pictures[0]], LONG).tokens
    pipeline.reset()
    pipeline.chain.prefill_chunk = chunk
    assert pipeline.chat(DESCRIBE, [pictures[0]], LONG).tokens == expected


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_batch_equals_one_by_one(pipeline: Pipeline, pictures: list[Path], temperature: float) -> None:
    options = GenerationOptions(max_new_tokens=30, temperature=temperature, seed=5)
    questions = [(DESCRIBE, [pictures[0]]), ("Count the shapes in the picture.", [pictures[1]]),
                 ("Hello", []), (DESCRIBE, [pictures[2]])]  # fmt: skip
    requests = [(pipeline.format(text, len(images)), images) for text, images in questions]
    together = pipeline.generate_batch(requests, options)
    alone = [pipeline.generate(text, images, options) for text, images in requests]
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert pipeline.generate_batch([]) == []


def test_stop_strings(pipeline: Pipeline, pictures: list[Path]) -> None:
    full = pipeline.chat(DESCRIBE, [pictures[0]], LONG).text
    stop = full[9:15]  # lies across tokens
    options = GenerationOptions(max_new_tokens=40, stop=("never appears", stop))
    pieces = [piece for piece, answer in pipeline.stream_chat(DESCRIBE, [pictures[0]], options)]
    assert "".join(pieces) == full[: full.index(stop)]
    assert pipeline.chat(DESCRIBE, [pictures[0]], options).finish_reason == "stop"


def test_batches_with_stop_strings(pipeline: Pipeline, pictures: list[Path]) -> None:
    options = GenerationOptions(max_new_tokens=40, stop=(" at", "number"))
    requests = [(pipeline.format(DESCRIBE, 1), [picture]) for picture in pictures]
    together = pipeline.generate_batch(requests, options)
    assert [answer.text for answer in together] == [
        pipeline.generate(*request, options).text for request in requests
    ]
    assert all(answer.finish_reason == "stop" and answer.seconds > 0 for answer in together)


def test_length_and_capacity_end_an_answer(tiny_bundle: Bundle, pictures: list[Path]) -> None:
    pipeline = Pipeline.open(tiny_bundle)
    short = pipeline.chat(DESCRIBE, [pictures[0]], GenerationOptions(max_new_tokens=3))
    assert (short.finish_reason, len(short.tokens)) == ("length", 3)
    full = pipeline.chat(DESCRIBE, [pictures[0]], LONG)
    tight = Pipeline.open(tiny_bundle, capacity=full.prompt_tokens + 5)
    answer = tight.chat(DESCRIBE, [pictures[0]], LONG)
    assert (answer.finish_reason, answer.tokens) == ("capacity", full.tokens[:6])
    batch = tight.generate_batch(
        [(tight.format(DESCRIBE, 1), [pictures[0]]), (tight.format("Hi", 0), [])], LONG
    )
    assert batch[0].tokens == answer.tokens


def test_prompts_that_do_not_fit_are_refused(tiny_bundle: Bundle, pictures: list[Path]) -> None:
    pipeline = Pipeline.open(tiny_bundle, capacity=50)
    with pytest.raises(UserError, match=r"The prompt has \d+ tokens but the KV cache holds 50"):
        pipeline.chat(DESCRIBE, [pictures[0]])
    with pytest.raises(UserError, match="between 1 and the model's 1024, got 0"):
        Pipeline.open(tiny_bundle, capacity=0)


def test_any_end_token_ends_an_answer(pipeline: Pipeline, pictures: list[Path]) -> None:
    whole = pipeline.chat(DESCRIBE, [pictures[0]], LONG)
    last = whole.tokens[3]
    chain = copy(pipeline.chain)
    chain.tokenizer = copy(chain.tokenizer)
    chain.tokenizer.spec = replace(chain.tokenizer.spec, eos_ids=(*chain.tokenizer.spec.eos_ids, last))
    other = Pipeline(chain, pipeline.system_prompt, pipeline.capacity)
    for answer in (
        other.chat(DESCRIBE, [pictures[0]], LONG),
        *other.generate_batch([(other.format(DESCRIBE, 1), [pictures[0]])], LONG),
    ):
        assert answer.tokens == whole.tokens[: whole.tokens.index(last) + 1]
        assert answer.finish_reason == "eos"


def test_a_placeholder_in_a_text_does_not_block_a_chat(pipeline: Pipeline, pictures: list[Path]) -> None:
    """Without images it is text; in a conversation with images, parts say which are images."""
    word = f"What does {IMAGE_PLACEHOLDER} mean?"
    image_id = pipeline.chain.tokenizer.spec.image_token_id
    assert image_id not in pipeline.chain.prepare(pipeline.format(word, 0), []).tokens
    assert pipeline.chat(word, [], SHORT).tokens
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": DESCRIBE}]},
        {"role": "assistant", "content": f"It is {IMAGE_PLACEHOLDER}."},
        {"role": "user", "content": word},
    ]
    tokens = pipeline.chain.prepare(pipeline.format(turns, 1), [pictures[0]]).tokens
    assert tokens.count(image_id) == pipeline.chain.tokenizer.spec.image_tokens
    assert pipeline.chat(turns, [pictures[0]], SHORT).prompt_tokens == len(tokens)


@pytest.mark.parametrize(("placeholders", "images"), [(2, 1), (1, 2), (2, 3)])
def test_placeholders_must_match_images(
    pipeline: Pipeline, pictures: list[Path], placeholders: int, images: int
) -> None:
    with pytest.raises(UserError, match=f"{placeholders} <image_placeholder> but {images} images"):
        pipeline.chat("<image_placeholder>" * placeholders + "?", pictures[:images])


def test_messages_are_checked(pipeline: Pipeline) -> None:
    with pytest.raises(UserError, match="needs role 'user', 'assistant' or 'system'"):
        pipeline.chat([{"role": "tool", "content": "x"}])
    with pytest.raises(UserError, match="must end with a user message"):
        pipeline.chat([{"role": "User", "content": "x"}, {"role": "Assistant", "content": "y"}])


def test_preprocessed_content_is_the_key(pipeline: Pipeline, pictures: list[Path]) -> None:
    """Two files with the same pixels are one image; see also the embeddings' cache bound."""
    pipeline.chain.max_cached_images = 2
    for picture in pictures[:3] * 2:
        pipeline.chain.embed_prompt(IMAGE_PLACEHOLDER, [picture])
    assert pipeline.chain.images_encoded == 6
    spec = pipeline.chain.preprocessing
    assert preprocess(pictures[0], spec).shape == (3, spec.image_size, spec.image_size)


@pytest.mark.parametrize(("precision", "widened", "item"), [("fp32", 1, 4), ("fp16", 2, 2)])
def test_needed_memory_is_weights_cache_and_activations(
    tiny_bundle: Bundle, precision: str, widened: int, item: int
) -> None:
    folder = tiny_bundle.folder / "onnxruntime" / precision
    weights = widened * sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    a_token = 2 * 4 * 4 * 32 * item  # keys and values of 4 layers with 4 heads of 32
    parts = ("vision_encoder", "adaptor", "decoder")
    artifacts = [tiny_bundle.artifact(part, "onnxruntime", precision) for part in parts]
    assert all(item.activation_bytes for item in artifacts)
    assert [item.activation_bytes_per_token > 0 for item in artifacts] == [False, False, True]
    for capacity in (None, 100, 2000):
        tokens = capacity or 1024
        active = max(item.activation_bytes + tokens * item.activation_bytes_per_token for item in artifacts)
        needed = weights + widened * active + tokens * a_token
        assert required_memory(tiny_bundle, "onnxruntime", precision, capacity) == needed


def test_needed_memory_leaves_engines_to_their_gpu(tiny_bundle: Bundle) -> None:
    plain = required_memory(tiny_bundle, "onnxruntime", "fp32", None)
    file = tiny_bundle.manifest.token_embedding  # any other file of the bundle in an engine's place
    engine = Engine(file, (87,), "", "", "11.4", 1024, 1)
    artifacts = tuple(
        replace(item, files=(*item.files, file), engine=engine) for item in tiny_bundle.manifest.artifacts
    )
    built = Bundle(tiny_bundle.folder, replace(tiny_bundle.manifest, artifacts=artifacts))
    assert required_memory(built, "onnxruntime", "fp32", None) == plain
