"""A limit of CPU threads holds while the MIL interpreter computes, and only then."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtimes.backends.mil import interpreter
from runtimes.backends.mil.interpreter import InterpretedAsset
from runtimes.backends.mil.threads import blas_threads
from runtimes.bundle.contracts import Contract, TensorSpec
from runtimes.errors import UserError

threadpoolctl = pytest.importorskip("threadpoolctl", reason="threadpoolctl is not installed here")
BEFORE = 3  # threads of numpy's BLAS outside of limited calls
CONTRACT = Contract("adaptor", (), (TensorSpec("threads", "int64", (1,), "threads of the call"),))
WITHOUT_THREADPOOLCTL = """
import sys
sys.modules["threadpoolctl"] = None
from runtimes.backends.mil.threads import blas_threads
from runtimes.errors import UserError
with blas_threads(None):
    pass
try:
    with blas_threads(1):
        pass
except UserError as error:
    print(error)
"""


def count_threads() -> int:
    """Threads of numpy's BLAS now."""
    (count,) = {library["num_threads"] for library in threadpoolctl.threadpool_info() if is_numpys(library)}
    return int(count)


def is_numpys(library: Mapping[str, Any]) -> bool:
    return library["user_api"] == "blas" and "numpy" in library["filepath"]


@pytest.fixture(autouse=True)
def blas() -> None:
    if not any(map(is_numpys, threadpoolctl.threadpool_info())):
        pytest.skip("this numpy has no BLAS whose threads can be counted")


@pytest.fixture
def several_threads(blas: None) -> Iterator[None]:
    """Numpy's BLAS has ``BEFORE`` threads."""
    with threadpoolctl.threadpool_limits(BEFORE, "blas"):
        yield


class CountingFunction:
    """A function of a package that gives the number of threads it has."""

    def __init__(self, package: Any, name: str, dense: Any) -> None:
        self.outputs = {"threads": None}
        self.fails = name == "fails"

    def run(self, inputs: Mapping[str, np.ndarray], states: Any) -> dict[str, np.ndarray]:
        if self.fails:
            raise UserError(f"{count_threads()} threads")
        return {"threads": np.array([count_threads()])}


@pytest.mark.usefixtures("several_threads")
@pytest.mark.parametrize(("threads", "expected"), [(1, 1), (2, 2), (None, BEFORE)])
def test_a_call_has_the_threads_that_were_asked_for(
    threads: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interpreter, "Function", CountingFunction)
    package: Any = SimpleNamespace(
        count_weights=lambda: 0, check_lengths=lambda name, shapes: None, folder=Path("p")
    )
    asset = InterpretedAsset(package, CONTRACT, threads)
    assert asset.call("main", {})["threads"] == [expected]
    assert count_threads() == BEFORE
    with pytest.raises(UserError, match=f"{expected} threads"):
        asset.call("fails", {})
    assert count_threads() == BEFORE


def test_calls_at_the_same_time_keep_their_limits() -> None:
    """The number of threads belongs to the process."""
    counts: list[tuple[int, int]] = []

    def work(threads: int) -> None:
        for _ in range(100):
            with blas_threads(threads):
                counts.append((threads, count_threads()))

    before = count_threads()
    workers = [Thread(target=work, args=(threads,)) for threads in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(counts) == 200
    assert all(limit == counted for limit, counted in counts)
    assert count_threads() == before


def test_threadpoolctl_is_needed_for_a_limit_only() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THREADPOOLCTL], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "A limit of CPU threads (--threads) for the MIL interpreter needs threadpoolctl;"
        " run: pip install 'threadpoolctl>=3.5'."
    ]
