"""``bench``: how fast a bundle answers on this machine, stage by stage, and how near that is to its roof.

The roof of decoding is what reading costs: each token reads all weights of the decoder and the keys and
values of its context once, so that the machine's memory bandwidth over those bytes is the most tokens per
second (Williams et al. 2009). Needs no PyTorch; with it, what ``plan`` predicts stands beside the figures.
"""

from __future__ import annotations

import resource
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from dsvl_export.targets.machine import describe_machine, measure_seconds, package_versions, read_bandwidth
from runtimes.backends.onnxruntime import prefill_file
from runtimes.backends.registry import load_backend
from runtimes.bundle.bundle import Bundle
from runtimes.cache import cache_bytes
from runtimes.errors import UserError
from runtimes.images import ImageSource
from runtimes.installation import install_command
from runtimes.memory import widening
from runtimes.pipeline import Pipeline, check_files, compiled_capacity
from runtimes.preprocess import preprocess
from runtimes.session import Execution

CONTEXTS = (128, 512, 1024, 2048)
STAGES = ("preprocess", "vision_encoder", "adaptor", "prefill")
QUESTION = "Describe the picture."
PICTURE = (480, 640, 3)  # a photograph of noise, where none is given
OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Timing:
    """Seconds of repeats."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


@dataclass(frozen=True)
class Decoding:
    """Decoding from one context on; bytes are what a token reads, None where the file does not tell."""

    context: int
    step: Timing
    bytes_per_token: int | None
    roof: float | None  # tokens per second

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return 1 / self.step.median

    @property
    def share(self) -> float | None:
        """Of the roof."""
        return self.rate / self.roof if self.roof else None


@dataclass(frozen=True)
class BenchResult:
    """One precision on one machine; times in seconds, sizes in bytes.

    ``stages`` are those before the first token, for one image, and ``first_token`` the time from the picture
    to its logits. ``loaded`` is what opening added to the process, ``peak`` the most that the process had.
    ``bandwidth`` is what the asked threads, or all cores, read from memory in bytes per second. ``predicted``
    is what ``plan`` says of the largest context, or why it says nothing.
    """

    bundle: str
    backend: str
    precision: str
    execution: Execution
    threads: int | None
    prompt_tokens: int
    opened: float
    loaded: int
    peak: int
    bandwidth: float | None
    stages: dict[str, Timing]
    first_token: Timing
    decoding: list[Decoding]
    predicted: dict[str, Any] | str
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        raw = asdict(self)
        for row, item in zip(raw["decoding"], self.decoding, strict=True):
            row |= {"tokens_per_second": item.rate, "share_of_roof": item.share}
        return raw


@dataclass(frozen=True)
class BenchOptions:
    """What to run: tokens are those decoded at each context, once for every repeat."""

    threads: int | None = None
    device: str | None = None
    image: ImageSource | None = None
    contexts: tuple[int, ...] = ()
    tokens: int = 16
    repeats: int = 3


def bench(
    folder: Path,
    backend: str | None,
    precision: str | None,
    options: BenchOptions,
    on_step: OnStep = lambda name, done, total: None,
) -> BenchResult:
    """Measure a bundle; everything runs once before it is timed.

    Raises:
        UserError: it cannot run here, or a context does not fit the model.
    """
    bundle = Bundle.open(folder)
    backend, precision = bundle.select(backend, precision)
    check_files(bundle, backend, precision)
    longest = _longest(bundle, backend, precision, options.device)
    contexts = _contexts(longest, options)
    room = max(contexts[-1] + options.tokens, min(longest, bundle.manifest.default_capacity))
    before, started = _resident(), perf_counter()
    pipeline = Pipeline.open(
        bundle,
        backend,
        precision,
        threads=options.threads,
        device=options.device,
        capacity=room,
        verify=False,  # it was, off the clock
    )
    opened = perf_counter() - started
    loaded = max(_resident() - before, 0)
    steps = options.repeats + len(contexts) + 2
    on_step("time to first token", 0, steps)
    repeats, prompt = _first_token(
        pipeline, options, lambda done: on_step("time to first token", done, steps)
    )
    steps_of: dict[int, list[float]] = {}
    for index, context in enumerate(contexts):
        on_step(f"context {context}", options.repeats + 1 + index, steps)
        steps_of[context] = _decode(pipeline, context, options)
    peak = _peak()
    on_step("the machine's roof", steps - 1, steps)
    artifact = bundle.artifact("decoder", backend, precision)
    execution = load_backend(backend).execution(artifact, options.device)
    here = execution.device == "cpu" and execution.kind == "ran"
    bandwidth = read_bandwidth(options.threads) if here else None
    weights = _decode_weights(bundle, backend, precision, execution)
    states = pipeline.chain.decoder.contract.states
    decoding = []
    for context, seconds in steps_of.items():
        read = weights + cache_bytes(states, 1, context) if weights else None
        roof = bandwidth / read if bandwidth and read else None
        decoding.append(Decoding(context, Timing.of(seconds), read, roof))
    return BenchResult(
        bundle=str(folder),
        backend=backend,
        precision=precision,
        execution=execution,
        threads=options.threads,
        prompt_tokens=prompt,
        opened=opened,
        loaded=loaded,
        peak=peak,
        bandwidth=bandwidth,
        stages={name: Timing.of(each) for name, each in zip(STAGES, zip(*repeats, strict=True), strict=True)},
        first_token=Timing.of([sum(repeat) for repeat in repeats]),
        decoding=decoding,
        predicted=_predicted(bundle, backend, precision, contexts[-1], prompt)
        if here
        else f"'plan' knows this machine's CPU, and here it {execution}",
        machine={**describe_machine(), "packages": package_versions()},
    )


def _longest(bundle: Bundle, backend: str, precision: str, device: str | None) -> int:
    """Tokens that the decoder can hold."""
    built = compiled_capacity(bundle.artifact("decoder", backend, precision), device)
    positions = int(bundle.manifest.model["decoder"]["max_positions"])
    return min(positions, built or positions)


def _contexts(longest: int, options: BenchOptions) -> tuple[int, ...]:
    """Those asked for, or the usual ones that the decoder holds."""
    most = longest - options.tokens
    if options.contexts:
        given = tuple(sorted(set(options.contexts)))
        if not 1 <= given[0] <= given[-1] <= most:
            raise UserError(
                f"A context must lie between 1 and {most}, which is what this decoder holds besides the"
                f" {options.tokens} tokens to decode; got {', '.join(map(str, given))}."
            )
        return given
    if most < 1:
        raise UserError(f"This decoder holds {longest} tokens; {options.tokens} to decode are too many.")
    return tuple(context for context in CONTEXTS if context <= most) or (most,)


def _first_token(
    pipeline: Pipeline, options: BenchOptions, on_repeat: Callable[[int], None]
) -> tuple[list[list[float]], int]:
    """Seconds of the stages in every repeat, and tokens of the prompt."""
    chain = pipeline.chain
    image = options.image
    if image is None:
        image = np.random.default_rng(0).integers(0, 256, PICTURE, np.uint8)
    prompt = chain.embed_prompt(pipeline.format(QUESTION, 1), [image])
    if len(prompt) > pipeline.capacity:
        raise UserError(
            f"A question with a picture has {len(prompt)} tokens, the decoder holds {pipeline.capacity}."
        )
    cache = chain.decoder.new_cache(1, pipeline.capacity)
    found: list[list[float]] = []
    for repeat in range(options.repeats + 1):
        marks = [perf_counter()]
        pixels = preprocess(image, chain.preprocessing)
        marks.append(perf_counter())
        features = chain.encode_pixels(pixels[None])
        marks.append(perf_counter())
        chain.adapt(features)
        marks.append(perf_counter())
        cache.reset()
        chain.prefill(prompt, cache)
        marks.append(perf_counter())
        if repeat:  # the first is the warm-up
            found.append([end - start for start, end in pairwise(marks)])
        on_repeat(repeat + 1)
    return found, len(prompt)


def _decode(pipeline: Pipeline, context: int, options: BenchOptions) -> list[float]:
    """Seconds of a step from a context on, the median of each repeat."""
    chain, cache = pipeline.chain, pipeline.chain.decoder.new_cache(1, pipeline.capacity)
    words = int(pipeline.chain.decoder.contract.outputs[0].shape[2])
    tokens = np.random.default_rng(0).integers(0, words, context + options.tokens)
    chain.prefill(chain.embed_tokens(tokens[:context]), cache)
    chain.decode(tokens[None, context : context + 1], cache)
    cache.rewind(1)
    found = []
    for _ in range(options.repeats):
        steps = [
            measure_seconds(partial(chain.decode, tokens[None, place : place + 1], cache))
            for place in range(context, len(tokens))
        ]
        found.append(statistics.median(steps))
        cache.rewind(options.tokens)
    return found


def _decode_weights(bundle: Bundle, backend: str, precision: str, execution: Execution) -> int | None:
    """Bytes of the decoder that a token reads, widened ones as they lie in memory.

    None where its file holds other components too.
    """
    artifact = bundle.artifact("decoder", backend, precision)
    engine = artifact.engine.file if artifact.engine else None
    if engine and execution.device != "cpu":
        return bundle.manifest.files[engine].bytes
    files = [file for file in artifact.files if file != engine]
    encoders = [bundle.artifact(name, backend, precision) for name in ("vision_encoder", "adaptor")]
    others = {file for encoder in encoders for file in encoder.files}
    if others & set(files):
        return None
    prompts = prefill_file(Path(files[0])).name
    stored = sum(
        bundle.manifest.files[file].bytes for file in files if not Path(file).name.startswith(prompts)
    )
    on_cpu = execution.device == "cpu"
    return stored * (widening(backend, bundle.manifest.contracts[precision]["decoder"]) if on_cpu else 1)


def _predicted(
    bundle: Bundle, backend: str, precision: str, context: int, prompt: int
) -> dict[str, Any] | str:
    """What ``plan`` says of this machine."""
    try:
        from dsvl_export.planning.plan import Planner, Request
        from dsvl_export.targets.targets import find_target, measure_target
        from reference.model.config import ModelConfig
    except ImportError as error:
        return f"a prediction needs {error.name}; run: {install_command(error.name or 'torch')}"
    tokens = prompt - bundle.manifest.prompt.image_tokens
    request = Request(backend, precision, max(context, prompt), 1, tokens)
    try:
        plan = Planner(ModelConfig.from_dict(bundle.manifest.model)).plan(
            measure_target(find_target("cpu")), request
        )
    except UserError as error:
        return str(error)
    return plan.to_dict()


def _resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else 0


def _peak() -> int:
    """The most bytes that this process had in memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
