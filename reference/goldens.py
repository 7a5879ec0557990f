"""Goldens of the reference: rendered pictures and, where scikit-image is installed, photographs."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

from reference.checkpoint import Checkpoint
from reference.config import ModelConfig
from reference.session import reference_chain
from reference.tiny import HELDOUT
from reference.trace import component_contract
from runtimes.goldens import GREEDY_TOKENS
from runtimes.prompt import Message, format_chat, place_images
from runtimes.recording import GoldenRequest, record_goldens
from runtimes.taps import SAMPLES, TAPPED_COMPONENTS, take_all_taps

PHOTOGRAPHS = ("astronaut.png", "chelsea.png")  # both free of rights (NASA; CC0)


def record_reference(
    source: Checkpoint,
    embedding_file: Path,
    folder: Path,
    on_step: Callable[[int, int], None],
    on_saved: Callable[[Path], None] = lambda file: None,
) -> None:
    """Goldens of the fp32 reference, with taps, into ``folder``; see ``record_goldens``."""
    model = source.model()
    chain, tapped = (reference_chain(source, embedding_file, model, tapped) for tapped in (False, True))
    requests = golden_requests(chain.tokenizer.spec.system_prompt)
    positions = source.config.decoder.max_positions
    tap = partial(take_all_taps, tapped)
    record_goldens(chain, requests, folder, source.digest, positions, on_step, tap, on_saved)


def goldens_bytes(config: ModelConfig) -> int:
    """The most bytes that ``record_reference`` writes; headers and the pictures themselves are left out."""
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
