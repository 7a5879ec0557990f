"""Work spread over the machines of a Ray cluster (extra ``ray``)."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dsvl_export.targets.machine import usable_cores
from runtimes.errors import UserError, first_line
from runtimes.installation import install_command

# Results of calls of a function that can be imported anywhere, with their numbers, as they come.
Spread = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], Iterator[tuple[int, Any]]]
RETRIES = 5  # of a part whose worker was lost
REACH_SECONDS = 10


@contextmanager
def ray_cluster(address: str | None) -> Iterator[Spread | None]:
    """A cluster to spread work over; None is this machine alone.

    A part computes with as many threads as this process, so that it gives the same numbers anywhere on
    processors of one kind. Checkpoints, bundles and data must have the same paths on all machines.

    Raises:
        UserError: as ``connected``, or a part failed.
    """
    if address is None:
        yield None
        return
    with connected(address):
        yield _spread


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Join a cluster: ``auto``, ``host:port`` or ``ray://host:port``.

    Raises:
        UserError: Ray is not installed, or the cluster cannot be reached.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError(f"--ray needs Ray; run: {install_command('ray')}.") from error
    try:
        _reach(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise UserError(f"There is no Ray cluster at {address!r} ({first_line(error)}).") from error
    try:
        yield
    finally:
        ray.shutdown()


def _spread(work: Callable[..., Any], parts: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
    """Parts whose worker dies are done again elsewhere; each result comes once."""
    import ray

    torch = sys.modules.get("torch")  # what needs it has imported it
    threads = torch.get_num_threads() if torch else None
    largest = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
    cpus = max(min(threads or usable_cores(), largest), 1)
    task = ray.remote(num_cpus=cpus, max_retries=RETRIES)(_run)
    pending = {task.remote(threads, work, part): index for index, part in enumerate(parts)}
    try:
        while pending:
            (done, *_), _ = ray.wait(list(pending), num_returns=1)
            index = pending.pop(done)
            try:
                yield index, ray.get(done)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, UserError):
                    raise UserError(str(error.cause)) from error
                raise
            except ray.exceptions.RayError as error:
                raise UserError(
                    f"A part of the work was lost {RETRIES + 1} times on the cluster ({first_line(error)});"
                    " run the command again, it goes on where it stopped."
                ) from error
    finally:
        for left in pending:
            ray.cancel(left, force=True)


def _reach(address: str) -> None:
    """Raise OSError where nothing listens; Ray itself would try for minutes, then end the process."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=REACH_SECONDS).close()


def _run(threads: int | None, work: Callable[..., Any], part: tuple[Any, ...]) -> Any:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    return work(*part)
