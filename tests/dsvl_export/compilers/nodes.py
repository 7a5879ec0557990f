"""Ray clusters whose nodes are processes of this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def ray_nodes(count: int) -> Iterator[Any]:
    """A cluster of nodes with one CPU each; its ``address``."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 << 20}
    path = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)  # workers find these tests' functions
        found = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(count - 1):
                found.add_node(num_cpus=1, object_store_memory=100 << 20)
            yield found
        finally:
            found.shutdown()


def processes(title: str) -> list[int]:
    """Processes of this machine whose title begins so, as Ray's workers have what they run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if line.startswith(title.encode()):
            found.append(int(folder.name))
    return found


def replicas(count: int, application: str = "") -> list[int]:
    """The processes of an application's replicas; waits until there are so many."""
    until = time.monotonic() + 30
    while len(found := processes(f"ray::ServeReplica:{application}")) != count:
        assert time.monotonic() < until, f"{len(found)} replicas instead of {count}"
        time.sleep(0.05)
    return found
