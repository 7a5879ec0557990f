"""The stored KV prefix of the system prompt, and text that is prefilled while an image is encoded."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsvl_export import export
from dsvl_export.parity_check import parity
from reference.checkpoint.checkpoint import open_checkpoint
from reference.tiny import HELDOUT
from runtimes.bundle.bundle import Bundle
from runtimes.errors import UserError
from runtimes.generation.sampling import GenerationOptions
from runtimes.goldens.golden import relative_rms
from runtimes.goldens.task import load_task
from runtimes.pipeline import Pipeline
from runtimes.prefix import StoredPrefix, compute_states, prefix_file, prefix_tokens
from runtimes.scheduler import Scheduler
from runtimes.text.prompt import Message
from tests.calibration.calibrated import Calibrated
from tests.dsvl_export.parity_check.faults import rehash

QUESTION, MARK = "How many objects are there?", "<image_placeholder>"


def without_prefix(bundle: Bundle, *choice: str) -> Pipeline:
    pipeline = Pipeline.open(bundle, *choice)
    assert pipeline.chain.prefix is not None
    pipeline.chain.prefix = None
    return pipeline


def test_the_tokens_are_the_start_of_every_conversation(tiny_bundle: Bundle, pictures: list[Path]) -> None:
    pipeline = Pipeline.open(tiny_bundle)
    tokens = prefix_tokens(pipeline.chain.tokenizer)
    assert pipeline.chain.tokenizer.pieces(tokens)[-2:] == ["User", ":"]
    for text, images in ((QUESTION, []), ("1", []), ("\nx", []), ("a <image_placeholder>", pictures[:1])):
        prompt = pipeline.chain.prepare(pipeline.format(text, len(images)), images)
        assert prompt.tokens[: len(tokens)] == tokens


@pytest.mark.parametrize("precision", ["fp32", "fp16", "8da4w-g128"])
def test_answers_stay_the_same(quantized_bundle: Bundle, precision: str) -> None:
    choice = ("onnxruntime", precision)
    stored, computed = Pipeline.open(quantized_bundle, *choice), without_prefix(quantized_bundle, *choice)
    length = len(prefix_tokens(stored.chain.tokenizer))
    for item in load_task(HELDOUT)[::25]:
        one, other = (pipeline.chat(item.messages, item.images) for pipeline in (stored, computed))
        assert one.tokens == other.tokens
        assert one.reused_tokens >= length
        stored.reset()
        computed.reset()


def test_a_batch_and_a_scheduler_load_it(tiny_bundle: Bundle, pictures: list[Path]) -> None:
    pipeline, plain = Pipeline.open(tiny_bundle), without_prefix(tiny_bundle, "onnxruntime", "fp32")
    length = len(prefix_tokens(pipeline.chain.tokenizer))
    requests = [(pipeline.format(QUESTION, 1), [picture]) for picture in pictures[:2]]
    options = GenerationOptions(max_new_tokens=6)
    expected = [answer.tokens for answer in plain.generate_batch(requests, options)]
    assert [answer.tokens for answer in pipeline.generate_batch(requests, options)] == expected
    scheduler = Scheduler(pipeline.chain, pipeline.capacity, slots=2)
    done: list[Any] = []
    finished = threading.Semaphore(0)

    def deliver(step: Any) -> None:
        done.append(step)
        finished.release()

    try:
        for text, images in requests:
            scheduler.submit(pipeline.chain.prepare(text, images), options, deliver, every_step=False)
        for _ in requests:
            assert finished.acquire(timeout=60)
    finally:
        scheduler.close()
    assert sorted(step.answer.tokens for step in done) == sorted(expected)
    assert all(step.answer.reused_tokens >= length for step in done)


def test_another_system_prompt_and_an_adapter_do_not_take_it(
    switchable_bundle: Bundle, tiny_bundle: Bundle
) -> None:
    pipeline = Pipeline.open(tiny_bundle)
    answer = pipeline.chat([Message("system", "You answer briefly."), Message("user", QUESTION)])
    assert answer.reused_tokens < 3
    assert Pipeline.open(switchable_bundle, adapter="all").chain.prefix is None
    assert pipeline.chain.with_decoder(pipeline.chain.decoder).prefix is None
    assert pipeline.with_adapter(None).chain.prefix is pipeline.chain.prefix


def test_smoothed_values_have_a_prefix_of_their_own(tiny_calibrated: Calibrated, tmp_path: Path) -> None:
    """Smoothing scales the values that a cache holds; the prefix of fp32 would be wrong there."""
    scales = tmp_path / "scales"
    config = tiny_calibrated.source.config.decoder
    name = "decoder.layers.1.self_attn.v_proj"
    factors = np.exp(np.random.default_rng(0).normal(size=config.heads * config.head_dim))
    table = tiny_calibrated.table
    table = type(table)(**{**vars(table), "smoothing": {name: factors.astype(np.float32)}, "tuned": {}})
    table.save(scales)
    bundle = export("tiny", tmp_path / "b", precisions=["fp32", "int8-weights"], scales=scales)
    exact, smoothed = (
        StoredPrefix.load(
            bundle.path(prefix_file(precision)),
            bundle.manifest.checkpoint["sha256"],
            bundle.contract("decoder", "onnxruntime", precision),
        ).states
        for precision in ("fp32", "int8-weights")
    )
    errors = list(map(relative_rms, smoothed, exact))
    assert errors[3] > 0.3 and max(errors[:3] + errors[4:]) < 1e-5  # the values of layer 1
    result = parity(bundle, precision="int8-weights")
    assert result.stage("entry_points").state == "passed"


def test_it_is_recorded_with_the_goldens(tmp_path: Path) -> None:
    bundle = export("tiny", tmp_path / "b", goldens=False)
    assert not any(path.startswith("prefix/") for path in bundle.manifest.files)
    assert Pipeline.open(bundle).chain.prefix is None
    assert Pipeline.open(bundle).chat(QUESTION).reused_tokens == 0
    plan = tmp_path / "mine.yaml"
    plan.write_text("rules: []\n")
    with_goldens = export("tiny", tmp_path / "b", precisions=[str(plan)])
    assert prefix_file("mine") in with_goldens.manifest.files
    assert prefix_file("fp32") in with_goldens.manifest.files  # of the earlier decoder
    plan.write_text("kv_cache: int8\n")
    quantized = export("tiny", tmp_path / "b", precisions=[str(plan)])
    assert prefix_file("mine") not in quantized.manifest.files  # its cache holds codes
    assert parity(quantized, precision="mine").stage("entry_points").state == "passed"


@pytest.fixture
def file(bundle_copy: Path) -> Path:
    return bundle_copy / prefix_file("fp32")


def test_a_wrong_prefix_fails_the_parity_check(bundle_copy: Path, file: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    contract = bundle.contract("decoder", "onnxruntime", "fp32")
    prefix = StoredPrefix.load(file, bundle.manifest.checkpoint["sha256"], contract)
    swapped = prefix.states.copy()
    swapped[[2, 4]] = swapped[[4, 2]]
    for states, tokens, message in (
        (swapped, prefix.tokens, "keys of layer 1 of the stored prefix"),
        (prefix.states * np.float32(1.001), prefix.tokens, "keys of layer 0 of the stored prefix"),
        (prefix.states, prefix.tokens[::-1].copy(), "the stored prefix is not that of the system prompt"),
    ):
        StoredPrefix(prefix.checkpoint, tokens, states, prefix.errors).save(file)
        result = parity(rehash(bundle_copy, prefix_file("fp32")), "onnxruntime", "fp32")
        assert result.stage("entry_points").state == "failed"
        assert message in result.stage("entry_points").detail


def test_a_damaged_prefix_is_refused(bundle_copy: Path, file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"damaged: prefix/fp32/prefix.safetensors has \d+ bytes"):
        Pipeline.open(bundle_copy, precision="fp32")
    rehash(bundle_copy, prefix_file("fp32"))
    with pytest.raises(UserError, match="is not the stored prefix of this bundle"):
        Pipeline.open(bundle_copy, precision="fp32")
    shutil.copy(bundle_copy / prefix_file("fp16"), file)
    contract = Bundle.open(bundle_copy).contract("decoder", "onnxruntime", "fp32")
    with pytest.raises(UserError, match="is not the stored prefix of this bundle"):
        StoredPrefix.load(file, "0" * 64, contract)


def test_it_is_what_the_reference_computes(tiny_bundle: Bundle) -> None:
    """transformers' layout of the cache: keys after RoPE, and values."""
    from reference.session import reference_chain

    source = open_checkpoint("tiny")
    contract = tiny_bundle.contract("decoder", "onnxruntime", "fp32")
    path = tiny_bundle.path(prefix_file("fp32"))
    prefix = StoredPrefix.load(path, source.digest, contract)
    chain = reference_chain(source, tiny_bundle.path(tiny_bundle.manifest.token_embedding))
    assert relative_rms(prefix.states, compute_states(chain, prefix.tokens)) < 1e-6
    assert not prefix.errors.any()


