"""Figures for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsvl_export.serving.service import Service
from runtimes.generation.decoding import Answer

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counts what is answered, and reads what the models are doing."""

    def __init__(self, service: Service) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(_State(service))
        self.requests = Counter(
            "dsvl_requests", "Requests by path and status.", ["path", "status"], registry=registry
        )
        label = ["model"]
        self._prompt = Counter("dsvl_prompt_tokens", "Tokens of prompts.", label, registry=registry)
        self._reused = Counter(
            "dsvl_reused_tokens", "Tokens of prompts that a cache held already.", label, registry=registry
        )
        self._completion = Counter("dsvl_completion_tokens", "Tokens of answers.", label, registry=registry)
        self._failed = Counter("dsvl_failed_streams", "Streams that ended early.", label, registry=registry)
        self._first = Histogram(
            "dsvl_first_token_seconds", "From a request to its first token.", label,
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self._total = Histogram(
            "dsvl_answer_seconds", "From a request to the end of its answer.", label,
            buckets=SECONDS, registry=registry,
        )  # fmt: skip

    def answered(self, model: str, answer: Answer) -> None:
        self._prompt.labels(model).inc(answer.prompt_tokens)
        self._reused.labels(model).inc(answer.reused_tokens)
        self._completion.labels(model).inc(len(answer.tokens))
        self._first.labels(model).observe(answer.first_token_seconds)
        self._total.labels(model).observe(answer.seconds)

    def failed(self, model: str) -> None:
        """A stream that ended with an error, when its status was told already."""
        self._failed.labels(model).inc()

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._registry)


class _State(Collector):
    """What the open models are doing at this moment."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        running = GaugeMetricFamily("dsvl_running_requests", "Requests being answered.", labels=["model"])
        waiting = GaugeMetricFamily("dsvl_waiting_requests", "Requests that wait.", labels=["model"])
        slots = GaugeMetricFamily("dsvl_slots", "Requests that can be answered at once.", labels=["model"])
        images = CounterMetricFamily("dsvl_images_encoded", "Images encoded.", labels=["model"])
        for one in self._service.figures():
            for family, value in (
                (running, one.running), (waiting, one.waiting), (slots, one.slots),
                (images, one.images_encoded),
            ):  # fmt: skip
                if value is not None:
                    family.add_metric([one.model], value)
        return running, waiting, slots, images


class CountRequests:
    """ASGI middleware: every response by its route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._requests = app, metrics.requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        counted = False

        def count(status: int) -> None:
            nonlocal counted
            counted = True
            self._requests.labels(getattr(scope.get("route"), "path", "other"), status).inc()

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                count(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, counting if scope["type"] == "http" else send)
        except Exception:
            if not counted:
                count(500)  # as it is answered further out
            raise
