"""The service that answers with replicas of a bundle on a Ray cluster (extra ``ray``)."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from dataclasses import replace
from time import monotonic, perf_counter
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from dsvl_export.serving.errors import RequestError, request_error, unavailable
from dsvl_export.serving.images import ImageLimits
from dsvl_export.serving.local_service import LocalService
from dsvl_export.serving.models import ModelOptions
from dsvl_export.serving.service import (
    TOKENIZER,
    AnswerStream,
    BundleWatch,
    ModelRequest,
    ModelStatus,
    Service,
)
from runtimes.bundle.bundle import Bundle
from runtimes.errors import UserError, first_line
from runtimes.job import BusyError, DeadlineError, Step
from runtimes.text.tokenizer import Tokenizer

DEPLOYMENT = "replica"
MAX_TRIES = 3  # of a request whose replica died; the request itself may be the cause
STATUS_SECONDS = 2.0  # for which the state of the replicas is cached
REPLICA_ERRORS = (RayError, RayServeException)

log = logging.getLogger(__name__)


class Replica:
    """Answers requests in a process of the cluster."""

    def __init__(self, folder: str, fingerprint: str, options: ModelOptions, images: ImageLimits) -> None:
        """Open the bundle of this machine.

        Args:
            folder: folder of the bundle.
            fingerprint: of the bundle that is served; see ``BundleWatch``.
            options: how models are opened.
            images: limits of the images of a request.

        Raises:
            UserError: the bundle has another fingerprint, or cannot be opened.
        """
        bundle = Bundle.open(folder)
        if BundleWatch(bundle).fingerprint != fingerprint:
            node = ray.util.get_node_ip_address()
            raise UserError(
                f"{folder} on {node} is another bundle than the served one; copy the served one to {node}."
            )
        self.service = LocalService(bundle, options, images)

    async def describe_models(self) -> tuple[list[str], str, int]:
        """Return the names of the models, the default model, and the number of its slots."""
        (model,) = self.service.models.open_models
        return self.service.names, self.service.default, model.scheduler.slots

    async def answer(self, request: ModelRequest) -> AsyncIterator[Step | RequestError]:
        """Yield the steps of an answer; an error is the last item."""
        steps: AnswerStream | None = None
        try:
            steps = self.service.submit(request)
            step = await steps.first()
            while not step.answer:
                yield step
                step = await steps.next()
            yield step
        except Exception as error:
            if not isinstance(error, UserError):
                log.exception("a request failed")
            yield request_error(error)
        finally:
            if steps:
                steps.close()


class ClusterService(Service):
    """Answers with the replicas of a deployment."""

    def __init__(
        self, bundle: Bundle, watch: BundleWatch, handle: Any, application: str, replicas: int, queue: int
    ) -> None:
        """Connect to the replicas.

        Args:
            bundle: the bundle that is served.
            watch: of the bundle, made before the replicas opened it.
            handle: of the deployment.
            application: name of the application in Ray Serve.
            replicas: number of replicas.
            queue: number of requests that can wait for a replica.
        """
        names, default, slots = handle.describe_models.remote().result()
        tokenizer = Tokenizer(bundle.path(TOKENIZER), bundle.manifest.prompt)
        super().__init__(bundle, watch, tokenizer, names, default)
        self.answer = handle.options(stream=True).answer
        self.max_requests = replicas * slots + queue
        self.running: Counter[str] = Counter()
        self.opened = {default}
        self._application = application
        self._cached_state: tuple[float, str | None] = -STATUS_SECONDS, None

    @property
    def open_models(self) -> list[str]:
        """Names of the models that have answered."""
        return sorted(self.opened)

    def submit(self, request: ModelRequest) -> ClusterAnswerStream:
        """Return the answer to a request; see ``Service.submit``."""
        return ClusterAnswerStream(self, request)

    def model_status(self) -> Iterable[ModelStatus]:
        """Return the running requests of each model."""
        return [ModelStatus(model, running) for model, running in self.running.items()]

    def health_problem(self) -> str | None:
        """Return why no request can be answered: a changed bundle, or no running replica."""
        if monotonic() - self._cached_state[0] >= STATUS_SECONDS:
            self._cached_state = monotonic(), self._state()
        return self.watch.changed() or self._cached_state[1]

    def _state(self) -> str | None:
        """Return a message if no replica is running."""
        try:
            application = serve.status().applications.get(self._application)
        except REPLICA_ERRORS as error:
            return f"Ray Serve does not answer ({first_line(error)})."
        states = application.deployments[DEPLOYMENT].replica_states if application else {}
        return None if "RUNNING" in states else "No replica is running now."

    def close(self) -> None:
        """Do nothing: ``deploy_replicas`` removes the replicas."""


class ClusterAnswerStream(AnswerStream):
    """The answer of a replica; if it dies before it answers, another replica takes the request."""

    def __init__(self, service: ClusterService, request: ModelRequest) -> None:
        """Prepare an answer.

        Raises:
            RequestError: as ``Service.submit``.
        """
        self.model = service.resolve_model(request.model)
        self._service, self._request = service, request
        self._deadline = perf_counter() + request.seconds
        self._steps: Any = None  # of the replica, until the last one
        self._counted = False

    async def _begin(self) -> Step:
        running = self._service.running
        if running.total() >= self._service.max_requests:
            raise BusyError(
                f"{self._service.max_requests} requests are being answered; try again in a moment."
            )
        running[self.model] += 1
        self._counted = True
        for attempt in range(1, MAX_TRIES + 1):
            request = replace(self._request, model=self.model, seconds=max(self._remaining(), 0))
            try:
                self._steps = self._service.answer.remote(request)
                step = await self._step()
            except REPLICA_ERRORS as error:
                log.warning(
                    "a replica died at a request (%d of %d): %s", attempt, MAX_TRIES, first_line(error)
                )
                self._cancel()
            else:
                self._service.opened.add(self.model)
                return step
        raise unavailable(f"{MAX_TRIES} replicas died at this request; check the log of the cluster.")

    async def next(self) -> Step:
        """Return the next step; see ``AnswerStream.next``."""
        try:
            return await self._step()
        except REPLICA_ERRORS as error:
            log.error("a replica died while it answered: %s", first_line(error))
            raise unavailable(
                "The replica that generated this answer died; send the request again."
            ) from error

    async def _step(self) -> Step:
        """Wait for the next step of the replica, until the time of the request is over."""
        try:
            step: Step | RequestError = await asyncio.wait_for(anext(self._steps), self._remaining())
        except asyncio.TimeoutError as error:
            raise DeadlineError(
                f"The answer was not complete after {self._request.seconds:.0f} seconds."
            ) from error
        except RayTaskError as error:  # the replica itself is alive
            self._steps = None
            raise RuntimeError("a replica failed") from error
        if isinstance(step, RequestError):
            self._steps = None
            raise step
        if step.answer:
            self._steps = None
        return step

    def _remaining(self) -> float:
        return self._deadline - perf_counter()

    def close(self) -> None:
        """Cancel the request, if the replica is alive."""
        if self._counted:
            self._service.running[self.model] -= 1
            self._counted = False
        self._cancel()

    def _cancel(self) -> None:
        """Cancel the answer of the replica, if it is alive."""
        steps, self._steps = self._steps, None
        if steps is not None:
            with suppress(*REPLICA_ERRORS):
                steps.cancel()
