"""Replicas of a bundle on a Ray cluster (extra ``ray``), which the HTTP face of this process asks."""

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
from dsvl_export.serving.exchange import LocalService
from dsvl_export.serving.images import ImageLimits
from dsvl_export.serving.models import ModelOptions
from dsvl_export.serving.service import TOKENIZER, BundleWatch, Exchange, Figures, Service, Work
from runtimes.bundle.bundle import Bundle
from runtimes.errors import UserError, first_line
from runtimes.scheduler import BusyError, DeadlineError, Step
from runtimes.text.tokenizer import Tokenizer

DEPLOYMENT = "replica"
TRIES = 3  # of a request whose replica was lost; it may be the request that ends them
FRESH_SECONDS = 2.0  # for which a look at the replicas' state holds
LOST = (RayError, RayServeException)

log = logging.getLogger(__name__)


class Replica:
    """A process of the cluster that answers requests.

    Raises:
        UserError: the bundle there is not the one of that ``fingerprint``, or cannot be opened.
    """

    def __init__(self, folder: str, fingerprint: str, choice: ModelOptions, images: ImageLimits) -> None:
        bundle = Bundle.open(folder)
        if BundleWatch(bundle).fingerprint != fingerprint:
            node = ray.util.get_node_ip_address()
            raise UserError(f"{folder} on {node} is another bundle than the one that is served.")
        self.service = LocalService(bundle, choice, images)

    async def described(self) -> tuple[list[str], str, int]:
        """Names of the models, of the default one, and the slots that it has."""
        (model,) = self.service.models.open
        return self.service.names, self.service.default, model.scheduler.slots

    async def answer(self, work: Work) -> AsyncIterator[Step | RequestError]:
        """A request's steps; an error is the last of them."""
        exchange: Exchange | None = None
        try:
            exchange = self.service.exchange(work)
            step = await exchange.first()
            while not step.answer:
                yield step
                step = await exchange.next()
            yield step
        except Exception as error:
            if not isinstance(error, UserError):
                log.exception("a request failed")
            yield request_error(error)
        finally:
            if exchange:
                exchange.close()


class ClusterService(Service):
    """Replicas as one service.

    Args:
        watch: of the bundle, from before the replicas opened it.
        handle: of the deployment.
        application: its name in Ray Serve.
        replicas: of which each has slots.
        queue: requests that may wait for all of them.
    """

    def __init__(
        self, bundle: Bundle, watch: BundleWatch, handle: Any, application: str, replicas: int, queue: int
    ) -> None:
        names, default, slots = handle.described.remote().result()
        tokenizer = Tokenizer(bundle.path(TOKENIZER), bundle.manifest.prompt)
        super().__init__(bundle, watch, tokenizer, names, default)
        self.answer = handle.options(stream=True).answer
        self.most = replicas * slots + queue
        self.running: Counter[str] = Counter()
        self.opened = {default}
        self._application = application
        self._looked: tuple[float, str | None] = -FRESH_SECONDS, None

    @property
    def open(self) -> list[str]:
        """Those that have answered."""
        return sorted(self.opened)

    def exchange(self, work: Work) -> ClusterExchange:
        return ClusterExchange(self, work)

    def figures(self) -> Iterable[Figures]:
        return [Figures(model, running) for model, running in self.running.items()]

    def ailing(self) -> str | None:
        if monotonic() - self._looked[0] >= FRESH_SECONDS:
            self._looked = monotonic(), self._state()
        return self.watch.changed() or self._looked[1]

    def _state(self) -> str | None:
        try:
            application = serve.status().applications.get(self._application)
        except LOST as error:
            return f"Ray Serve does not answer ({first_line(error)})."
        states = application.deployments[DEPLOYMENT].replica_states if application else {}
        return None if "RUNNING" in states else "No replica is running now."

    def close(self) -> None:
        """The replicas go with their deployment, once the server has stopped."""


class ClusterExchange(Exchange):
    """A request to a replica; until it begins to answer, another one takes its place if it is lost."""

    def __init__(self, service: ClusterService, work: Work) -> None:
        self.model = service.named(work.model)
        self._service, self._work = service, work
        self._until = perf_counter() + work.seconds
        self._steps: Any = None  # of the replica, while there are more
        self._counted = False

    async def _begin(self) -> Step:
        running = self._service.running
        if running.total() >= self._service.most:
            raise BusyError(f"{self._service.most} requests are being answered; try again in a moment.")
        running[self.model] += 1
        self._counted = True
        for attempt in range(1, TRIES + 1):
            work = replace(self._work, model=self.model, seconds=max(self._left(), 0))
            try:
                self._steps = self._service.answer.remote(work)
                step = await self._step()
            except LOST as error:
                log.warning(
                    "a replica was lost at a request (%d of %d): %s", attempt, TRIES, first_line(error)
                )
                self._leave()
            else:
                self._service.opened.add(self.model)
                return step
        raise unavailable(f"{TRIES} replicas were lost at this request.")

    async def next(self) -> Step:
        try:
            return await self._step()
        except LOST as error:
            log.error("a replica was lost while it answered: %s", first_line(error))
            raise unavailable("The replica that wrote this answer was lost; ask again.") from error

    async def _step(self) -> Step:
        try:
            found: Step | RequestError = await asyncio.wait_for(anext(self._steps), self._left())
        except asyncio.TimeoutError as error:
            raise DeadlineError(
                f"The answer was not complete after {self._work.seconds:.0f} seconds."
            ) from error
        except RayTaskError as error:  # nothing of the replica's loss
            self._steps = None
            raise RuntimeError("a replica failed") from error
        if isinstance(found, RequestError):
            self._steps = None
            raise found
        if found.answer:
            self._steps = None
        return found

    def _left(self) -> float:
        return self._until - perf_counter()

    def close(self) -> None:
        if self._counted:
            self._service.running[self.model] -= 1
            self._counted = False
        self._leave()

    def _leave(self) -> None:
        """Have the replica stop, if it is still there."""
        steps, self._steps = self._steps, None
        if steps is not None:
            with suppress(*LOST):
                steps.cancel()
