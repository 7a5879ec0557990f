"""Goldens: recorded inputs and outputs of the reference for each stage, one file per request.

A Swift or C++ port can be tested against the same files: ``squares`` are the preprocessed images
before rescaling, bit for bit.
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
SETTINGS = "settings.json"  # beside the goldens: model and preprocessing of the reference


@dataclass(frozen=True)
class Golden:
    """One request and the results of the fp32 reference.

    Args:
        checkpoint: SHA-256 of the checkpoint.
        prompt: the raw prompt.
        images: names of the image files.
        squares: resized and padded images ``[n, N, N, 3]`` uint8.
        features: vision features by name, float32.
        image_embeds: ``[n, T, D]`` float32.
        prompt_tokens: ids ``[S]`` int64, images expanded.
        greedy_tokens: ids ``[32]`` int64, not stopped at EOS.
        logits: ``[32, V]`` float32; each greedy token is the argmax of its row. The first row is
            that of prefill.
        taps: component → tap → sampled values (``runtimes.goldens.taps``); only the first golden
            of a bundle has them.
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
    """Write a golden as safetensors."""
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
    """Whether a file of ``goldens/`` is the golden of a request, and not the long golden."""
    name = PurePosixPath(path)
    return name.suffix == ".safetensors" and name.stem.isdigit()


def golden_token_count(file: Path) -> int:
    """Read from the header the tokens of a golden's prompt and answer; 0 if it is not readable."""
    try:
        with safe_open(file, framework="np") as handle:
            return int(handle.get_slice("prompt_tokens").get_shape()[0]) + GREEDY_TOKENS
    except (SafetensorError, OSError):
        return 0


def load_golden(file: Path) -> Golden:
    """Read a golden that ``save_golden`` wrote.

    Raises:
        UserError: the file is not a readable golden, or holds NaN or infinity.
    """
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
        raise UserError(f"{file} is not a readable golden ({error}); export the bundle again.") from error
    for name in golden.images:
        if not isinstance(name, str) or "/" in name or not stays_inside(name):
            raise UserError(f"The golden {file} has the image {name!r}, which is not in the bundle.")
    check_finite(golden, f"The golden {file}")
    return golden


def check_finite(golden: Golden, what: str) -> None:
    """Check that a golden holds neither NaN nor infinity, which cannot be compared.

    Args:
        golden: the golden.
        what: its description, as the subject of a message.

    Raises:
        UserError: it holds one; the message names the tensor.
    """
    arrays = {**golden.features, "image_embeds": golden.image_embeds, "logits": golden.logits}
    for component, taps in golden.taps.items():
        arrays |= {f"{component} {name}": array for name, array in taps.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(f"{what} holds NaN or infinity in {name}; check the checkpoint's weights.")


def relative_rms(actual: np.ndarray, expected: np.ndarray) -> float:
    """Compute ``|actual - expected| / |expected|`` with RMS norms; NaN if an array holds NaN."""
    exact = expected.astype(np.float64)
    difference = actual.astype(np.float64) - exact
    scale = np.sqrt(np.mean(np.square(exact)))
    return float(np.sqrt(np.mean(np.square(difference))) / max(scale, 1e-30))


def greedy_decode(
    chain: Chain,
    prompts: Sequence[np.ndarray],
    count: int,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Decode greedily after each prompt, all prompts together, without a stop at EOS.

    Args:
        chain: the components.
        prompts: embeddings ``[S, D]`` of each prompt.
        count: number of tokens to decode.
        on_step: called after prefill and after each decode step.

    Returns:
        tokens ``[B, count]``, and the logits ``[B, count, V]`` of which they are the argmax.
    """
    cache = chain.decoder.new_cache(len(prompts), max(map(len, prompts)) + count)
    logits = [np.stack([chain.prefill(embeds, cache.row(row)) for row, embeds in enumerate(prompts)])]
    on_step()
    while len(logits) < count:
        logits.append(chain.decode(logits[-1].argmax(-1)[:, None], cache)[:, 0])
        on_step()
    table = np.stack(logits, axis=1)
    return table.argmax(-1), table


def teacher_forced_logits(chain: Chain, embeds: np.ndarray, tokens: list[int]) -> np.ndarray:
    """Compute the logits that predict each of ``tokens``, in prefill chunks.

    The last chunk requests several logit rows in one call.

    Args:
        chain: the components.
        embeds: embeddings ``[S, D]`` of the prompt.
        tokens: the tokens after the prompt.

    Returns:
        logits ``[len(tokens), V]``.
    """
    text = chain.embed_tokens(tokens[:-1])
    cache = chain.decoder.new_cache(1, len(embeds) + len(text))
    if len(embeds) > 1:
        chain.prefill(embeds[:-1], cache)
    tail = np.concatenate([embeds[-1:], text])[None]
    logits: np.ndarray = chain.decoder.decode(tail, np.arange(tail.shape[1]), cache)[0]
    return logits