# Text while an image is encoded.


def test_text_is_prefilled_while_the_image_is_encoded(tiny_bundle: Bundle, pictures: list[Path]) -> None:
    pipeline, plain = (without_prefix(tiny_bundle, "onnxruntime", "fp32") for _ in range(2))
    pipeline.chain.separate_devices = True
    chain, reached, order = pipeline.chain, threading.Event(), []
    assert chain.concurrent and not plain.chain.separate_devices  # both are on the CPU
    encode, prefill = chain.encode_image, chain.prefill

    def encode_image(image: Any) -> np.ndarray:
        order.append(f"encode in {threading.current_thread() is threading.main_thread()}")
        if len(order) == 1:
            assert reached.wait(60)  # until the text is prefilled
        return encode(image)

    def prefill_text(embeds: np.ndarray, cache: Any) -> np.ndarray:
        logits = prefill(embeds, cache)
        order.append(f"{len(embeds)} tokens")
        reached.set()
        return logits

    chain.encode_image, chain.prefill = encode_image, prefill_text  # type: ignore[method-assign]
    answer = pipeline.chat(QUESTION, pictures[:1])
    before = len(prefix_tokens(chain.tokenizer))
    assert order[:2] == ["encode in False", f"{before + 1} tokens"] or order[1] == f"{before} tokens"
    assert answer.tokens == plain.chat(QUESTION, pictures[:1]).tokens
    order.clear()
    again = pipeline.chat([Message("system", "Be brief."), Message("user", QUESTION)], pictures[:1])
    assert len(order) == 2 and "encode" in order[0]  # it was encoded before
    assert again.tokens


