"""The plan: bytes, fit, time to first token and tokens per second, before any work.

Times are roofline bounds (Williams et al. 2009): the larger of operations over the device's peak and
bytes over its bandwidth. They are what the hardware allows, not what a runtime reaches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import Any

from dsvl_export.planner.targets import WEIGHT_BITS, Target
from dsvl_export.planner.workload import Stored, Workload
from reference.checkpoint import Checkpoint
from reference.trace import TRACED_COMPONENTS
from runtimes.errors import UserError

CHUNK = 512  # tokens per prefill call, as ``runtimes.chain.Chain``
GIGA = 1e9


@dataclass(frozen=True)
class Request:
    """What shall run: ``context`` tokens in the cache, ``images`` and ``text_tokens`` in the prompt."""

    backend: str
    precision: str
    context: int
    images: int = 1
    text_tokens: int = 100


@dataclass(frozen=True)
class Plan:
    """The prediction; bytes, seconds and tokens per second.

    ``artifact_bytes`` is the component files', exact where ``exact`` says so; ``embedding_bytes`` the
    token table, which is memory-mapped and not part of ``peak_bytes``. ``largest_context`` fits into
    the usable memory, 0 where not even the weights do.
    """

    target: Target
    request: Request
    artifacts: dict[str, int]
    exact: bool
    embedding_bytes: int
    weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    runtime_bytes: int
    fits: bool
    largest_context: int
    prompt_tokens: int
    vision_seconds: float
    prefill_seconds: float
    tokens_per_second: float

    @property
    def artifact_bytes(self) -> int:
        return sum(self.artifacts.values())

    @property
    def peak_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.activation_bytes + self.runtime_bytes

    @property
    def first_token_seconds(self) -> float:
        return self.vision_seconds + self.prefill_seconds


class Planner:
    """Plans for one checkpoint; tracing a component takes seconds and is done once per precision."""

    def __init__(self, source: Checkpoint, on_step: Callable[[str], None] = lambda name: None) -> None:
        self.source, self.config, self._on_step = source, source.config, on_step
        self._workloads: dict[tuple[str, str], Workload] = {}
        self._stored: dict[tuple[str, str], Stored] = {}

    @cached_property
    def embedding_bytes(self) -> int:
        """Of the token table, in the checkpoint's own dtype."""
        table = self.source.load("token_embedding.weight")
        return table.numel() * table.element_size()

    def workload(self, component: str, precision: str) -> Workload:
        key = (component, precision)
        if key not in self._workloads:
            self._on_step(component)
            self._workloads[key] = Workload(self.config, component, precision)
        return self._workloads[key]

    def stored(self, component: str, precision: str) -> Stored:
        key = (component, precision)
        if key not in self._stored:
            self._stored[key] = self.workload(component, precision).stored()
        return self._stored[key]

    def kv_bytes(self, precision: str, context: int) -> int:
        """Keys and values of one sequence; half precision but for fp32."""
        decoder = self.config.decoder
        size = 4 if precision == "fp32" else 2
        return 2 * decoder.layers * decoder.kv_heads * decoder.head_dim * context * size

    def plan(self, target: Target, request: Request, exportable: bool) -> Plan:
        """Predict one request on one target.

        Args:
            exportable: this release's compiler has the precision, so the bytes are the artifact's own.

        Raises:
            UserError: the target cannot run it, or the model has not so many positions.
        """
        target.check(request.backend, request.precision)
        longest = self.config.decoder.max_positions
        prompt = request.images * self.config.vision.image_tokens + request.text_tokens
        if request.context > longest:
            raise UserError(
                f"The model has {longest} positions, a context of {request.context} is not possible;"
                f" the nearest is {longest}."
            )
        if prompt > request.context:
            raise UserError(
                f"{request.images} images and {request.text_tokens} tokens of text make a prompt of {prompt}"
                f" tokens; give a context of at least {prompt}, it is {request.context}."
            )
        return self._predict(target, request, prompt, exportable)

    def _predict(self, target: Target, request: Request, prompt: int, exportable: bool) -> Plan:
        precision, context = request.precision, request.context
        stored = {component: self.stored(component, precision) for component in TRACED_COMPONENTS}
        # ONNX Runtime's CPU kernels compute half precision in fp32 and widen its weights.
        widened = request.backend == "onnxruntime" and target.name == "cpu" and precision == "fp16"
        factor = 2 if widened else 1
        weights = {component: factor * item.weights for component, item in stored.items()}
        vision, adaptor, decoder = (self.workload(component, precision) for component in TRACED_COMPONENTS)

        def needed(tokens: int) -> int:
            chunk = min(CHUNK, prompt)
            decode = decoder.activation_bytes(batch=1, sequence=chunk, rows=1, capacity=tokens)
            active = max(decode, *(work.activation_bytes(batch=1) for work in (vision, adaptor)))
            return self.kv_bytes(precision, tokens) + factor * active

        fixed = sum(weights.values()) + round(target.runtime_gb * GIGA)
        usable = target.usable_gb * GIGA
        largest = _largest(lambda tokens: fixed + needed(tokens) <= usable, self.config.decoder.max_positions)
        kv = self.kv_bytes(precision, context)
        peak_operations, bandwidth = target.operations(precision), target.bandwidth_gbs * GIGA

        def seconds(operations: float, moved: float) -> float:
            return max(operations / peak_operations, moved / bandwidth)

        chunks = ceil(prompt / CHUNK)
        prefill = decoder.operations(batch=1, sequence=prompt, rows=1, capacity=prompt)
        step = decoder.operations(batch=1, sequence=1, rows=1, capacity=context)
        per_image = sum(
            seconds(work.operations(batch=1), weights[name])
            for name, work in (("vision_encoder", vision), ("adaptor", adaptor))
        )
        return Plan(
            target=target,
            request=request,
            artifacts={component: item.file for component, item in stored.items()},
            exact=exportable,
            embedding_bytes=self.embedding_bytes,
            weight_bytes=sum(weights.values()),
            kv_bytes=kv,
            activation_bytes=needed(context) - kv,
            runtime_bytes=round(target.runtime_gb * GIGA),
            fits=fixed + needed(context) <= usable,
            largest_context=largest,
            prompt_tokens=prompt,
            vision_seconds=request.images * per_image,
            prefill_seconds=seconds(prefill, chunks * weights["decoder"]),
            tokens_per_second=1 / seconds(step, weights["decoder"] + kv),
        )

    def nearest_fit(self, target: Target, request: Request) -> str | None:
        """The largest smaller precision with which the request fits into the target, if any."""
        for precision in target.backends[request.backend]:
            smaller = WEIGHT_BITS[precision] < WEIGHT_BITS[request.precision]
            if smaller and self.plan(target, replace(request, precision=precision), False).fits:
                return precision
        return None


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number of tokens that fits, by bisection; 0 where none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def plan_document(plan: Plan, exportable: bool, warnings: list[dict[str, Any]]) -> dict[str, Any]:
    """For JSON."""
    names = ("artifacts", "exact", "embedding_bytes", "weight_bytes", "kv_bytes", "activation_bytes",
             "runtime_bytes", "fits", "largest_context", "prompt_tokens", "vision_seconds", "prefill_seconds",
             "tokens_per_second", "artifact_bytes", "peak_bytes", "first_token_seconds")  # fmt: skip
    return {
        "target": plan.target.name,
        "device": plan.target.device,
        "usable_bytes": round(plan.target.usable_gb * GIGA),
        **vars(plan.request),
        **{name: getattr(plan, name) for name in names},
        "exportable": exportable,
        "warnings": warnings,
    }
