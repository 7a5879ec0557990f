"""The prediction of an export's size, memory, time to first token and tokens per second.

Times are roofline bounds (Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009): the
larger of operations divided by the device's peak, and bytes divided by its bandwidth. A runtime can
at best reach them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import ceil
from typing import Any

from calibration.precision_plan import FLOAT, PrecisionPlan, component_layers, load_precision
from calibration.quantized_program import trace_with_plan
from calibration.sensitivity import weight_bytes
from dsvl_export.compilers.precisions import check_mix, check_request, plan_for, required_precisions
from dsvl_export.compilers.registry import load_compiler
from dsvl_export.planning.workload import Workload, activation_bytes
from dsvl_export.targets.options import CompileOptions, OnnxRuntimeOptions
from dsvl_export.targets.targets import LISTED_BITS, WEIGHT_BITS, Target
from reference.model.config import ModelConfig
from reference.trace import TRACED_COMPONENTS
from runtimes.bundle.mixes import Mix, Pair
from runtimes.chain import PREFILL_CHUNK
from runtimes.errors import UserError

GIGA = 1e9
EMBEDDING_ITEM_BYTES = 2  # released checkpoints are stored in half precision


@dataclass(frozen=True)
class Request:
    """What will run: the capacity ``context`` of the KV cache in tokens, and the prompt.

    ``components`` has the backend and precision of each component of a mix; ``backend`` and
    ``precision`` name it then.
    """

    backend: str
    precision: str
    context: int
    images: int = 1
    text_tokens: int = 100
    components: Mapping[str, Pair] = field(default_factory=dict)

    def on(self, target: Target) -> Request:
        """Return the request with the full name of its precision on a target."""
        return replace(self, precision=target.full_precision(self.precision))

    def pair(self, component: str) -> Pair:
        """Return the backend and the precision of a component."""
        return self.components.get(component, (self.backend, self.precision))


@dataclass(frozen=True)
class Plan:
    """The prediction, in bytes, seconds and tokens per second.

    ``artifacts`` are the sizes of the component files: ``exact`` if the compiler is installed, else
    estimates. ``encoder_seconds`` are those of the vision encoder and the adaptor for one image.
    ``embedding_bytes`` is the token table, which is memory-mapped and not part of
    ``peak_bytes``. ``largest_context`` is the largest context that fits into the usable memory, or
    0 if the prompt does not fit.
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
    usable_bytes: int
    largest_context: int
    prompt_tokens: int
    encoder_seconds: dict[str, float]
    prefill_seconds: float
    tokens_per_second: float

    @property
    def artifact_bytes(self) -> int:
        """Bytes of all component files."""
        return sum(self.artifacts.values())

    @property
    def peak_bytes(self) -> int:
        """Bytes of memory in use at most: weights, KV cache, activations and runtime."""
        return self.weight_bytes + self.kv_bytes + self.activation_bytes + self.runtime_bytes

    @property
    def fits(self) -> bool:
        """Whether the peak fits into the usable memory of the target."""
        return self.peak_bytes <= self.usable_bytes

    @property
    def vision_seconds(self) -> float:
        """Seconds to encode all images of the prompt, at least."""
        return self.request.images * sum(self.encoder_seconds.values())

    @property
    def first_token_seconds(self) -> float:
        """Seconds to the first token, at least."""
        return self.vision_seconds + self.prefill_seconds

    def to_dict(self) -> dict[str, Any]:
        """Return the prediction as JSON values; of the target, its name and device."""
        raw = asdict(self)
        del raw["target"], raw["request"]
        request = asdict(self.request)
        if not self.request.components:
            del request["components"]
        derived = ("artifact_bytes", "peak_bytes", "fits", "vision_seconds", "first_token_seconds")
        return {
            "target": self.target.name,
            "device": self.target.device,
            **request,
            **raw,
            **{name: getattr(self, name) for name in derived},
        }


@dataclass(frozen=True)
class _Part:
    """A component as it is exported; times are computed from it.

    Args:
        workload: its operations.
        backend: its backend.
        artifact: bytes of its files, or their estimate.
        exact: whether the compiler computed them.
        widening: bytes in memory for each byte of an activation.
        weights: bytes of weights in memory.
        only_prefill: bytes of weights that only prefill reads.
        operations: per second, at the peak.
    """

    workload: Workload
    backend: str
    artifact: int
    exact: bool
    widening: int
    weights: int
    only_prefill: int
    operations: float