def test_the_first_new_image_is_the_first_in_the_prompt(tiny_bundle: Bundle, pictures: list[Path]) -> None:
    """Not the first that the conversation showed: that one may be shown again later."""
    pipeline, plain = (without_prefix(tiny_bundle, "onnxruntime", "fp32") for _ in range(2))
    pipeline.chain.separate_devices = True
    turns = [Message("user", QUESTION)]
    shown = [pictures[0]]
    for opened in (pipeline, plain):
        answer = opened.chat(turns, shown)
        opened.chain._images.clear()  # as after many other images
    later = [*turns, Message("assistant", answer.text), Message("user", f"{MARK} and {MARK}?")]
    later[0] = Message("user", f"{MARK}{QUESTION}")
    images = [pictures[0], pictures[1], pictures[0]]
    assert pipeline.chat(later, images).tokens == plain.chat(later, images).tokens
    order = [digest for digest, _ in pipeline._conversations[-1].keys if digest]
    assert len(set(order)) == 2


def test_an_error_of_the_encoder_reaches_the_caller(tiny_bundle: Bundle, pictures: list[Path]) -> None:
    pipeline = without_prefix(tiny_bundle, "onnxruntime", "fp32")
    pipeline.chain.separate_devices = True
    encode = pipeline.chain.encode_image

    def broken(image: Any) -> np.ndarray:
        raise UserError("broken")

    pipeline.chain.encode_image = broken  # type: ignore[method-assign]
    with pytest.raises(UserError, match="broken"):
        pipeline.chat(QUESTION, pictures[:1])
    pipeline.chain.encode_image = encode  # type: ignore[method-assign]
    expected = without_prefix(tiny_bundle, "onnxruntime", "fp32").chat(QUESTION, pictures[:1]).tokens
    assert pipeline.chat(QUESTION, pictures[:1]).tokens == expected
