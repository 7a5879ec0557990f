"""Distributes function calls to the machines of a Ray cluster (extra ``ray``)."""

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

# Calls an importable function with each of the argument tuples; yields (index, result) as they
# finish.
Spread = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], Iterator[tuple[int, Any]]]
RETRIES = 5  # of a call whose worker died
CONNECT_SECONDS = 10


@contextmanager
def ray_cluster(address: str | None) -> Iterator[Spread | None]:
    """Yield the function that distributes calls to a cluster; None for the address None.

    A call computes with as many threads as this process, so that all processors of one kind give
    the same numbers. Checkpoints, bundles and data must have the same paths on all machines.

    Raises:
        UserError: as ``ray_connection``, or a call failed.
    """
    if address is None:
        yield None
        return
    with ray_connection(address):
        yield _spread


@contextmanager
def ray_connection(address: str) -> Iterator[None]:
    """Connect to a cluster: ``auto``, ``host:port`` or ``ray://host:port``.

    Raises:
        UserError: Ray is not installed, or the cluster cannot be reached.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError(f"--ray needs Ray; run: {install_command('ray')}.") from error
    try:
        _check_reachable(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise UserError(f"Cannot connect to a Ray cluster at {address!r} ({first_line(error)}).") from error
    try:
        yield
    finally:
        ray.shutdown()


def _spread(function: Callable[..., Any], parts: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
    """Call a function on the cluster; a call whose worker dies is repeated on another one."""
    import ray

    torch = sys.modules.get("torch")  # not imported here: the function may not need it
    threads = torch.get_num_threads() if torch else None
    largest = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
    cpus = max(min(threads or usable_cores(), largest), 1)
    task = ray.remote(num_cpus=cpus, max_retries=RETRIES)(_run)
    pending = {task.remote(threads, function, part): index for index, part in enumerate(parts)}
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
                    f"A call on the cluster failed {RETRIES + 1} times ({first_line(error)}). Run the same"
                    " command again; it resumes."
                ) from error
    finally:
        for reference in pending:
            ray.cancel(reference, force=True)


def _check_reachable(address: str) -> None:
    """Raise OSError if nothing listens; Ray itself would try for minutes, then end the process."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()


def _run(threads: int | None, function: Callable[..., Any], part: tuple[Any, ...]) -> Any:
    """Call the function on a worker, with a number of torch threads."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    return function(*part)
