"""An asset in a process of its own: what crashes there, or prints, does not reach the user's process."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping
from importlib import import_module
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from runtimes.backends.static_shape import Asset
from runtimes.errors import UserError

PROGRAM = "import sys; from runtimes.backends.worker import serve; serve(int(sys.argv[1]))"


class WorkerState:
    """A state in the other process, by its number."""

    def __init__(self, number: int) -> None:
        self.number = number


class WorkerAsset:
    """An asset that another process holds; states are kept there, as long as they are known here.

    Args:
        start: module and function that make the asset, in the other process.
        args: of that function; they are pickled.
        what: it is, in messages.

    Raises:
        UserError: the asset cannot be made, or the process has ended.
    """

    def __init__(self, start: tuple[str, str], args: tuple[Any, ...], what: str) -> None:
        self._what, self._lock = what, threading.Lock()
        self._freed: list[int] = []  # states that nobody here knows any more
        self._asked = 0
        self._connection, theirs = Pipe()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 -- closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=self._said,
        )
        theirs.close()
        self.close = weakref.finalize(self, _end, self._connection, self._process, self._said)
        self._ask("start", start, args)

    def _ask(self, method: str, *args: Any) -> Any:
        with self._lock:
            try:
                self._asked += 1
                freed = [self._freed.pop() for _ in range(len(self._freed))]
                self._connection.send((self._asked, method, args, freed))
                number = 0
                while number != self._asked:  # an interrupted call left its answer behind
                    number, answer, value = self._connection.recv()
            except (EOFError, OSError) as error:
                raise UserError(self._obituary()) from error
        if answer == "error":
            raise UserError(value)
        return value

    def _obituary(self) -> str:
        code = self._process.wait()
        how = f"with {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        said = f", saying: {lines[-1][:300].rstrip('.')}" if lines else ""
        return f"{self._what} ended its process {how}{said}."

    def call(
        self, function: str, inputs: Mapping[str, np.ndarray], state: WorkerState | None = None
    ) -> dict[str, np.ndarray]:
        number = state.number if state else None
        found: dict[str, np.ndarray] = self._ask("call", function, dict(inputs), number)
        return found

    def new_state(self) -> WorkerState:
        state = WorkerState(self._ask("new_state"))
        weakref.finalize(state, self._freed.append, state.number)
        return state

    def read_state(self, state: WorkerState, name: str) -> np.ndarray:
        return np.asarray(self._ask("read_state", state.number, name))

    def write_state(self, state: WorkerState, name: str, array: np.ndarray) -> None:
        self._ask("write_state", state.number, name, array)


def _end(connection: Connection, process: subprocess.Popen[bytes], said: Any) -> None:
    connection.close()
    process.kill()
    process.wait()
    said.close()


class _Served:
    """The asset in the other process, its states by number."""

    def __init__(self) -> None:
        self._asset: Any = None
        self._states: dict[int | None, Any] = {None: None}
        self._count = 0

    def start(self, start: tuple[str, str], args: tuple[Any, ...]) -> None:
        module, name = start
        make: Callable[..., Asset] = getattr(import_module(module), name)
        self._asset = make(*args)

    def call(self, function: str, inputs: dict[str, np.ndarray], state: int | None) -> Any:
        return dict(self._asset.call(function, inputs, self._states[state]))

    def new_state(self) -> int:
        self._count += 1
        self._states[self._count] = self._asset.new_state()
        return self._count

    def free(self, states: list[int]) -> None:
        for state in states:
            del self._states[state]

    def states(self) -> int:
        """How many there are."""
        return len(self._states) - 1

    def read_state(self, state: int, name: str) -> Any:
        return self._asset.read_state(self._states[state], name)

    def write_state(self, state: int, name: str, array: np.ndarray) -> None:
        self._asset.write_state(self._states[state], name, array)


def serve(descriptor: int) -> None:
    """Answer until the other side goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it here too, but it is the user's call
    connection, served = Connection(descriptor), _Served()
    while True:
        try:
            number, method, args, freed = connection.recv()
        except EOFError:
            return
        served.free(freed)
        try:
            connection.send((number, "value", getattr(served, method)(*args)))
        except UserError as error:
            connection.send((number, "error", str(error)))
