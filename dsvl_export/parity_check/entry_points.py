"""The stage ``entry_points``: functions of an artifact that apps call and ``Pipeline`` does not.

Each is judged with the bound of the stage that it belongs to.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dsvl_export.compilers.mil.listing import FILE, render_listing
from dsvl_export.compilers.protocol import App
from dsvl_export.parity_check.goldens import Goldens
from dsvl_export.parity_check.quantization_error import QuantizationError
from dsvl_export.parity_check.result import ParityResult
from dsvl_export.parity_check.settings import settings_faults
from dsvl_export.parity_check.stage_tensors import STEPS
from dsvl_export.version import __version__
from runtimes.backends.capabilities import ProvidesEntryPoints
from runtimes.backends.executorch_tokenizer import describe_differences, tokenizer_differences
from runtimes.backends.registry import load_backend
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.manifest import TOKENIZER
from runtimes.chain import Chain
from runtimes.goldens.golden import Golden
from runtimes.prefix import StoredPrefix, compute_states, prefix_file, prefix_tokens
from runtimes.preprocess import to_pixel_values
from runtimes.session import EntryPoints

if TYPE_CHECKING:
    from reference.checkpoint.checkpoint import Checkpoint

STAGE = "entry_points"
FLOATS = ("fp32", "fp16", "bf16")
# Largest difference in a row of the token embeddings, relative to the largest number of the row.
FLOAT_BOUND, INT8_BOUND = 1e-3, 0.5 / 127 * 1.01


class Judge(Protocol):
    """Compares an array of an entry point with the expected one."""

    def __call__(
        self, name: str, stage_name: str, array: np.ndarray, expected: np.ndarray, same: bool = False
    ) -> None:
        """Judge one array.

        Args:
            name: of the entry point.
            stage_name: the stage whose bound applies.
            array: what the entry point computes.
            expected: what it must compute.
            same: ``expected`` is in the precision of the artifact, so that no quantization error
                counts.
        """


def judge_entry_points(
    bundle: Bundle,
    chain: Chain,
    goldens: Goldens,
    checkpoint: str,
    result: ParityResult,
    quantization_error: QuantizationError,
    source: Checkpoint | None = None,
) -> None:
    """Fill in the stage ``entry_points``, on the first golden; each failure names its entry point.

    The settings in the manifest are judged too, since apps read the manifest.

    Args:
        bundle: the bundle that is judged.
        chain: the sessions that are judged.
        goldens: recorded outputs of the reference.
        checkpoint: SHA-256 of the checkpoint that the goldens were recorded from.
        result: the result to fill in.
        quantization_error: error of the reference itself at this precision.
        source: the checkpoint of ``parity --live``; None judges by what was recorded.

    Raises:
        UserError: a golden or the bundle is damaged.
    """
    stage = result.stage(STAGE)
    stage.passed()
    for fault in settings_faults(bundle, source):
        stage.fail(fault)
    golden, index = goldens.load(0, checkpoint), goldens.numbers[0]

    def judge(
        name: str, stage_name: str, array: np.ndarray, expected: np.ndarray, same: bool = False
    ) -> None:
        measured = None if same else quantization_error.at(index, stage_name)
        _compare(result, name, stage_name, array, expected, measured, index)

    for points in _entry_points(bundle, chain, result):
        for name, (value, wanted) in points.values.items():
            if value != wanted or type(value) is not type(wanted):
                stage.fail(f"{name} says {value!r}, the bundle says {wanted!r}")
        _judge_encoders(points, chain, golden, judge)
        _judge_decoders(points, chain, golden, judge)
        for name, embed in points.token_embeddings.items():
            _judge_token_embeddings(name, embed, points.max_tokens, chain, result)
        for name, file in points.tokenizers.items():
            different, _ = tokenizer_differences(file, bundle.path(TOKENIZER), thorough=False)
            if different:
                stage.fail(
                    f"{name} tokenizes {describe_differences(different)} differently from the tokenizer of"
                    " the checkpoint"
                )
    _judge_prefix(bundle, chain, result)
    for fault in _listing_faults(bundle, result):
        stage.fail(fault)


def _entry_points(bundle: Bundle, chain: Chain, result: ParityResult) -> Iterator[EntryPoints]:
    """Open the entry points of each backend of the artifacts."""
    artifacts = bundle.artifacts(result.backend, result.precision)
    capacity = artifacts["decoder"].capacity or bundle.manifest.default_capacity
    for backend in dict.fromkeys(item.backend for item in artifacts.values()):
        module = load_backend(backend)
        if isinstance(module, ProvidesEntryPoints):
            own = {component for component, item in artifacts.items() if item.backend == backend}
            yield module.entry_points(chain, own, capacity)


def _compare(
    result: ParityResult,
    name: str,
    stage_name: str,
    array: np.ndarray,
    expected: np.ndarray,
    measured: float | None,
    golden: int = 0,
) -> None:
    """Judge one array with the bound of a stage; the detail names the first that fails."""
    stage = result.stage(STAGE)
    failed = stage.state == "failed"
    stage.compare(golden, name, array, expected, result.bound(stage_name, measured), measured)
    if stage.state == "failed" and not failed:
        assert stage.errors
        reason = stage.detail or f"error {stage.errors.relative_rms:.1e}, bound {stage.errors.bound:.1e}"
        stage.detail = f"{name}: {reason}"


def _judge_encoders(points: EntryPoints, chain: Chain, golden: Golden, judge: Judge) -> None:
    for name, encode in points.images.items():
        outputs = [encode(square) for square in golden.squares]
        for feature, expected in golden.features.items():
            array = np.concatenate([features[feature] for features in outputs])
            judge(f"{name} ({feature})", "vision_encoder", array, expected)
    for name, run in points.image_embeds.items():
        pixels = np.stack([to_pixel_values(square, chain.preprocessing) for square in golden.squares])
        array = np.concatenate([run(image[None]) for image in pixels])
        judge(name, "adaptor", array, chain.adapt(chain.encode_pixels(pixels)), same=True)


def _judge_decoders(points: EntryPoints, chain: Chain, golden: Golden, judge: Judge) -> None:
    for name, decoder in points.decoders.items():
        variant = copy.copy(chain)
        variant.decoder = decoder
        embeds = variant.merge(golden.prompt_tokens, golden.image_embeds)
        cache = decoder.new_cache(1, len(embeds) + STEPS)
        judge(name, "prefill_logits", variant.prefill(embeds, cache)[None], golden.logits[:1])
        tokens = golden.greedy_tokens[:STEPS]
        rows = np.stack([variant.decode(np.array([[token]]), cache)[0, 0] for token in tokens])
        judge(f"{name}, then single tokens", "teacher_forced_logits", rows, golden.logits[1 : STEPS + 1])


def _judge_token_embeddings(
    name: str,
    embed: Callable[[np.ndarray], np.ndarray],
    max_tokens: int,
    chain: Chain,
    result: ParityResult,
) -> None:
    """Compare all rows with the bundle's table.

    A quantized precision stores 8 bits of each number.
    """
    stage, bound = result.stage(STAGE), FLOAT_BOUND if result.precision in FLOATS else INT8_BOUND
    tokens = np.arange(len(chain.embedding.rows))
    for start in range(0, len(tokens), max_tokens):
        part = tokens[start : start + max_tokens]
        expected = chain.embed_tokens(part).astype(np.float32)
        actual = embed(part).astype(np.float32)
        if actual.shape != expected.shape:
            stage.fail(f"{name} gives {list(actual.shape)}, expected {list(expected.shape)}")
            return
        largest = np.abs(expected).max(1)
        wrong = ~(np.abs(actual - expected).max(1) <= bound * largest)  # NaN is wrong as well
        if wrong.any():
            stage.fail(f"{name} gives another embedding for token {part[wrong][0]} than the bundle's table")
            return


def _judge_prefix(bundle: Bundle, chain: Chain, result: ParityResult) -> None:
    """Compare the stored prefix of the system prompt with what the decoder computes."""
    decoder = bundle.artifact("decoder", result.backend, result.precision)
    path = prefix_file(decoder.precision)
    if path not in bundle.manifest.files:
        return
    bundle.check([path])
    checkpoint = bundle.manifest.checkpoint["sha256"]
    stored = StoredPrefix.load(bundle.path(path), checkpoint, chain.decoder.contract)
    if stored.tokens.tolist() != prefix_tokens(chain.tokenizer):
        result.stage(STAGE).fail("the stored prefix is not that of the system prompt")
        return
    computed = compute_states(chain, stored.tokens)
    for number, (actual, expected) in enumerate(zip(computed, stored.states, strict=True)):
        name = f"{('keys', 'values')[number % 2]} of layer {number // 2} of the stored prefix"
        error = float(stored.errors[number])
        _compare(result, name, "teacher_forced_logits", actual, expected, error)


def _listing_faults(bundle: Bundle, result: ParityResult) -> Iterator[str]:
    """Describe where the Swift listing differs from what this release writes for the bundle."""
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
    actual = bundle.path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    expected = render_listing(app).splitlines()
    if not actual or __version__ not in actual[0]:
        yield f"the listing {FILE} was not written by this release ({__version__}); export the bundle again"
        return
    for number, (line, wanted) in enumerate(_pairs(actual, expected), 1):
        if line != wanted:
            shown = [text.strip()[:60] for text in (line, wanted)]
            yield f"line {number} of the listing {FILE} is {shown[0]!r}, expected {shown[1]!r}"
            return


def _pairs(first: list[str], second: list[str]) -> Iterator[tuple[str, str]]:
    """Pair the lines of two texts; the shorter one ends with empty lines."""
    return zip_longest(first, second, fillvalue="")
