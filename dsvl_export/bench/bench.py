"""The measurement of time to first token and decoding speed, and the memory-bandwidth bound.

A decode step reads all weights of the decoder, and the keys and values of its context, once. The
memory bandwidth of the machine divided by those bytes is therefore an upper bound of the tokens per
second (roofline; Williams, Waterman and Patterson, CACM 52(4), 2009). PyTorch is not needed; with
it, the result has the prediction of ``plan`` too.
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
from runtimes.bundle.mixes import MIXED, device_of
from runtimes.cache import cache_bytes
from runtimes.errors import UserError
from runtimes.execution import execution
from runtimes.images import ImageSource
from runtimes.installation import install_command
from runtimes.memory import widening
from runtimes.pipeline import Pipeline, check_files, compiled_capacity
from runtimes.preprocess import preprocess
from runtimes.session import Execution

CONTEXTS = (128, 512, 1024, 2048)
STAGES = ("preprocess", "vision_encoder", "adaptor", "prefill")
QUESTION = "Describe the picture."
IMAGE_SHAPE = (480, 640, 3)  # of random pixels, if no image is passed
OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Timing:
    """Median, lowest and highest seconds of repeated measurements."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Summarize measurements."""
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


@dataclass(frozen=True)
class DecodingSpeed:
    """Decoding speed at one context.

    ``bytes_per_token`` are read by a decode step, and ``bound`` is the memory-bandwidth bound in
    tokens per second. Both are None if the bytes are unknown.
    """

    context: int
    step: Timing
    bytes_per_token: int | None
    bound: float | None

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second."""
        return 1 / self.step.median

    @property
    def share_of_bound(self) -> float | None:
        """Tokens per second relative to the memory-bandwidth bound; None if that is unknown."""
        return self.tokens_per_second / self.bound if self.bound else None


@dataclass(frozen=True)
class BenchResult:
    """One precision on one machine; times in seconds, sizes in bytes.

    ``stages`` are the stages before the first token, for one image; ``first_token`` is the time
    from the image to the logits of the first token. ``loaded`` is the memory that opening added to
    the process, ``peak`` the largest memory of the process. ``bandwidth`` is the memory bandwidth
    of ``threads``, or of all cores, in bytes per second. ``predicted`` is the prediction of
    ``plan`` for the largest context, or the reason why there is none.
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
    decoding: list[DecodingSpeed]
    predicted: dict[str, Any] | str
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        raw = asdict(self)
        for row, item in zip(raw["decoding"], self.decoding, strict=True):
            row |= {"tokens_per_second": item.tokens_per_second, "share_of_bound": item.share_of_bound}
        return raw


@dataclass(frozen=True)
class BenchOptions:
    """What to measure; ``tokens`` are decoded at each context in every repeat.

    ``adapter`` is a switchable adapter of the bundle.
    """

    threads: int | None = None
    device: str | None = None
    image: ImageSource | None = None
    contexts: tuple[int, ...] = ()
    tokens: int = 16
    repeats: int = 3
    adapter: str | None = None


def bench(
    folder: Path,
    backend: str | None,
    precision: str | None,
    options: BenchOptions,
    on_step: OnStep = lambda name, done, total: None,
) -> BenchResult:
    """Measure a bundle; everything runs once before it is measured.

    Raises:
        UserError: the bundle cannot run here, or a context does not fit into the KV cache.
    """
    bundle = Bundle.open(folder)
    backend, precision = bundle.select(backend, precision, options.adapter)
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
        verify=False,  # the files were verified above, outside the measured time
        adapter=options.adapter,
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
    on_step("memory bandwidth", steps - 1, steps)
    executed = execution(bundle, backend, precision, options.device)
    on_cpu = executed.device == "cpu" and executed.kind == "ran"
    bandwidth = read_bandwidth(options.threads) if on_cpu else None
    weights = _decode_weights(bundle, backend, precision, options.device)
    states = pipeline.chain.decoder.contract.states
    decoding = []
    for context, seconds in steps_of.items():
        read = weights + cache_bytes(states, 1, context) if weights else None
        bound = bandwidth / read if bandwidth and read else None
        decoding.append(DecodingSpeed(context, Timing.of(seconds), read, bound))
    return BenchResult(
        bundle=str(folder),
        backend=backend,
        precision=precision,
        execution=executed,
        threads=options.threads,
        prompt_tokens=prompt,
        opened=opened,
        loaded=loaded,
        peak=peak,
        bandwidth=bandwidth,
        stages={
            name: Timing.of(seconds) for name, seconds in zip(STAGES, zip(*repeats, strict=True), strict=True)
        },
        first_token=Timing.of([sum(repeat) for repeat in repeats]),
        decoding=decoding,
        predicted=_predicted(bundle, backend, precision, contexts[-1], prompt)
        if on_cpu
        else f"'plan' predicts for the CPU of this machine, but the bundle {executed}",
        machine={**describe_machine(), "packages": package_versions()},
    )


