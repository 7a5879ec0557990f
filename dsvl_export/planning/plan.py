"""The plan: bytes, fit, time to first token and tokens per second, before any work.

Times are roofline bounds (Williams et al. 2009): the larger of operations over the device's peak and
bytes over its bandwidth. They are what the hardware allows, not what a runtime reaches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

from calibration.precision_plan import FLOAT, PrecisionPlan, component_layers, load_precision
from calibration.quantized_program import trace_planned
from calibration.sensitivity import weight_bytes
from dsvl_export.compilers import load_compiler
from dsvl_export.compilers.precisions import check_request, kinds_of, plan_for
from dsvl_export.planning.workload import Workload, activations
from dsvl_export.targets.options import CompileOptions, OnnxRuntimeOptions
from dsvl_export.targets.targets import LISTED_BITS, WEIGHT_BITS, Target
from reference.model.config import ModelConfig
from reference.trace import TRACED_COMPONENTS
from runtimes.chain import PREFILL_CHUNK
from runtimes.errors import UserError

GIGA = 1e9
EMBEDDING_ITEM_BYTES = 2  # released checkpoints store half precision


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

    ``artifacts`` are the component files', computed by this release's own compiler where ``exact``, an
    estimate where that compiler is not installed. ``embedding_bytes`` is the token table, which is
    memory-mapped and not part of ``peak_bytes``. ``largest_context`` fits into the usable memory, 0 where
    not even the prompt does.
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
    def fits(self) -> bool:
        return self.peak_bytes <= self.usable_bytes

    @property
    def first_token_seconds(self) -> float:
        return self.vision_seconds + self.prefill_seconds

    def to_dict(self) -> dict[str, Any]:
        """For JSON; of the target its name and device."""
        raw = asdict(self)
        del raw["target"], raw["request"]
        derived = ("artifact_bytes", "peak_bytes", "fits", "first_token_seconds")
        return {
            "target": self.target.name,
            "device": self.target.device,
            **asdict(self.request),
            **raw,
            **{name: getattr(self, name) for name in derived},
        }


class Planner:
    """Plans for one model; a component is traced once in fp32 and once for all other precisions.

    Args:
        embedding_bytes: of the token table; None takes half precision.
        on_step: called with the component that is being traced.
    """

    def __init__(
        self,
        config: ModelConfig,
        embedding_bytes: int | None = None,
        on_step: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.config, self._on_step = config, on_step
        table = config.decoder.vocab_size * config.decoder.width * EMBEDDING_ITEM_BYTES
        self.embedding_bytes = table if embedding_bytes is None else embedding_bytes
        self._workloads: dict[tuple[str, str], Workload] = {}
        self._artifacts: dict[tuple[Any, ...], int] = {}

    def workload(self, component: str, precision: str) -> Workload:
        """The component traced in fp32, or in half precision for all that is smaller."""
        traced_in = "fp32" if precision == "fp32" else "fp16"
        key = (component, traced_in)
        if key not in self._workloads:
            self._on_step(component)
            self._workloads[key] = Workload(trace_planned(self.config, component, load_precision(traced_in)))
        return self._workloads[key]

    def kv_bytes(self, request: Request, context: int) -> int:
        """Keys and values of one sequence; half precision but where the exported base is fp32."""
        decoder, plan = self.config.decoder, self._exportable(request)
        if plan is None and request.precision not in WEIGHT_BITS:
            plan = load_precision(request.precision)
        size = 4 if (plan.base if plan else request.precision) == "fp32" else 2
        size = 1 if plan and plan.kv_cache != "float" else size
        return 2 * decoder.layers * decoder.kv_heads * decoder.head_dim * context * size

    def check(self, target: Target, request: Request) -> None:
        """Refuse what ``export`` would refuse for the target.

        Without the backend's compiler, which need not be installed here, the target's list decides.

        Raises:
            UserError: the target or its backend cannot do it, the precision is unknown, or it does not fit
                the model.
        """
        try:
            compiler = load_compiler(request.backend)
        except UserError:
            plan = load_precision(request.precision)
            plan.check(self.config)
            listed = request.precision in LISTED_BITS
            for kind in [request.precision] if listed else kinds_of(plan, self.config)[1:]:
                target.check(request.backend, kind)
            return
        plans = [plan_for(compiler, request.precision)]
        options = CompileOptions(target, request.context)
        check_request(request.backend, compiler, plans, self.config, options)

    def _planned_bytes(self, component: str, plan: PrecisionPlan) -> int:
        """Weights of a component under a plan, as every backend would store them."""
        layers = component_layers(self.config, component)
        floats = sum(weight_bytes(layer, FLOAT, plan.base) for layer in layers)
        rest = self.workload(component, plan.base).weight_bytes(plan.base) - floats
        return rest + sum(weight_bytes(layer, plan.of(layer), plan.base) for layer in layers)

    def plan(self, target: Target, request: Request) -> Plan:
        """Predict one request on one target.

        Raises:
            UserError: the target cannot run it, or the model has not so many positions.
        """
        self.check(target, request)
        longest = self.config.decoder.max_positions
        prompt = request.images * self.config.vision.image_tokens + request.text_tokens
        asked = (
            f"{request.images} images and {request.text_tokens} tokens of text"
            f" make a prompt of {prompt} tokens"
        )
        if prompt > longest:
            raise UserError(f"{asked}, but the model has only {longest} positions.")
        if request.context > longest:
            raise UserError(
                f"The model has {longest} positions, a context of {request.context} is not possible;"
                f" the nearest is {longest}."
            )
        if prompt > request.context:
            raise UserError(f"{asked}; give a context of at least {prompt}, it is {request.context}.")
        return self._predict(target, request, prompt)

    def _predict(self, target: Target, request: Request, prompt: int) -> Plan:
        context, precision, given = request.context, request.precision, None
        exported = self._exportable(request)
        if precision not in WEIGHT_BITS:
            given = exported or load_precision(precision)
            quantized = [name for name in kinds_of(given, self.config) if name in ("int8", "fp8")]
            precision = quantized[0] if quantized and given.quantizes_activations else given.base
        works = {component: self.workload(component, precision) for component in TRACED_COMPONENTS}
        artifacts = self._artifact_bytes(target, request, exported, works) if exported else {}
        stored = {component: work.weight_bytes(precision) for component, work in works.items()}
        if exported and exported.quantizes:
            stored = artifacts
        elif given:
            stored = {component: self._planned_bytes(component, given) for component in works}
        factor = 2 if precision in target.widens else 1
        weights = {component: factor * count for component, count in stored.items()}
        decoder = works["decoder"]
        encoders = {name: work for name, work in works.items() if name != "decoder" and request.images}

        running = [decoder, *encoders.values()]

        def needed(tokens: int) -> int:
            """Bytes of KV cache and activations for a context."""
            most = max(activations(work, request.backend, prompt, tokens) for work in running)
            return self.kv_bytes(request, tokens) + factor * most

        runtime, usable = round(target.runtime_gb * GIGA), round(target.usable_gb * GIGA)
        free = usable - runtime - sum(weights.values())
        in_integers = given is not None and any(rule.precision.dynamic for rule in given.rules)
        operations = target.operations("int8" if in_integers else precision)
        bandwidth = target.bandwidth_gbs * GIGA

        def seconds(work: int, moved: int) -> float:
            return max(work / operations, moved / bandwidth)

        # A token of the prompt attends to itself and those before it, half of them on average.
        prefill = decoder.operations(batch=1, sequence=prompt, rows=1, capacity=(prompt + 1) // 2)
        step = decoder.operations(batch=1, sequence=1, rows=1, capacity=context)
        kv = self.kv_bytes(request, context)
        read = weights["decoder"] - (self._prefill_bytes(target, request, exported) if exported else 0)
        per_image = sum(seconds(work.operations(batch=1), weights[name]) for name, work in encoders.items())
        return Plan(
            target=target,
            request=request,
            artifacts=artifacts or stored,
            exact=exported is not None,
            embedding_bytes=self.embedding_bytes,
            weight_bytes=sum(weights.values()),
            kv_bytes=kv,
            activation_bytes=needed(context) - kv,
            runtime_bytes=runtime,
            usable_bytes=usable,
            largest_context=_largest(
                lambda tokens: needed(tokens) <= free, prompt, self.config.decoder.max_positions
            ),
            prompt_tokens=prompt,
            vision_seconds=request.images * per_image,
            prefill_seconds=seconds(prefill, ceil(prompt / PREFILL_CHUNK) * weights["decoder"]),
            tokens_per_second=1 / seconds(step, read + kv),
        )

    def _exportable(self, request: Request) -> PrecisionPlan | None:
        """The plan of a precision where its compiler is installed here; None where it is not."""
        try:
            compiler = load_compiler(request.backend)
        except UserError:
            return None
        return plan_for(compiler, request.precision)

    def _artifact_bytes(
        self, target: Target, request: Request, plan: PrecisionPlan, works: dict[str, Workload]
    ) -> dict[str, int]:
        """What the compiler would write."""
        return {
            component: self._compiled_bytes(request.backend, plan, work, CompileOptions(target))
            for component, work in works.items()
        }

    def _prefill_bytes(self, target: Target, request: Request, plan: PrecisionPlan) -> int:
        """Bytes of the decoder that only prompts read."""
        if not any(rule.precision.dynamic for rule in plan.rules):
            return 0
        decoder = self.workload("decoder", plan.base)
        both, one = (
            self._compiled_bytes(
                request.backend,
                plan,
                decoder,
                CompileOptions(target, onnxruntime=OnnxRuntimeOptions(prefill)),
            )
            for prefill in (True, False)
        )
        return both - one

    def _compiled_bytes(
        self, backend: str, plan: PrecisionPlan, work: Workload, options: CompileOptions
    ) -> int:
        component = work.traced.contract.component
        target = options.target.name if options.target else None
        key = (target, backend, plan.name, component, options.onnxruntime.prefill)
        if key not in self._artifacts:
            traced = trace_planned(self.config, component, plan) if plan.quantizes else work.traced
            self._artifacts[key] = load_compiler(backend).artifact_bytes(traced, options)
        return self._artifacts[key]

    def nearest_fit(self, target: Target, request: Request) -> str | None:
        """The largest smaller precision with which the request fits into the target, if any."""
        for precision in target.backends[request.backend]:
            if LISTED_BITS[precision] >= LISTED_BITS.get(request.precision, 32):
                continue
            try:
                if self.plan(target, replace(request, precision=precision)).fits:
                    return precision
            except UserError:  # what is installed here cannot export it
                continue
        return None


def _largest(fits: Callable[[int], bool], least: int, most: int) -> int:
    """The largest number of tokens that fits, by bisection; 0 where not even ``least`` do."""
    if not fits(least):
        return 0
    while least < most:
        middle = (least + most + 1) // 2
        if fits(middle):
            least = middle
        else:
            most = middle - 1
    return least
