"""Replicas of a bundle on a Ray cluster (extra ``ray``), which the HTTP face of this process asks."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from io import StringIO
from time import perf_counter
from typing import Any

from dsvl_export.cluster import connected
from dsvl_export.ladder.against_reference import execution
from dsvl_export.serving.errors import RequestError, request_error, unavailable
from dsvl_export.serving.exchange import AT_ONCE, LocalService
from dsvl_export.serving.images import ImageLimits
from dsvl_export.serving.models import MOST_SLOTS, ModelOptions
from dsvl_export.serving.service import Exchange, Figures, Service, Work
from runtimes.bundle import Bundle
from runtimes.errors import UserError
from runtimes.scheduler import BusyError, LateError, Step

DEPLOYMENT = "replica"
TRIES = 3  # of a request whose replica was lost; it may be the request that ends them

log = logging.getLogger(__name__)


class Replica:
    """A process of the cluster that answers requests."""

    def __init__(self, folder: str, choice: ModelOptions, images: ImageLimits) -> None:
        self._service = LocalService(Bundle.open(folder), choice, images)

    async def models(self) -> tuple[list[str], str]:
        """Names of the models, and of the default one."""
        return self._service.names, self._service.default

    async def answer(self, work: Work) -> AsyncIterator[Step | RequestError]:
        """A request's steps; an error is the last of them."""
        exchange: Exchange | None = None
        try:
            exchange = self._service.exchange(work)
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
        handle: of the deployment.
        application: its name in Ray Serve.
        most: requests that are taken at a time.
    """

    def __init__(self, bundle: Bundle, handle: Any, application: str, most: int) -> None:
        super().__init__(bundle, *handle.models.remote().result())
        self.answer = handle.options(stream=True).answer
        self.running: Counter[str] = Counter()
        self.most, self._application = most, application

    @property
    def open(self) -> list[str]:
        return [self.default]

    def exchange(self, work: Work) -> ClusterExchange:
        return ClusterExchange(self, work)

    def figures(self) -> Iterable[Figures]:
        return [Figures(model, running) for model, running in self.running.items()]

    def ailing(self) -> str | None:
        from ray import serve

        if (reason := self._changed()) is not None:
            return reason
        application = serve.status().applications.get(self._application)
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
        self._steps: Any = None
        self._counted = False

    async def first(self) -> Step:
        running = self._service.running
        if running.total() >= self._service.most:
            raise BusyError(f"{self._service.most} requests are being answered; try again in a moment.")
        running[self.model] += 1
        self._counted = True
        try:
            step = await self._begun()
        except BaseException:
            self.close()
            raise
        if step.answer:
            self.close()
        return step

    async def _begun(self) -> Step:
        from ray.exceptions import RayError

        for attempt in range(1, TRIES + 1):
            left = max(self._until - perf_counter(), 0.0)
            self._steps = self._service.answer.remote(replace(self._work, model=self.model, seconds=left))
            try:
                return _step(await asyncio.wait_for(anext(self._steps), left))
            except asyncio.TimeoutError as error:
                raise LateError("No replica began to answer within the request's time.") from error
            except RayError as error:
                log.warning("a replica was lost before it answered (%d of %d): %s", attempt, TRIES, error)
        raise unavailable(f"{TRIES} replicas were lost at this request.")

    async def next(self) -> Step:
        from ray.exceptions import RayError

        try:
            return _step(await anext(self._steps))
        except RayError as error:
            log.error("a replica was lost while it answered: %s", error)
            raise unavailable("The replica that wrote this answer was lost; ask again.") from error

    def close(self) -> None:
        if self._steps is not None:
            self._steps.cancel()
            self._steps = None
        if self._counted:
            self._service.running[self.model] -= 1
            self._counted = False


def _step(found: Step | RequestError) -> Step:
    if isinstance(found, RequestError):
        raise found
    return found


@contextmanager
def deployed(
    address: str, bundle: Bundle, choice: ModelOptions, images: ImageLimits, replicas: int | None, name: str
) -> Iterator[ClusterService]:
    """A service of replicas, which are taken away at the end.

    Args:
        address: of the Ray cluster.
        choice: how each replica opens its models; ``queue`` is for all of them together, and without
            ``threads`` the replicas share the cluster's CPUs.
        replicas: None makes one for each machine.
        name: of the application; one that has it already is replaced.

    Raises:
        UserError: there is no such cluster, the replicas do not fit into it, or one cannot be started.
    """
    if address.startswith("ray://"):
        raise UserError(f"serve runs on a machine of the cluster; give auto or HOST:PORT, not {address}.")
    with connected(address):
        import ray
        from ray import serve

        if name in serve.status().applications:  # of a server that was killed
            serve.delete(name)
        count, resources = _room(bundle, choice, replicas)
        if not resources["num_gpus"]:
            choice = replace(choice, threads=resources["num_cpus"])
        slots = choice.slots or MOST_SLOTS
        each = replace(choice, queue=slots + AT_ONCE)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # what it warns of is told here
        quiet = {"log_level": "WARNING"}
        deployment = serve.deployment(
            name=DEPLOYMENT, num_replicas=count, ray_actor_options=resources,
            max_ongoing_requests=slots + AT_ONCE, max_constructor_retry_count=1, logging_config=quiet,
        )(Replica)  # fmt: skip
        serve.start(proxy_location="Disabled", logging_config=quiet)
        try:
            application = deployment.bind(str(bundle.folder.resolve()), each, images)
            try:
                handle = serve.run(application, name=name, route_prefix=None)
            except RuntimeError as error:
                raise UserError(_why(serve.status().applications[name].deployments[DEPLOYMENT])) from error
            log.info("%d replicas, each with %s", count, resources)
            yield ClusterService(bundle, handle, name, count * slots + choice.queue)
        finally:
            with redirect_stdout(StringIO()):  # Ray writes there that its controller was ended
                serve.delete(name)
                if not serve.status().applications:
                    serve.shutdown()
                ray.shutdown()


def _room(bundle: Bundle, choice: ModelOptions, replicas: int | None) -> tuple[int, dict[str, int]]:
    """Replicas and the resources of each; raises UserError where they find no place."""
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    count = replicas or len(machines)
    pair = bundle.select(choice.backend, choice.precision)
    gpus = int(execution(bundle, *pair, choice.device).device == "cuda")
    most = max(int(machine.get("CPU", 0)) for machine in machines)
    for cpus in [choice.threads] if choice.threads else [1] if gpus else range(most, 0, -1):
        places = sum(
            min(int(machine.get("CPU", 0)) // cpus, int(machine.get("GPU", 0)) if gpus else count)
            for machine in machines
        )
        if places >= count:
            break
    else:
        needs = f"{choice.threads or 1} CPUs" + (" and a GPU" if gpus else "")
        raise UserError(f"The cluster has room for {places} replicas of {needs}, not for {count}.")
    free = ray.available_resources()
    if free.get("CPU", 0) < count * cpus or free.get("GPU", 0) < count * gpus:
        raise UserError(
            f"{count} replicas need {count * cpus} CPUs" + (f" and {count} GPUs" if gpus else "")
            + f", but other work has the cluster's; free are {free.get('CPU', 0):g} CPUs"
            + (f" and {free.get('GPU', 0):g} GPUs." if gpus else ".")
        )  # fmt: skip
    return count, {"num_cpus": cpus, "num_gpus": gpus}


def _why(status: Any) -> str:
    """What the first replica that could not start said last."""
    *_, last = (line for line in status.message.splitlines() if line.strip())
    kind, colon, sentence = last.partition(": ")
    return sentence if colon and kind.endswith("UserError") else f"A replica could not start: {last}."
