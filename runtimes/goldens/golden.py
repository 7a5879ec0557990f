"""Goldens: recorded inputs and outputs of the reference, stage by stage, one file per request.

A Swift or C++ port can check itself against the same files: ``squares`` are the preprocessed
images before rescaling, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from safetensors import SafetensorError, safe_open

from runtimes.bundle.files import parse_json
from runtimes.bundle.manifest import stays_inside
from runtimes.bundle.tensor_files import save_tensors
from runtimes.chain import Chain
from runtimes.errors import UserError

GREEDY_TOKENS = 32
SETTINGS = "settings.json"  # beside the goldens: model and preprocessing that the reference had


@dataclass(frozen=True)
class Golden:
    """One request and what the fp32 reference made of it.

    ``squares [n, N, N, 3]`` uint8, ``features`` and ``image_embeds [n, T, C]`` float32,
    ``greedy_tokens [32]`` (not stopped at EOS), ``logits [32, V]`` float32: those of which
    each greedy token is the argmax, the first one after prefill. ``taps`` (component → tap → sampled
    values, see ``runtimes.goldens.taps``) has the first golden of a bundle only. ``checkpoint`` is the
    SHA-256 of the checkpoint that was recorded.
    """

    checkpoint: str
    prompt: str
    images: tuple[str, ...]
    squares: np.ndarray
    features: dict[str, np.ndarray]
    image_embeds: np.ndarray
    prompt_tokens: np.ndarray
    greedy_tokens: np.ndarray
    logits: np.ndarray
    taps: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)


def save_golden(golden: Golden, file: Path) -> None:
    tensors = {
        "squares": golden.squares,
        "image_embeds": golden.image_embeds,
        "prompt_tokens": golden.prompt_tokens,
        "greedy_tokens": golden.greedy_tokens,
        "logits": golden.logits,
        **{f"features/{name}": array for name, array in golden.features.items()},
        **{
            f"taps/{component}/{name}": array
            for component, taps in golden.taps.items()
            for name, array in taps.items()
        },
    }
    texts = {"checkpoint": golden.checkpoint, "prompt": golden.prompt, "images": json.dumps(golden.images)}
    save_tensors(tensors, file, texts)


def is_golden(path: str) -> bool:
    """Whether a file of ``goldens/`` is that of a numbered request, and not the long golden."""
    name = PurePosixPath(path)
    return name.suffix == ".safetensors" and name.stem.isdigit()


def tokens_of_golden(file: Path) -> int:
    """Tokens of a golden's prompt and answer, from its header alone; 0 where it cannot be read."""
    try:
        with safe_open(file, framework="np") as handle:
            return int(handle.get_slice("prompt_tokens").get_shape()[0]) + GREEDY_TOKENS
    except (SafetensorError, OSError):
        return 0


def load_golden(file: Path) -> Golden:
    """Raises UserError where the file is no golden, or holds NaN or infinity."""
    try:
        with safe_open(file, framework="np") as handle:
            texts = handle.metadata()
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}
        features: dict[str, np.ndarray] = {}
        taps: dict[str, dict[str, np.ndarray]] = {}
        for name in [name for name in tensors if "/" in name]:
            group, _, path = name.partition("/")
            if group == "features":
                features[path] = tensors.pop(name)
            else:
                component, _, tap = path.partition("/")
                taps.setdefault(component, {})[tap] = tensors.pop(name)
        golden = Golden(
            checkpoint=texts["checkpoint"],
            prompt=texts["prompt"],
            images=tuple(parse_json(texts["images"], "the list of images")),
            features=features,
            taps=taps,
            **tensors,
        )
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(
            f"{file} is no golden that can be read ({error}); export the bundle again."
        ) from error
    for name in golden.images:
        if not isinstance(name, str) or "/" in name or not stays_inside(name):
            raise UserError(f"The golden {file} names the image {name!r}, which is not one of the bundle's.")
    check_finite(golden, f"The golden {file}")
    return golden


def check_finite(golden: Golden, what: str) -> None:
    """Raise UserError where a golden holds NaN or infinity, which nothing can be compared with."""
    arrays = {**golden.features, "image_embeds": golden.image_embeds, "logits": golden.logits}
    for component, taps in golden.taps.items():
        arrays |= {f"{component} {name}": array for name, array in taps.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(f"{what} holds NaN or infinity in {name}; are the checkpoint's weights sound?")


def relative_rms(found: np.ndarray, expected: np.ndarray) -> float:
    """``|found - expected| / |expected|``; NaN where either holds NaN."""
    exact = expected.astype(np.float64)
    difference = found.astype(np.float64) - exact
    scale = np.sqrt(np.mean(np.square(exact)))
    return float(np.sqrt(np.mean(np.square(difference))) / max(scale, 1e-30))


def greedy(
    chain: Chain,
    prompts: Sequence[np.ndarray],
    count: int,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, np.ndarray]:
    """``count`` greedy tokens after each prompt ``[S, D]``, going on past EOS, all prompts together.

    Returns:
        tokens ``[B, count]`` and the logits ``[B, count, V]`` that they are the argmax of.
    """
    cache = chain.decoder.new_cache(len(prompts), max(map(len, prompts)) + count)
    logits = [np.stack([chain.prefill(embeds, cache.row(row)) for row, embeds in enumerate(prompts)])]
    on_step()
    while len(logits) < count:
        logits.append(chain.decode(logits[-1].argmax(-1)[:, None], cache)[:, 0])
        on_step()
    table = np.stack(logits, axis=1)
    return table.argmax(-1), table


def teacher_forced(chain: Chain, embeds: np.ndarray, tokens: list[int]) -> np.ndarray:
    """``[len(tokens), V]`` logits that predict each of ``tokens``, computed in prefill chunks.

    The last chunk asks for several rows at once, which is what ``logit_rows`` is for.
    """
    text = chain.embed_tokens(tokens[:-1])
    cache = chain.decoder.new_cache(1, len(embeds) + len(text))
    if len(embeds) > 1:
        chain.prefill(embeds[:-1], cache)
    tail = np.concatenate([embeds[-1:], text])[None]
    logits: np.ndarray = chain.decoder.decode(tail, np.arange(tail.shape[1]), cache)[0]
    return logits
