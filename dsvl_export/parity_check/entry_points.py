"""What apps call of an artifact beside what ``Pipeline`` runs, judged like the stages that it stands for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from dsvl_export.compilers import App
from dsvl_export.parity_check.quantization_error import Noise
from dsvl_export.parity_check.result import ParityResult
from dsvl_export.parity_check.settings import settings_faults
from dsvl_export.parity_check.stages import STEPS, Goldens
from dsvl_export.version import __version__
from runtimes.backends.executorch_tokenizer import describe_differences, tokenizer_differences
from runtimes.backends.registry import load_backend
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.manifest import TOKENIZER
from runtimes.chain import Chain
from runtimes.goldens.golden import Golden
from runtimes.preprocess import to_pixel_values
from runtimes.session import EntryPoints

RUNG = "entry_points"
FLOATS = ("fp32", "fp16", "bf16")
# The largest difference of a row of the token embeddings, relative to the row's largest number.
ROUNDED, IN_8_BITS = 1e-3, 0.5 / 127 * 1.01


class Judge(Protocol):
    """Compare an array of an entry point, by name and stage, with what it must be."""

    def __call__(
        self, name: str, stage: str, array: np.ndarray, expected: np.ndarray, same: bool = False
    ) -> None: ...


def judge_entry_points(
    bundle: Bundle,
    chain: Chain,
    goldens: Goldens,
    checkpoint: str,
    result: ParityResult,
    noise: Noise,
    live: str | None = None,
) -> None:
    """Fill the result's rung of the entry points, on the first golden; each failure names its entry point.

    The manifest's values count as one: apps read the same file.

    Args:
        chain: of the sessions that are judged.
        checkpoint: SHA-256 of the checkpoint that the goldens were recorded from.
        live: as in ``parity``.
    """
    rung = result.rung(RUNG)
    rung.passed()
    for fault in settings_faults(bundle, live):
        rung.fail(fault)
    module = load_backend(result.backend)
    make: Callable[[Chain, int], EntryPoints] = getattr(module, "entry_points", lambda *_: EntryPoints())
    artifact = bundle.artifact("decoder", result.backend, result.precision)
    found = make(chain, artifact.capacity or bundle.manifest.default_capacity)
    golden, index = goldens.load(0, checkpoint), goldens.numbers[0]

    def judge(name: str, stage: str, array: np.ndarray, expected: np.ndarray, same: bool = False) -> None:
        measured = None if same else noise.of(index, stage)  # of the same numbers in the same precision
        failed = rung.state == "failed"
        rung.compare(index, name, array, expected, result.bound(stage, measured), measured)
        if rung.state == "failed" and not failed:
            assert rung.errors
            reason = rung.detail or f"error {rung.errors.relative_rms:.1e}, bound {rung.errors.bound:.1e}"
            rung.detail = f"{name}: {reason}"

    for name, (value, wanted) in found.values.items():
        if value != wanted or type(value) is not type(wanted):
            rung.fail(f"{name} says {value!r}, the bundle says {wanted!r}")
    _judge_encoders(found, chain, golden, judge)
    _judge_decoders(found, chain, golden, judge)
    for name, embed in found.token_embeddings.items():
        _judge_token_embeddings(name, embed, found.most_tokens, chain, result)
    for name, file in found.tokenizers.items():
        different, _ = tokenizer_differences(file, bundle.path(TOKENIZER), thorough=False)
        if different:
            rung.fail(f"{name} reads {describe_differences(different)} otherwise than the checkpoint's")
    for fault in _listing_faults(bundle, result):
        rung.fail(fault)


def _judge_encoders(found: EntryPoints, chain: Chain, golden: Golden, judge: Judge) -> None:
    for name, encode in found.images.items():
        each = [encode(square) for square in golden.squares]
        for feature, expected in golden.features.items():
            array = np.concatenate([features[feature] for features in each])
            judge(f"{name} ({feature})", "vision_encoder", array, expected)
    for name, run in found.image_embeds.items():
        pixels = np.stack([to_pixel_values(square, chain.preprocessing) for square in golden.squares])
        array = np.concatenate([run(one[None]) for one in pixels])
        judge(name, "adaptor", array, chain.adapt(chain.encode_pixels(pixels)), same=True)


def _judge_decoders(found: EntryPoints, chain: Chain, golden: Golden, judge: Judge) -> None:
    for name, decoder in found.decoders.items():
        other = copy.copy(chain)
        other.decoder = decoder
        embeds = other.merge(golden.prompt_tokens, golden.image_embeds)
        cache = decoder.new_cache(1, len(embeds) + STEPS)
        judge(name, "prefill_logits", other.prefill(embeds, cache)[None], golden.logits[:1])
        tokens = golden.greedy_tokens[:STEPS]
        rows = np.stack([other.decode(np.array([[token]]), cache)[0, 0] for token in tokens])
        judge(f"{name}, then single tokens", "teacher_forced_logits", rows, golden.logits[1 : STEPS + 1])


def _judge_token_embeddings(
    name: str,
    embed: Callable[[np.ndarray], np.ndarray],
    most_tokens: int,
    chain: Chain,
    result: ParityResult,
) -> None:
    """Compare all rows with the bundle's table; a quantized precision has 8 bits of each number."""
    rung, allowed = result.rung(RUNG), ROUNDED if result.precision in FLOATS else IN_8_BITS
    tokens = np.arange(len(chain.embedding.rows))
    for start in range(0, len(tokens), most_tokens):
        part = tokens[start : start + most_tokens]
        expected = chain.embed_tokens(part).astype(np.float32)
        found = embed(part).astype(np.float32)
        if found.shape != expected.shape:
            rung.fail(f"{name} gives {list(found.shape)}, expected {list(expected.shape)}")
            return
        largest = np.abs(expected).max(1)
        wrong = ~(np.abs(found - expected).max(1) <= allowed * largest)  # NaN is wrong as well
        if wrong.any():
            rung.fail(f"{name} gives another embedding for token {part[wrong][0]} than the bundle's table")
            return


def _listing_faults(bundle: Bundle, result: ParityResult) -> Iterator[str]:
    """Where the listing of source code is not what this release writes for the bundle."""
    from dsvl_export.compilers.mil.listing import FILE, listing

    manifest = bundle.manifest
    path = f"{result.backend}/{result.precision}/listing/{FILE}"
    if path not in manifest.files:
        return
    bundle.check([path])
    decoder = bundle.artifact("decoder", result.backend, result.precision)
    app = App(
        manifest.contracts[result.precision], manifest.preprocessing, manifest.prompt,
        bundle.path(manifest.token_embedding), bundle.path(TOKENIZER),
        decoder.capacity or manifest.default_capacity, manifest.checkpoint["name"], result.precision,
    )  # fmt: skip
    found = bundle.path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    expected = listing(app).splitlines()
    if not found or __version__ not in found[0]:
        yield f"the listing {FILE} was not written by this release ({__version__}); export the bundle again"
        return
    for number, (line, wanted) in enumerate(_pairs(found, expected), 1):
        if line != wanted:
            shown = [text.strip()[:60] for text in (line, wanted)]
            yield f"line {number} of the listing {FILE} is {shown[0]!r}, expected {shown[1]!r}"
            return


def _pairs(one: list[str], other: list[str]) -> Iterator[tuple[str, str]]:
    length = max(len(one), len(other))
    yield from zip(one + [""] * (length - len(one)), other + [""] * (length - len(other)), strict=True)