class Planner:
    """Predicts for one model; traces a component once in fp32 and once for all other precisions."""

    def __init__(
        self,
        config: ModelConfig,
        embedding_bytes: int | None = None,
        on_step: Callable[[str], None] = lambda name: None,
    ) -> None:
        """Prepare predictions for a model.

        Args:
            config: of the model.
            embedding_bytes: size of the token table; None assumes half precision.
            on_step: called with the name of each component that is traced.
        """
        self.config, self._on_step = config, on_step
        table = config.decoder.vocab_size * config.decoder.width * EMBEDDING_ITEM_BYTES
        self.embedding_bytes = table if embedding_bytes is None else embedding_bytes
        self._workloads: dict[tuple[str, str], Workload] = {}
        self._artifacts: dict[tuple[Any, ...], int] = {}

    def workload(self, component: str, precision: str) -> Workload:
        """Return the component traced in fp32, or in half precision for all other precisions."""
        traced_in = "fp32" if precision == "fp32" else "fp16"
        key = (component, traced_in)
        if key not in self._workloads:
            self._on_step(component)
            self._workloads[key] = Workload(
                trace_with_plan(self.config, component, load_precision(traced_in))
            )
        return self._workloads[key]

    def kv_bytes(self, request: Request, context: int) -> int:
        """Return the bytes of keys and values of one sequence; fp32 only if that is the base."""
        decoder, (backend, precision) = self.config.decoder, request.pair("decoder")
        plan = _exportable(backend, precision)
        if plan is None and precision not in WEIGHT_BITS:
            plan = load_precision(precision)
        size = 4 if (plan.base if plan else precision) == "fp32" else 2
        size = 1 if plan and plan.kv_cache != "float" else size
        return 2 * decoder.layers * decoder.kv_heads * decoder.head_dim * context * size

    def check(self, target: Target, request: Request) -> None:
        """Check that ``export`` would accept a request for the target.

        If the compiler of the backend is not installed here, the target's list of precisions
        decides.

        Raises:
            UserError: the target or its backend does not support the request, or the precision is
                unknown or does not fit the model.
        """
        request = request.on(target)
        for backend, precision in dict.fromkeys(map(request.pair, TRACED_COMPONENTS)):
            try:
                compiler = load_compiler(backend)
            except UserError:
                plan = load_precision(precision)
                plan.check(self.config)
                is_listed = precision in LISTED_BITS
                for kind in [precision] if is_listed else required_precisions(plan, self.config)[1:]:
                    target.check(backend, kind)
                continue
            plans, options = [plan_for(compiler, precision)], CompileOptions(target, request.context)
            check_request(backend, compiler, plans, self.config, options)
        if request.components:
            pairs = {name: request.pair(name) for name in TRACED_COMPONENTS}
            planned = {name: _exportable(*pair) or load_precision(pair[1]) for name, pair in pairs.items()}
            check_mix(Mix(**pairs), planned, self.config)

    def _planned_bytes(self, component: str, plan: PrecisionPlan) -> int:
        """Return the bytes of a component's weights under a precision plan, for any backend."""
        layers = component_layers(self.config, component)
        floats = sum(weight_bytes(layer, FLOAT, plan.base) for layer in layers)
        rest = self.workload(component, plan.base).weight_bytes(plan.base) - floats
        return rest + sum(weight_bytes(layer, plan.precision_of(layer), plan.base) for layer in layers)

    def plan(self, target: Target, request: Request) -> Plan:
        """Predict one request on one target.

        Raises:
            UserError: the target cannot run it, or the prompt or context is too long for the model.
        """
        request = request.on(target)
        self.check(target, request)
        longest = self.config.decoder.max_positions
        prompt = request.images * self.config.vision.image_tokens + request.text_tokens
        size = (
            f"{request.images} images and {request.text_tokens} text tokens make a prompt of {prompt} tokens"
        )
        if prompt > longest:
            raise UserError(f"{size}, but the model has only {longest} positions. Use a shorter prompt.")
        if request.context > longest:
            raise UserError(
                f"A context of {request.context} tokens is too long: the model has {longest} positions."
                f" Use a context of at most {longest}."
            )
        if prompt > request.context:
            raise UserError(
                f"{size}, but the context is {request.context}. Use a context of at least {prompt}."
            )
        return self._predict(target, request, prompt)

    def _predict(self, target: Target, request: Request, prompt: int) -> Plan:
        parts = {component: self._part(target, request, component) for component in TRACED_COMPONENTS}
        weights = sum(part.weights for part in parts.values())
        decoder = parts["decoder"]
        encoders = {name: part for name, part in parts.items() if name != "decoder" and request.images}

        def needed(tokens: int) -> int:
            """Return the bytes of KV cache and activations for a context."""
            active = [
                part.widening * activation_bytes(part.workload, part.backend, prompt, tokens)
                for part in (decoder, *encoders.values())
            ]
            return self.kv_bytes(request, tokens) + max(active)

        runtime, usable = round(target.runtime_gb * GIGA), round(target.usable_gb * GIGA)
        free = usable - runtime - weights
        bandwidth = target.bandwidth_gbs * GIGA

        def seconds(part: _Part, operations: int, bytes_read: int) -> float:
            """Return the roofline bound."""
            return max(operations / part.operations, bytes_read / bandwidth)

        # A token of the prompt attends to itself and the tokens before it: on average half of them.
        half = (prompt + 1) // 2
        prefill = decoder.workload.operations(batch=1, sequence=prompt, rows=1, capacity=half)
        step = decoder.workload.operations(batch=1, sequence=1, rows=1, capacity=request.context)
        kv = self.kv_bytes(request, request.context)
        read = decoder.weights - decoder.only_prefill
        return Plan(
            target=target,
            request=request,
            artifacts={component: part.artifact for component, part in parts.items()},
            exact=all(part.exact for part in parts.values()),
            embedding_bytes=self.embedding_bytes,
            weight_bytes=weights,
            kv_bytes=kv,
            activation_bytes=needed(request.context) - kv,
            runtime_bytes=runtime,
            usable_bytes=usable,
            largest_context=_largest(
                lambda tokens: needed(tokens) <= free, prompt, self.config.decoder.max_positions
            ),
            prompt_tokens=prompt,
            encoder_seconds={
                name: seconds(part, part.workload.operations(batch=1), part.weights)
                for name, part in encoders.items()
            },
            prefill_seconds=seconds(decoder, prefill, ceil(prompt / PREFILL_CHUNK) * decoder.weights),
            tokens_per_second=1 / seconds(decoder, step, read + kv),
        )

    def _part(self, target: Target, request: Request, component: str) -> _Part:
        """Return a component as a request exports it."""
        backend, precision = request.pair(component)
        exported = _exportable(backend, precision)
        plan = None
        if precision not in WEIGHT_BITS:
            plan = exported or load_precision(precision)
            quantized = [name for name in required_precisions(plan, self.config) if name in ("int8", "fp8")]
            precision = quantized[0] if quantized and plan.quantizes_activations else plan.base
        workload = self.workload(component, precision)
        stored = workload.weight_bytes(precision)
        if plan and not (exported and exported.quantizes):
            stored = self._planned_bytes(component, plan)
        artifact, only_prefill = stored, 0
        if exported:
            artifact = self._compiled_bytes(backend, exported, workload, CompileOptions(target))
            stored = artifact if exported.quantizes else stored
            if component == "decoder":
                only_prefill = self._prefill_bytes(target, backend, exported)
        widening = 2 if precision in target.widens else 1
        in_integers = plan is not None and any(rule.precision.dynamic for rule in plan.rules)
        return _Part(
            workload=workload,
            backend=backend,
            artifact=artifact,
            exact=exported is not None,
            widening=widening,
            weights=widening * stored,
            only_prefill=only_prefill,
            operations=target.operations("int8" if in_integers else precision),
        )

    def _prefill_bytes(self, target: Target, backend: str, plan: PrecisionPlan) -> int:
        """Return the bytes of the decoder that only prefill reads."""
        if not any(rule.precision.dynamic for rule in plan.rules):
            return 0
        decoder = self.workload("decoder", plan.base)
        with_prefill, without_prefill = (
            self._compiled_bytes(
                backend, plan, decoder, CompileOptions(target, onnxruntime=OnnxRuntimeOptions(prefill))
            )
            for prefill in (True, False)
        )
        return with_prefill - without_prefill

    def _compiled_bytes(
        self, backend: str, plan: PrecisionPlan, workload: Workload, options: CompileOptions
    ) -> int:
        """Return the bytes that the compiler would write for a component."""
        component = workload.traced.contract.component
        target = options.target.name if options.target else None
        key = (target, backend, plan.name, component, options.onnxruntime.prefill)
        if key not in self._artifacts:
            traced = trace_with_plan(self.config, component, plan) if plan.quantizes else workload.traced
            self._artifacts[key] = load_compiler(backend).artifact_bytes(traced, options)
        return self._artifacts[key]

    def nearest_fit(self, target: Target, request: Request) -> str | None:
        """Return the largest smaller precision that fits, or None. There is none for a mix."""
        for precision in target.backends.get(request.backend, []):
            if LISTED_BITS[precision] >= LISTED_BITS.get(request.precision, 32):
                continue
            try:
                if self.plan(target, replace(request, precision=precision)).fits:
                    return precision
            except UserError:  # the installed compiler cannot export it
                continue
        return None


def _exportable(backend: str, precision: str) -> PrecisionPlan | None:
    """Return the plan of a precision, or None if the compiler is not installed here."""
    try:
        compiler = load_compiler(backend)
    except UserError:
        return None
    return plan_for(compiler, precision)


def _largest(fits: Callable[[int], bool], least: int, most: int) -> int:
    """Return the largest number of tokens that fits, by bisection; 0 if ``least`` does not fit."""
    if not fits(least):
        return 0
    while least < most:
        middle = (least + most + 1) // 2
        if fits(middle):
            least = middle
        else:
            most = middle - 1
    return least