def _longest(bundle: Bundle, backend: str, precision: str, device: str | None) -> int:
    """Return the number of tokens that the KV cache can hold."""
    built = compiled_capacity(bundle.artifact("decoder", backend, precision), device_of(device, "decoder"))
    positions = int(bundle.manifest.model["decoder"]["max_positions"])
    return min(positions, built or positions)


def _contexts(longest: int, options: BenchOptions) -> tuple[int, ...]:
    """Return the requested contexts, or those of ``CONTEXTS`` that the KV cache can hold."""
    most = longest - options.tokens
    if options.contexts:
        contexts = tuple(sorted(set(options.contexts)))
        if not 1 <= contexts[0] <= contexts[-1] <= most:
            raise UserError(
                f"A context must lie between 1 and {most}, since the KV cache also holds the"
                f" {options.tokens} tokens to decode; got {', '.join(map(str, contexts))}."
            )
        return contexts
    if most < 1:
        raise UserError(
            f"The KV cache holds {longest} tokens, too few to decode {options.tokens}; use fewer --tokens."
        )
    return tuple(context for context in CONTEXTS if context <= most) or (most,)


def _first_token(
    pipeline: Pipeline, options: BenchOptions, on_repeat: Callable[[int], None]
) -> tuple[list[list[float]], int]:
    """Return the seconds of the stages in every repeat, and the number of prompt tokens."""
    chain = pipeline.chain
    image = options.image
    if image is None:
        image = np.random.default_rng(0).integers(0, 256, IMAGE_SHAPE, np.uint8)
    prompt = chain.embed_prompt(pipeline.format(QUESTION, 1), [image])
    if len(prompt) > pipeline.capacity:
        raise UserError(
            f"A question with an image has {len(prompt)} tokens, but the KV cache holds {pipeline.capacity}."
        )
    cache = chain.decoder.new_cache(1, pipeline.capacity)
    repeats: list[list[float]] = []
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
            repeats.append([end - start for start, end in pairwise(marks)])
        on_repeat(repeat + 1)
    return repeats, len(prompt)


def _decode(pipeline: Pipeline, context: int, options: BenchOptions) -> list[float]:
    """Return the seconds of a decode step after a context: the median of each repeat."""
    chain, cache = pipeline.chain, pipeline.chain.decoder.new_cache(1, pipeline.capacity)
    vocabulary = int(pipeline.chain.decoder.contract.outputs[0].shape[2])
    tokens = np.random.default_rng(0).integers(0, vocabulary, context + options.tokens)
    chain.prefill(chain.embed_tokens(tokens[:context]), cache)
    chain.decode(tokens[None, context : context + 1], cache)
    cache.rewind(1)
    medians = []
    for _ in range(options.repeats):
        steps = [
            measure_seconds(partial(chain.decode, tokens[None, place : place + 1], cache))
            for place in range(context, len(tokens))
        ]
        medians.append(statistics.median(steps))
        cache.rewind(options.tokens)
    return medians


def _decode_weights(bundle: Bundle, backend: str, precision: str, device: str | None) -> int | None:
    """Return the bytes of the decoder's weights that a decode step reads, as they are in memory.

    None if the file of the decoder contains other components too.
    """
    artifacts = bundle.artifacts(backend, precision)
    artifact = artifacts.pop("decoder")
    executed = load_backend(artifact.backend).execution(artifact, device_of(device, "decoder"))
    engine = artifact.engine.file if artifact.engine else None
    if engine and executed.device != "cpu":
        return bundle.manifest.files[engine].bytes
    files = [file for file in artifact.files if file != engine]
    if {file for encoder in artifacts.values() for file in encoder.files} & set(files):
        return None
    prompts = prefill_file(Path(files[0])).name
    stored = sum(
        bundle.manifest.files[file].bytes for file in files if not Path(file).name.startswith(prompts)
    )
    contract = bundle.contract("decoder", backend, precision)
    return stored * (widening(artifact.backend, contract) if executed.device == "cpu" else 1)


def _predicted(
    bundle: Bundle, backend: str, precision: str, context: int, prompt: int
) -> dict[str, Any] | str:
    """Return the prediction of ``plan`` for this machine, or why there is none."""
    try:
        from dsvl_export.planning.plan import Planner, Request
        from dsvl_export.targets.targets import find_target, measure_target
        from reference.model.config import ModelConfig
    except ImportError as error:
        return f"a prediction needs {error.name}; run: {install_command(error.name or 'torch')}"
    tokens = prompt - bundle.manifest.prompt.image_tokens
    artifacts = bundle.artifacts(backend, precision) if backend == MIXED else {}
    components = {name: (item.backend, item.precision) for name, item in artifacts.items()}
    request = Request(backend, precision, max(context, prompt), 1, tokens, components)
    try:
        plan = Planner(ModelConfig.from_dict(bundle.manifest.model)).plan(
            measure_target(find_target("cpu")), request
        )
    except UserError as error:
        return str(error)
    return plan.to_dict()


def _resident() -> int:
    """Return the resident bytes of this process; 0 if the system does not report them."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else 0


def _peak() -> int:
    """Return the largest resident bytes of this process."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
