"""Goldens of the reference: rendered pictures and, where scikit-image is installed, photographs."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from reference.checkpoint.checkpoint import Checkpoint
from reference.checkpoint.specs import prompt_spec
from reference.goldens.texts import golden_answers, golden_conversations, golden_raw_prompts
from reference.model.config import ModelConfig
from reference.session import reference_chain
from reference.tiny import HELDOUT
from reference.trace import component_contract
from runtimes.bundle.files import write_json
from runtimes.cache import cache_bytes
from runtimes.chain import Chain
from runtimes.errors import UserError
from runtimes.goldens.golden import GREEDY_TOKENS
from runtimes.goldens.long_context import (
    CACHE_BYTES,
    MIN_PROJECTIONS,
    LongGolden,
    logit_rows,
    long_golden_length,
    record_long_golden,
)
from runtimes.goldens.recording import GoldenRequest, record_goldens
from runtimes.goldens.taps import SAMPLES, TAPPED_COMPONENTS, hashed_numbers, record_all_taps
from runtimes.goldens.texts import TEXT_GOLDENS, TextGoldens, record_texts
from runtimes.text.prompt import IMAGE_PLACEHOLDER, Message, format_chat, place_images
from runtimes.text.tokenizer import Tokenizer

PHOTOGRAPHS = ("astronaut.png", "chelsea.png")  # both free of rights (NASA; CC0)


def record_reference(
    source: Checkpoint,
    embedding_file: Path,
    folder: Path,
    on_step: Callable[[int, int], None],
    on_saved: Callable[[Path], None] = lambda file: None,
) -> None:
    """Goldens of the fp32 reference, with taps, and of texts, into ``folder``; see ``record_goldens``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / TEXT_GOLDENS, reference_texts(source).to_dict())
    model = source.model()
    chain, tapped = (reference_chain(source, embedding_file, model, tapped) for tapped in (False, True))
    requests = golden_requests(chain.tokenizer.spec.system_prompt)
    positions = source.config.decoder.max_positions
    tap = partial(record_all_taps, tapped)
    record_goldens(chain, requests, folder, source.digest, positions, on_step, tap, on_saved)


def reference_texts(source: Checkpoint) -> TextGoldens:
    """What a checkpoint's own tokenizer and settings make of the texts of ``golden_texts``."""
    tokenizer = Tokenizer(source.tokenizer_files[0], prompt_spec(source))
    raw = golden_raw_prompts()
    answers = golden_answers([tokenizer.encode(text) for text in raw], tokenizer.spec.eos_id)
    return record_texts(tokenizer, golden_conversations(), raw, answers, source.config.decoder.vocab_size)


def record_long_reference(source: Checkpoint, embedding_file: Path, capacity: int) -> LongGolden:
    """The long golden of the fp32 reference, for a bundle of a default capacity.

    Raises:
        UserError: what the model computes is not finite.
    """
    chain = reference_chain(source, embedding_file)
    length = long_golden_length(chain, capacity, source.config.decoder.max_positions)
    golden = record_long_golden(chain, long_text(chain, length), source.digest, capacity)
    if layer := golden.first_nonfinite_part():
        raise UserError(
            f"The output of the model holds NaN or infinity in {layer}; check the checkpoint's weights."
        )
    return golden


def long_text(chain: Chain, length: int) -> np.ndarray:
    """``[length]`` tokens of words in a random order, always the same: the words of the held-out questions.

    Sentences that repeat would hide an attention window.
    """
    lines = [json.loads(line) for line in HELDOUT.read_text(encoding="utf-8").splitlines()]
    texts = " ".join(f"{line['question']} {line['expected']}" for line in lines)
    words = sorted(set(texts.replace(IMAGE_PLACEHOLDER, "").split()))
    chosen = hashed_numbers(length) % np.uint64(len(words))  # a word has a token at least
    text = " ".join(words[index] for index in chosen)
    return np.array(chain.tokenizer.encode(text)[:length], np.int64)


def long_golden_bytes(config: ModelConfig, capacity: int) -> int:
    """The most bytes of a long golden, its header left out."""
    decoder = component_contract(config, "decoder", "fp32")
    length = min(capacity, config.decoder.max_positions, CACHE_BYTES // cache_bytes(decoder.states, 1, 1))
    rows, heads = len(logit_rows(length)), config.decoder.kv_heads
    keys = config.decoder.layers * heads * -(-MIN_PROJECTIONS // heads) * length
    return 8 * (length + rows) + 4 * (rows * config.decoder.vocab_size + keys)


def goldens_bytes(config: ModelConfig) -> int:
    """The most bytes that ``record_reference`` writes for its requests; headers and the pictures themselves
    are left out, and the texts."""
    vision, adaptor, decoder = (
        component_contract(config, component, "fp32") for component in TAPPED_COMPONENTS
    )
    requests = golden_requests("")
    values = math.prod(map(int, decoder.outputs[0].shape[2:])) * GREEDY_TOKENS * len(requests)
    values += SAMPLES * sum(len(contract.taps) for contract in (vision, adaptor, decoder))
    of_an_image = sum(math.prod(map(int, spec.shape[1:])) for spec in (*vision.outputs, *adaptor.outputs))
    square = 3 * config.vision.image_size**2
    return 4 * values + (4 * of_an_image + square) * sum(len(request.images) for request in requests)


def golden_requests(system_prompt: str) -> list[GoldenRequest]:
    """Eight questions about ten held-out pictures of the tiny model, and two about photographs."""
    asked = [*_rendered(8), *_photographs()]
    return [
        GoldenRequest(
            format_chat(place_images([Message("user", question)], len(images)), system_prompt), images
        )
        for question, images in asked
    ]


def _rendered(count: int) -> list[tuple[str, tuple[Path, ...]]]:
    """The first questions of different pictures, two of them about two pictures."""
    rows = [json.loads(line) for line in HELDOUT.read_text(encoding="utf-8").splitlines()]
    chosen: list[tuple[str, tuple[Path, ...]]] = []
    for row in rows:
        images = tuple(HELDOUT.parent / name for name in row["images"])
        pairs = sum(len(known) > 1 for _, known in chosen)
        fresh = not any(set(images) & set(known) for _, known in chosen)
        if fresh and (len(images) == 1 or pairs < 2) and len(chosen) < count:
            chosen.append((row["question"], images))
    return chosen


def _photographs() -> list[tuple[str, tuple[Path, ...]]]:
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        return []
    files = [Path(spec.submodule_search_locations[0]) / "data" / name for name in PHOTOGRAPHS]
    return [("<image_placeholder>Describe the picture.", (file,)) for file in files if file.exists()]
