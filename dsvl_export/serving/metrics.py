"""Metrics for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsvl_export.serving.service import Service
from runtimes.generation.answer import Answer

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters and histograms of requests and answers, and the current state of the models."""

    def __init__(self, service: Service) -> None:
        """Register the metrics of a service."""
        self._registry = registry = CollectorRegistry()
        registry.register(_StateCollector(service))
        self.requests = Counter(
            "dsvl_requests", "Requests by path and status.", ["path", "status"], registry=registry
        )
        label = ["model"]
        self._prompt = Counter("dsvl_prompt_tokens", "Tokens of prompts.", label, registry=registry)
        self._reused = Counter(
            "dsvl_reused_tokens",
            "Tokens of prompts that were in the KV cache already.",
            label,
            registry=registry,
        )
        self._completion = Counter("dsvl_completion_tokens", "Tokens of answers.", label, registry=registry)
        self._failed = Counter(
            "dsvl_failed_streams", "Streams that ended with an error.", label, registry=registry
        )
        self._first = Histogram(
            "dsvl_first_token_seconds", "From a request to its first token.", label,
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self._total = Histogram(
            "dsvl_answer_seconds", "From a request to the end of its answer.", label,
            buckets=SECONDS, registry=registry,
        )  # fmt: skip

    def count_answer(self, model: str, answer: Answer) -> None:
        """Count the tokens and the times of an answer."""
        self._prompt.labels(model).inc(answer.prompt_tokens)
        self._reused.labels(model).inc(answer.reused_tokens)
        self._completion.labels(model).inc(len(answer.tokens))
        self._first.labels(model).observe(answer.first_token_seconds)
        self._total.labels(model).observe(answer.seconds)

    def count_failed_stream(self, model: str) -> None:
        """Count a stream that ended with an error after its status was sent."""
        self._failed.labels(model).inc()

    def text(self) -> bytes:
        """Return the metrics in the text format of Prometheus."""
        return generate_latest(self._registry)


class _StateCollector(Collector):
    """Reads the state of the open models when the metrics are requested."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        running = GaugeMetricFamily("dsvl_running_requests", "Requests being answered.", labels=["model"])
        waiting = GaugeMetricFamily("dsvl_waiting_requests", "Requests that are waiting.", labels=["model"])
        slots = GaugeMetricFamily("dsvl_slots", "Requests that can be answered at once.", labels=["model"])
        images = CounterMetricFamily("dsvl_images_encoded", "Images encoded.", labels=["model"])
        for status in self._service.model_status():
            for family, value in (
                (running, status.running), (waiting, status.waiting), (slots, status.slots),
                (images, status.images_encoded),
            ):  # fmt: skip
                if value is not None:
                    family.add_metric([status.model], value)
        return running, waiting, slots, images


class CountRequests:
    """ASGI middleware that counts responses by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        """Wrap an application."""
        self._app, self._requests = app, metrics.requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request to the application and count the response."""
        is_counted = False

        def count(status: int) -> None:
            nonlocal is_counted
            is_counted = True
            self._requests.labels(getattr(scope.get("route"), "path", "other"), status).inc()

        async def send_and_count(message: Message) -> None:
            if message["type"] == "http.response.start":
                count(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, send_and_count if scope["type"] == "http" else send)
        except Exception:
            if not is_counted:
                count(500)  # an outer middleware answers with it
            raise
