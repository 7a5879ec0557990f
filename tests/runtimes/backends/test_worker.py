"""An asset in a process of its own: what happens there reaches the user as a sentence."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from runtimes.backends.worker import WorkerAsset
from runtimes.errors import UserError


class Fragile:
    """An asset that adds to its state, and dies in as many ways as there are functions."""

    def __init__(self, fail: bool = False) -> None:
        if fail:
            raise UserError("There is no such asset.")

    def call(
        self, function: str, inputs: Mapping[str, np.ndarray], state: Any = None
    ) -> dict[str, np.ndarray]:
        if function == "abort":
            print("Fatal error: index out of range.", file=sys.stderr, flush=True)
            os.abort()
        if function == "exit":
            os._exit(7)
        if function == "refuse":
            raise UserError("That is too long.")
        if function == "print":
            print("noise on the terminal")
        if state is not None:
            state["sum"] = state["sum"] + inputs["x"]
            return {"y": state["sum"]}
        return {"y": inputs["x"] * 2}

    def new_state(self) -> dict[str, np.ndarray]:
        return {"sum": np.zeros(3, np.float32)}

    def read_state(self, state: dict[str, np.ndarray], name: str) -> np.ndarray:
        return state[name]

    def write_state(self, state: dict[str, np.ndarray], name: str, array: np.ndarray) -> None:
        state[name] = array


def worker(*args: Any) -> WorkerAsset:
    return WorkerAsset(("tests.runtimes.backends.test_worker", "Fragile"), args, "The asset")


X = np.array([1, 2, 3], np.float32)


def test_calls_and_states() -> None:
    asset = worker()
    assert np.array_equal(asset.call("main", {"x": X})["y"], 2 * X)
    one, other = asset.new_state(), asset.new_state()
    asset.call("main", {"x": X}, one)
    assert np.array_equal(asset.call("main", {"x": X}, one)["y"], 2 * X)
    assert np.array_equal(asset.read_state(one, "sum"), 2 * X)
    assert not asset.read_state(other, "sum").any()
    asset.write_state(other, "sum", 10 * X)
    assert np.array_equal(asset.call("main", {"x": X}, other)["y"], 11 * X)
    asset.close()


def test_states_live_as_long_as_they_are_known() -> None:
    asset = worker()
    kept, gone = asset.new_state(), [asset.new_state() for _ in range(3)]
    assert asset._request("states") == 4
    gone.clear()
    assert asset._request("states") == 1
    assert not asset.read_state(kept, "sum").any()


def test_a_refusal_is_the_users_and_the_process_lives_on() -> None:
    asset = worker()
    with pytest.raises(UserError, match=r"^That is too long\.$"):
        asset.call("refuse", {"x": X})
    assert asset.call("main", {"x": X})["y"][0] == 2
    with pytest.raises(UserError, match=r"^There is no such asset\.$"):
        worker(True)


def test_a_crash_names_its_signal_and_its_last_words() -> None:
    asset = worker()
    with pytest.raises(
        UserError,
        match="The asset ended its process with SIGABRT; last output: Fatal error: index out of range",
    ):
        asset.call("abort", {"x": X})
    with pytest.raises(UserError, match="SIGABRT"):  # and says so again, instead of hanging
        asset.call("main", {"x": X})
    with pytest.raises(UserError, match=r"ended its process with exit code 7\."):
        worker().call("exit", {"x": X})
    asset = worker()
    os.kill(asset._process.pid, signal.SIGKILL)
    with pytest.raises(UserError, match="SIGKILL"):
        asset.call("main", {"x": X})


def test_an_interrupted_call_does_not_answer_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the runtime computes: the process lives on, and its late answer is nobody's."""
    asset = worker()
    receive = asset._connection.recv
    monkeypatch.setattr(asset, "_connection", Interrupted(asset._connection))
    os.kill(asset._process.pid, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        asset.call("main", {"x": X})
    monkeypatch.undo()
    assert asset._connection.recv == receive
    assert np.array_equal(asset.call("main", {"x": 10 * X})["y"], 20 * X)


class Interrupted:
    """A connection whose answer is awaited in vain."""

    def __init__(self, connection: Any) -> None:
        self.send = connection.send

    def recv(self) -> None:
        raise KeyboardInterrupt


def test_nothing_is_printed_and_nothing_is_left(capfd: pytest.CaptureFixture[str]) -> None:
    asset = worker()
    asset.call("print", {"x": X})
    process = asset._process
    del asset
    assert process.wait(10) is not None
    assert capfd.readouterr() == ("", "")
