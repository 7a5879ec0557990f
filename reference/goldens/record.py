"""Recorder of the reference's goldens.

The requests show rendered pictures and, if scikit-image is installed, photographs.
"""

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
from runtimes.chain import Chain
from runtimes.errors import UserError
from runtimes.goldens.golden import GREEDY_TOKENS
from runtimes.goldens.long_context import (
    MIN_PROJECTIONS,
    LongGolden,
    logit_rows,
    long_golden_length,
    record_long_golden,
)
from runtimes.goldens.recording import GoldenRequest, record_goldens
from runtimes.goldens.taps import SAMPLES, TAPPED_COMPONENTS, hashed_numbers, record_all_taps
from runtimes.goldens.texts import TEXT_GOLDENS, TextGoldens, record_texts
from runtimes.text.prompt import (
    IMAGE_PLACEHOLDER,
    TEMPLATE,
    ChatTemplate,
    Message,
    format_chat,
    place_images,
)
from runtimes.text.tokenizer import Tokenizer

PHOTOGRAPHS = ("astronaut.png", "chelsea.png")  # public domain (NASA), CC0


def record_reference_goldens(
    source: Checkpoint,
    embedding_file: Path,
    folder: Path,
    on_step: Callable[[int, int], None],
    on_saved: Callable[[Path], None] = lambda file: None,
) -> None:
    """Record text goldens, and goldens of the fp32 reference with taps; see ``record_goldens``.

    Args:
        source: the checkpoint.
        embedding_file: the table that ``write_token_embedding`` wrote.
        folder: where the goldens are written; made if it does not exist.
        on_step: called with the number of steps done and in total.
        on_saved: called with each file that was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / TEXT_GOLDENS, record_reference_texts(source).to_dict())
    model = source.load_model()
    chain, tapped = (reference_chain(source, embedding_file, model, tapped) for tapped in (False, True))
    spec = chain.tokenizer.spec
    requests = golden_requests(spec.system_prompt, spec.template)
    positions = source.config.decoder.max_positions
    tap = partial(record_all_taps, tapped)
    record_goldens(chain, requests, folder, source.digest, positions, on_step, tap, on_saved)


def record_reference_texts(source: Checkpoint) -> TextGoldens:
    """Record prompts, token ids and decoded answers of a checkpoint's own tokenizer."""
    tokenizer = Tokenizer(source.tokenizer_files[0], prompt_spec(source))
    prompts = golden_raw_prompts()
    answers = golden_answers([tokenizer.encode(text) for text in prompts], tokenizer.spec.eos_id)
    vocab_size = source.config.decoder.vocab_size
    supports = tokenizer.spec.template.supports
    conversations = [item for item in golden_conversations() if supports(item.messages)]
    return record_texts(tokenizer, conversations, prompts, answers, vocab_size)


def record_reference_long_golden(source: Checkpoint, embedding_file: Path, capacity: int) -> LongGolden:
    """Record the long-context golden of the fp32 reference.

    Args:
        source: the checkpoint.
        embedding_file: the table that ``write_token_embedding`` wrote.
        capacity: default cache capacity of the bundle, in tokens.

    Raises:
        UserError: the model computes NaN or infinity.
    """
    chain = reference_chain(source, embedding_file)
    length = long_golden_length(chain.decoder.contract, capacity, source.config.decoder.max_positions)
    golden = record_long_golden(chain, long_golden_tokens(chain, length), source.digest, capacity)
    if layer := golden.first_nonfinite_part():
        raise UserError(
            f"The model computes NaN or infinity in {layer}; check the weights of {source.folder}."
        )
    return golden


def long_golden_tokens(chain: Chain, length: int) -> np.ndarray:
    """Return ``[length]`` tokens: the held-out questions' words in a fixed pseudo-random order.

    With repeated sentences, parity would not detect a sliding attention window.
    """
    lines = [json.loads(line) for line in HELDOUT.read_text(encoding="utf-8").splitlines()]
    texts = " ".join(f"{line['question']} {line['expected']}" for line in lines)
    words = sorted(set(texts.replace(IMAGE_PLACEHOLDER, "").split()))
    chosen = hashed_numbers(length) % np.uint64(len(words))  # a word has at least one token
    text = " ".join(words[index] for index in chosen)
    return np.array(chain.tokenizer.encode(text)[:length], np.int64)


def long_golden_bytes(config: ModelConfig, capacity: int) -> int:
    """Estimate the largest long-context golden in bytes, its header left out."""
    decoder = component_contract(config, "decoder", "fp32")
    length = long_golden_length(decoder, capacity, config.decoder.max_positions)
    rows, heads = len(logit_rows(length)), config.decoder.kv_heads
    keys = config.decoder.layers * heads * -(-MIN_PROJECTIONS // heads) * length
    return 8 * (length + rows) + 4 * (rows * config.decoder.vocab_size + keys)


def goldens_bytes(config: ModelConfig) -> int:
    """Estimate the most bytes that ``record_reference_goldens`` writes for its requests.

    Headers, the pictures themselves and the text goldens are left out.
    """
    vision, adaptor, decoder = (
        component_contract(config, component, "fp32") for component in TAPPED_COMPONENTS
    )
    requests = golden_requests("")
    values = math.prod(map(int, decoder.outputs[0].shape[2:])) * GREEDY_TOKENS * len(requests)
    values += SAMPLES * sum(len(contract.taps) for contract in (vision, adaptor, decoder))
    image_values = sum(math.prod(map(int, spec.shape[1:])) for spec in (*vision.outputs, *adaptor.outputs))
    pixels = 3 * config.vision.image_size**2
    return 4 * values + (4 * image_values + pixels) * sum(len(request.images) for request in requests)


def golden_requests(system_prompt: str, template: ChatTemplate = TEMPLATE) -> list[GoldenRequest]:
    """Return eight requests about ten held-out pictures of ``tiny``, and two about photographs."""
    questions = [*_rendered_questions(8), *_photograph_questions()]
    return [
        GoldenRequest(
            format_chat(place_images([Message("user", question)], len(images)), system_prompt, template),
            images,
        )
        for question, images in questions
    ]


def _rendered_questions(count: int) -> list[tuple[str, tuple[Path, ...]]]:
    """Return the first questions about distinct pictures; two of them are about two pictures."""
    rows = [json.loads(line) for line in HELDOUT.read_text(encoding="utf-8").splitlines()]
    chosen: list[tuple[str, tuple[Path, ...]]] = []
    for row in rows:
        images = tuple(HELDOUT.parent / name for name in row["images"])
        pairs = sum(len(other) > 1 for _, other in chosen)
        unused = not any(set(images) & set(other) for _, other in chosen)
        if unused and (len(images) == 1 or pairs < 2) and len(chosen) < count:
            chosen.append((row["question"], images))
    return chosen


def _photograph_questions() -> list[tuple[str, tuple[Path, ...]]]:
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        return []
    files = [Path(spec.submodule_search_locations[0]) / "data" / name for name in PHOTOGRAPHS]
    return [("<image_placeholder>Describe the picture.", (file,)) for file in files if file.exists()]
