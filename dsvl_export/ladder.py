"""The ladder of proof: a bundle's artifacts against its goldens, rung by rung. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.bundle import Bundle
from runtimes.chain import Chain
from runtimes.errors import UserError
from runtimes.goldens import Golden, greedy, load_golden, teacher_forced
from runtimes.pipeline import Pipeline
from runtimes.preprocess import load_image, resize_and_pad, to_pixel_values
from runtimes.task import TaskItem, TaskScore, run_task

RUNGS = (
    "preprocess", "vision_encoder", "adaptor", "prefill_logits", "teacher_forced_logits", "greedy_tokens",
)  # fmt: skip


@dataclass(frozen=True)
class Tolerance:
    """Largest relative RMS error of a stage and of the logits for one precision."""

    stage: float
    logits: float


# fp32: the order of accumulation differs, measured noise is 5e-7. fp16: rounding of weights and
# activations (2**-11 each) through some ten layers, measured 7e-4 on random models; times ten.
TOLERANCES = {"fp32": Tolerance(1e-4, 1e-4), "fp16": Tolerance(7e-3, 7e-3)}


@dataclass
class Rung:
    """One stage over all goldens: the worst error, its bound, and the golden it happened in."""

    name: str
    tolerance: float
    relative_rms: float = 0.0
    max_abs: float = 0.0
    worst_golden: int = 0
    detail: str = ""
    failed: bool = False

    def compare(self, index: int, found: np.ndarray, expected: np.ndarray) -> None:
        """Relative RMS error ``|found - expected| / |expected|``; NaN anywhere fails."""
        difference = found.astype(np.float64) - expected.astype(np.float64)
        scale = np.sqrt(np.mean(np.square(expected.astype(np.float64))))
        error = float(np.sqrt(np.mean(np.square(difference))) / max(scale, 1e-30))
        if math.isnan(error) or error > self.relative_rms:
            self.relative_rms, self.worst_golden = error, index
        self.max_abs = float(np.maximum(self.max_abs, np.abs(difference).max()))  # NaN stays
        self.failed = self.failed or not error <= self.tolerance


@dataclass
class ParityResult:
    """The verdict of one backend and precision: every rung, and the task where one was given."""

    backend: str
    precision: str
    goldens: int
    rungs: list[Rung] = field(default_factory=list)
    task: dict[str, Any] | None = None

    @property
    def passed(self) -> bool:
        return not any(rung.failed for rung in self.rungs)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: an error that is none becomes null."""
        raw = asdict(self)
        for rung in raw["rungs"]:
            for key in ("relative_rms", "max_abs"):
                rung[key] = rung[key] if math.isfinite(rung[key]) else None
        return {**raw, "verdict": "passed" if self.passed else "failed"}


def parity(
    bundle: str | Path | Bundle,
    backend: str | None = None,
    precision: str | None = None,
    task: list[TaskItem] | None = None,
    threads: int | None = None,
    on_step: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> ParityResult:
    """Compare a bundle's artifacts with its goldens.

    Args:
        backend, precision: as in ``Pipeline.open``.
        task: also ask these questions and report the exact match (no bound of its own here).
        on_step: called with what is being done, how much of it is done, and of how much.

    Raises:
        UserError: the bundle has no goldens, or cannot be opened.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    backend, precision = bundle.select(backend, precision)
    files = sorted(path for path in bundle.manifest.files if _is_golden(path))
    if not files:
        raise UserError(f"The bundle {bundle.folder} has no goldens; export it again with goldens.")
    if precision not in TOLERANCES:
        raise UserError(f"There is no tolerance for the precision {precision!r}.")
    bundle.check(path for path in bundle.manifest.files if path.startswith("goldens/"))
    pipeline = Pipeline.open(bundle, backend, precision, threads=threads)
    bounds = TOLERANCES[precision]
    limits = (0.0, bounds.stage, bounds.stage, bounds.logits, bounds.logits, bounds.logits)
    rungs = {name: Rung(name, limit) for name, limit in zip(RUNGS, limits, strict=True)}
    for index, path in enumerate(files):
        on_step("goldens", index, len(files))
        _climb(pipeline.chain, bundle, load_golden(bundle.path(path)), index, rungs)
    on_step("goldens", len(files), len(files))
    result = ParityResult(backend, precision, len(files), list(rungs.values()))
    if task:
        done = 0

        def on_item() -> None:
            nonlocal done
            done += 1
            on_step("task", done, len(task))

        result.task = _task_summary(run_task(pipeline, task, on_item))
    return result


def _is_golden(path: str) -> bool:
    return path.startswith("goldens/") and path.endswith(".safetensors")


def _climb(chain: Chain, bundle: Bundle, golden: Golden, index: int, rungs: dict[str, Rung]) -> None:
    """All rungs for one golden; each stage gets the reference's input, so errors do not add up."""
    spec = chain.preprocessing
    images = [load_image(bundle.path(f"goldens/images/{name}")) for name in golden.images]
    squares = np.stack([resize_and_pad(image, spec) for image in images])
    rungs["preprocess"].compare(index, squares, golden.squares)
    pixels = np.stack([to_pixel_values(square, spec) for square in golden.squares])
    for name, features in chain.encode_pixels(pixels).items():
        rungs["vision_encoder"].compare(index, features, golden.features[name])
    inputs = chain.adaptor.contract.inputs
    given = {item.name: golden.features[item.name].astype(item.dtype) for item in inputs}
    rungs["adaptor"].compare(index, chain.adapt(given), golden.image_embeds)
    embeds = chain.embed_tokens(golden.prompt_tokens)
    places = golden.prompt_tokens == chain.tokenizer.spec.image_token_id
    embeds[places] = golden.image_embeds.reshape(-1, embeds.shape[1])
    cache = chain.decoder.new_cache(1, len(embeds))
    rungs["prefill_logits"].compare(index, chain.prefill(embeds, cache), golden.logits[0])
    logits = teacher_forced(chain, embeds, golden.greedy_tokens.tolist())
    rungs["teacher_forced_logits"].compare(index, logits, golden.logits)
    own = chain.embed_prompt(golden.prompt, images)
    tokens, _ = greedy(chain, [own.embeds], len(golden.greedy_tokens))
    _compare_tokens(rungs["greedy_tokens"], index, tokens[0].tolist(), golden)


def _compare_tokens(rung: Rung, index: int, found: list[int], golden: Golden) -> None:
    """Tokens from the image on, through the whole chain.

    A first difference where the reference's own margin lies within the logits' tolerance is a
    near tie: it is reported, and does not fail.
    """
    expected = golden.greedy_tokens.tolist()
    if found == expected:
        return
    step = next(i for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
    row = golden.logits[step].astype(np.float64)
    margin = float(row[expected[step]] - row[found[step]])
    tie = margin <= rung.tolerance * float(np.sqrt(np.mean(np.square(row))))
    kind = "near tie" if tie else "differs"
    rung.detail += f"golden {index}: {kind} at token {step} (margin {margin:.2g}); "
    rung.failed = rung.failed or not tie
    rung.worst_golden = index


def _task_summary(score: TaskScore) -> dict[str, Any]:
    return {
        "questions": score.asked.total(),
        "right": score.right.total(),
        "exact_match": score.accuracy,
        "by_kind": score.by_kind(),
    }
