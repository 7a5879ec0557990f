"""A deployment of replicas on a Ray cluster: where they find room, how they start and end."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from io import StringIO
from typing import Any

import ray
from ray import serve

from dsvl_export.cluster.ray_cluster import ray_connection
from dsvl_export.serving.exchange import AT_ONCE
from dsvl_export.serving.images import ImageLimits
from dsvl_export.serving.models import MOST_SLOTS, ModelOptions
from dsvl_export.serving.replicas import DEPLOYMENT, LOST, ClusterService, Replica
from dsvl_export.serving.service import BundleWatch
from runtimes.bundle.bundle import Bundle
from runtimes.errors import UserError, first_line

GPU_DEVICES = ("cuda", "tensorrt")
LOOK_SECONDS, TELL_SECONDS = 0.2, 15
FREED_SECONDS = 5  # in which Ray gives back what ended work had

log = logging.getLogger(__name__)


@contextmanager
def deployed(
    address: str, bundle: Bundle, choice: ModelOptions, images: ImageLimits, replicas: int | None, name: str
) -> Iterator[ClusterService]:
    """A service of replicas, which are taken away at the end.

    Args:
        address: of the Ray cluster.
        choice: how each replica opens its models; ``queue`` is for all of them together, and without
            ``threads`` the replicas share the cluster's CPUs.
        replicas: None makes one for each machine that can have one.
        name: of the application; one that has it already is replaced.

    Raises:
        UserError: there is no such cluster, the replicas do not fit into it, or one cannot be started.
    """
    if address.startswith("ray://"):
        raise UserError(f"serve runs on a machine of the cluster; give auto or HOST:PORT, not {address}.")
    with ray_connection(address):
        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # what it warns of is told here
        try:
            try:
                service = _start(bundle, choice, images, replicas, name)
            except (*LOST, TimeoutError) as error:
                raise UserError(f"Ray Serve failed ({first_line(error)}).") from error
            yield service
        finally:
            _end(name)


def _start(
    bundle: Bundle, choice: ModelOptions, images: ImageLimits, replicas: int | None, name: str
) -> ClusterService:
    watch = BundleWatch(bundle)
    if name in serve.status().applications:  # of a server that was killed
        serve.delete(name)
    count, resources = _room(bundle, choice, replicas)
    if not resources["num_gpus"]:
        choice = replace(choice, threads=resources["num_cpus"])
    ongoing = (choice.slots or MOST_SLOTS) + AT_ONCE
    quiet = {"log_level": "WARNING"}
    serve.start(proxy_location="Disabled", logging_config=quiet)
    deployment = serve.deployment(
        name=DEPLOYMENT, num_replicas=count, ray_actor_options=resources,
        max_ongoing_requests=ongoing, max_constructor_retry_count=1, logging_config=quiet,
    )(Replica)  # fmt: skip
    folder, each = str(bundle.folder.resolve()), replace(choice, queue=ongoing)
    target = serve.RunTarget(
        target=deployment.bind(folder, watch.fingerprint, each, images), name=name, route_prefix=None
    )
    (handle,) = serve.run_many([target], wait_for_applications_running=False)
    _await(name, count)
    log.info("%d replicas, each with %s", count, resources)
    return ClusterService(bundle, watch, handle, name, count, choice.queue)


def _await(name: str, count: int) -> None:
    """Wait until all replicas run; raises UserError with what the first that cannot start says."""
    told = time.monotonic()
    while True:
        deployment = serve.status().applications[name].deployments.get(DEPLOYMENT)
        if deployment and deployment.message.startswith(("A replica failed", "The deployment failed")):
            raise UserError(_why(deployment.message))
        states: Any = deployment.replica_states if deployment else {}
        if states.get("RUNNING", 0) >= count:
            return
        if time.monotonic() - told > TELL_SECONDS:
            told = time.monotonic()
            log.info("%d of %d replicas run; waiting for the others", states.get("RUNNING", 0), count)
        time.sleep(LOOK_SECONDS)


def _why(message: str) -> str:
    """The last line of a traceback, as a sentence where it is one of ours."""
    *_, last = (line for line in message.splitlines() if line.strip())
    kind, colon, sentence = last.partition(": ")
    ours = colon and kind.startswith(("runtimes.", "dsvl_export."))
    return sentence if ours else f"A replica could not start: {last.rstrip('.')}."


def _end(name: str) -> None:
    try:
        with redirect_stdout(StringIO()):  # Ray writes there that its controller was ended
            if name in serve.status().applications:
                serve.delete(name)
            if not serve.status().applications:
                serve.shutdown()
            ray.shutdown()
    except (*LOST, TimeoutError) as error:
        log.warning("The replicas may still be there (%s).", first_line(error))


def _room(bundle: Bundle, choice: ModelOptions, replicas: int | None) -> tuple[int, dict[str, int]]:
    """Replicas and the resources of each; raises UserError where they find no place."""
    machines = [
        (int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0)))
        for node in ray.nodes()
        if node["Alive"]
    ]
    gpus = int(_on_gpu(bundle, choice, any(own for _, own in machines)))
    least = choice.threads or 1
    able = [(cpus, own) for cpus, own in machines if cpus >= least and own >= gpus]
    needs = f"{least} CPUs" + (" and a GPU" if gpus else "")
    if not able:
        raise UserError(f"No machine of the cluster has {needs}, which a replica needs.")
    count = replicas or len(able)
    # Without threads, the replicas have as many CPUs as there is room for.
    most = least if choice.threads or gpus else max(cpus for cpus, _ in able)
    for each in range(most, 0, -1):
        places = sum(min(cpus // each, own if gpus else count) for cpus, own in able)
        if places >= count:
            break
    else:
        raise UserError(f"The cluster has room for {places} replicas of {needs}, not for {count}.")
    needed = {"CPU": count * each, "GPU": count * gpus}
    until = time.monotonic() + FREED_SECONDS
    while any((free := ray.available_resources()).get(kind, 0) < all_ for kind, all_ in needed.items()):
        if time.monotonic() > until:
            raise UserError(
                f"{count} replicas need {count * each} CPUs and {count * gpus} GPUs, but other work has the"
                f" cluster's; free are {free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs."
            )
        time.sleep(LOOK_SECONDS)
    return count, {"num_cpus": each, "num_gpus": gpus}


def _on_gpu(bundle: Bundle, choice: ModelOptions, there: bool) -> bool:
    """Whether a replica takes a GPU: it is asked for, or an engine finds one."""
    if choice.device is not None:
        return choice.device in GPU_DEVICES
    decoder = bundle.artifact("decoder", *bundle.select(choice.backend, choice.precision))
    return there and decoder.engine is not None
