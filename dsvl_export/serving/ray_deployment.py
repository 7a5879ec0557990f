"""Starts and ends a deployment of replicas on a Ray cluster."""

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
from dsvl_export.serving.images import ImageLimits
from dsvl_export.serving.local_service import DECODED_AT_ONCE
from dsvl_export.serving.models import MAX_SLOTS, ModelOptions
from dsvl_export.serving.replicas import DEPLOYMENT, REPLICA_ERRORS, ClusterService, Replica
from dsvl_export.serving.service import BundleWatch
from runtimes.bundle.bundle import Bundle
from runtimes.errors import UserError, first_line

GPU_DEVICES = ("cuda", "tensorrt")
POLL_SECONDS, LOG_SECONDS = 0.2, 15
RELEASE_SECONDS = 5  # in which Ray releases the resources of processes that ended

log = logging.getLogger(__name__)


@contextmanager
def deploy_replicas(
    address: str, bundle: Bundle, options: ModelOptions, images: ImageLimits, replicas: int | None, name: str
) -> Iterator[ClusterService]:
    """Start replicas, yield the service that answers with them, and remove them at the end.

    Args:
        address: address of the Ray cluster.
        bundle: the bundle to serve.
        options: how each replica opens its models; ``queue`` is for all replicas together, and
            without ``threads`` the replicas share the CPUs of the cluster.
        images: limits of the images of a request.
        replicas: number of replicas; None is one for each machine with enough resources.
        name: name of the application; an application of this name is replaced.

    Raises:
        UserError: the cluster cannot be reached or has too few resources, or a replica cannot
            start.
    """
    if address.startswith("ray://"):
        raise UserError(f"serve must run on a machine of the cluster; pass auto or HOST:PORT, not {address}.")
    with ray_connection(address):
        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # this module reports its failures
        try:
            try:
                service = _start(bundle, options, images, replicas, name)
            except (*REPLICA_ERRORS, TimeoutError) as error:
                raise UserError(f"Ray Serve failed ({first_line(error)}).") from error
            yield service
        finally:
            _shut_down(name)


def _start(
    bundle: Bundle, options: ModelOptions, images: ImageLimits, replicas: int | None, name: str
) -> ClusterService:
    """Start the replicas and wait until they run."""
    watch = BundleWatch(bundle)
    if name in serve.status().applications:  # left by a server that was killed
        serve.delete(name)
    count, resources = _plan_replicas(bundle, options, replicas)
    if not resources["num_gpus"]:
        options = replace(options, threads=resources["num_cpus"])
    ongoing = (options.slots or MAX_SLOTS) + DECODED_AT_ONCE
    quiet = {"log_level": "WARNING"}
    serve.start(proxy_location="Disabled", logging_config=quiet)
    deployment = serve.deployment(
        name=DEPLOYMENT, num_replicas=count, ray_actor_options=resources,
        max_ongoing_requests=ongoing, max_constructor_retry_count=1, logging_config=quiet,
    )(Replica)  # fmt: skip
    folder, replica_options = str(bundle.folder.resolve()), replace(options, queue=ongoing)
    application = deployment.bind(folder, watch.fingerprint, replica_options, images)
    target = serve.RunTarget(target=application, name=name, route_prefix=None)
    (handle,) = serve.run_many([target], wait_for_applications_running=False)
    _wait_until_running(name, count)
    log.info("%d replicas, each with %s", count, resources)
    return ClusterService(bundle, watch, handle, name, count, options.queue)


def _wait_until_running(name: str, count: int) -> None:
    """Wait until all replicas run.

    Raises:
        UserError: a replica cannot start; the message is its error.
    """
    logged = time.monotonic()
    while True:
        deployment = serve.status().applications[name].deployments.get(DEPLOYMENT)
        if deployment and deployment.message.startswith(("A replica failed", "The deployment failed")):
            raise UserError(_failure_message(deployment.message))
        states: Any = deployment.replica_states if deployment else {}
        if states.get("RUNNING", 0) >= count:
            return
        if time.monotonic() - logged > LOG_SECONDS:
            logged = time.monotonic()
            log.info("%d of %d replicas run; waiting for the others", states.get("RUNNING", 0), count)
        time.sleep(POLL_SECONDS)


def _failure_message(traceback: str) -> str:
    """Return the message in the last line of a traceback."""
    *_, last = (line for line in traceback.splitlines() if line.strip())
    kind, colon, message = last.partition(": ")
    ours = colon and kind.startswith(("runtimes.", "dsvl_export."))
    return message if ours else f"A replica could not start: {last.rstrip('.')}."


def _shut_down(name: str) -> None:
    """Remove the application, and Ray Serve if there is no other one."""
    try:
        with redirect_stdout(StringIO()):  # Ray prints a message about its controller
            if name in serve.status().applications:
                serve.delete(name)
            if not serve.status().applications:
                serve.shutdown()
            ray.shutdown()
    except (*REPLICA_ERRORS, TimeoutError) as error:
        log.warning("The replicas may still run (%s).", first_line(error))


def _plan_replicas(bundle: Bundle, options: ModelOptions, replicas: int | None) -> tuple[int, dict[str, int]]:
    """Return the number of replicas and the resources of each.

    Raises:
        UserError: the cluster does not have the resources.
    """
    machines = [
        (int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0)))
        for node in ray.nodes()
        if node["Alive"]
    ]
    needs_gpu = _needs_gpu(bundle, options, any(machine_gpus for _, machine_gpus in machines))
    gpus, min_cpus = int(needs_gpu), options.threads or 1
    suitable = [machine for machine in machines if machine[0] >= min_cpus and machine[1] >= gpus]
    needs = f"{min_cpus} CPUs" + (" and a GPU" if needs_gpu else "")
    if not suitable:
        raise UserError(f"A replica needs {needs}, but no machine of the cluster has that.")
    count = replicas or len(suitable)
    # Without threads, each replica gets as many CPUs as possible.
    max_cpus = min_cpus if options.threads or needs_gpu else max(cpus for cpus, _ in suitable)
    for replica_cpus in range(max_cpus, 0, -1):
        places = sum(
            min(cpus // replica_cpus, machine_gpus if needs_gpu else count) for cpus, machine_gpus in suitable
        )
        if places >= count:
            break
    else:
        raise UserError(f"The cluster has room for {places} replicas with {needs}, not for {count}.")
    needed = {"CPU": count * replica_cpus, "GPU": count * gpus}
    deadline = time.monotonic() + RELEASE_SECONDS
    while any((free := ray.available_resources()).get(kind, 0) < total for kind, total in needed.items()):
        if time.monotonic() > deadline:
            raise UserError(
                f"{count} replicas need {needed['CPU']} CPUs and {needed['GPU']} GPUs, but only"
                f" {free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs of the cluster are free."
            )
        time.sleep(POLL_SECONDS)
    return count, {"num_cpus": replica_cpus, "num_gpus": gpus}


def _needs_gpu(bundle: Bundle, options: ModelOptions, has_gpus: bool) -> bool:
    """Return whether a replica needs a GPU: by its device, or for an engine if there are GPUs."""
    if options.device is not None:
        return options.device in GPU_DEVICES
    decoder = bundle.artifact("decoder", *bundle.select(options.backend, options.precision))
    return has_gpus and decoder.engine is not None
