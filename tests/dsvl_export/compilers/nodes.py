"""Ray clusters whose nodes are processes of this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}


@contextmanager
def ray_nodes(count: int) -> Iterator[Any]:
    """A cluster of nodes with one CPU each; its ``address``."""
    from ray.cluster_utils import Cluster

    with importable_tests():
        found = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    try:
        for _ in range(count - 1):
            add_node(found)
        yield found
    finally:
        found.shutdown()


def add_node(cluster: Any) -> None:
    """One more node with one CPU."""
    with importable_tests():
        cluster.add_node(**NODE)


@contextmanager
def importable_tests() -> Iterator[None]:
    """Nodes that are started meanwhile find these tests' functions."""
    path = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        yield


def processes(title: str) -> list[int]:
    """Processes that this one started whose title begins so, as Ray's workers have what they run.

    Another test run on this machine has workers of the same title.
    """
    parents: dict[int, int] = {}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes()
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        if line.startswith(title.encode()):
            found.append(int(folder.name))

    def is_ours(process: int) -> bool:
        while process in parents:
            process = parents[process]
            if process == os.getpid():
                return True
        return False

    return [process for process in found if is_ours(process)]


def replicas(count: int, application: str = "") -> list[int]:
    """The processes of an application's replicas; waits until there are so many."""
    until = time.monotonic() + 30
    while len(found := processes(f"ray::ServeReplica:{application}")) != count:
        assert time.monotonic() < until, f"{len(found)} replicas instead of {count}"
        time.sleep(0.05)
    return found
