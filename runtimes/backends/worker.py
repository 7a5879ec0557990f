"""Assets in a worker process, so that crashes and output do not reach the user's process."""

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
    """Handle of a state in the worker process."""

    def __init__(self, number: int) -> None:
        """Keep the number of the state."""
        self.number = number


class WorkerAsset:
    """An asset in a worker process; a state lives there as long as its handle exists here."""

    def __init__(self, start: tuple[str, str], args: tuple[Any, ...], description: str) -> None:
        """Start the process and create the asset in it.

        Args:
            start: module and function that create the asset in the worker process.
            args: arguments of the function, which are pickled.
            description: subject of messages about the process.

        Raises:
            UserError: the asset cannot be created, or the process has ended.
        """
        self._description, self._lock = description, threading.Lock()
        self._freed: list[int] = []  # states without a handle
        self._calls = 0
        self._connection, theirs = Pipe()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 -- closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
        )
        theirs.close()
        self.close = weakref.finalize(self, _end, self._connection, self._process, self._output)
        self._request("start", start, args)

    def _request(self, method: str, *args: Any) -> Any:
        with self._lock:
            try:
                self._calls += 1
                freed = [self._freed.pop() for _ in range(len(self._freed))]
                self._connection.send((self._calls, method, args, freed))
                number = 0
                while number != self._calls:  # skips the reply to an interrupted call
                    number, kind, value = self._connection.recv()
            except (EOFError, OSError) as error:
                raise UserError(self._exit_message()) from error
        if kind == "error":
            raise UserError(value)
        return value

    def _exit_message(self) -> str:
        code = self._process.wait()
        status = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").strip().splitlines()
        output = f"; last output: {lines[-1][:300].rstrip('.')}" if lines else ""
        return f"{self._description} ended its process with {status}{output}."

    def call(
        self, function: str, inputs: Mapping[str, np.ndarray], state: WorkerState | None = None
    ) -> dict[str, np.ndarray]:
        """Call a function of the asset; see ``Asset.call``.

        Raises:
            UserError: the call failed, or the process has ended.
        """
        number = state.number if state else None
        outputs: dict[str, np.ndarray] = self._request("call", function, dict(inputs), number)
        return outputs

    def new_state(self) -> WorkerState:
        """Create zeroed states; see ``Asset.new_state``."""
        state = WorkerState(self._request("new_state"))
        weakref.finalize(state, self._freed.append, state.number)
        return state

    def read_state(self, state: WorkerState, name: str) -> np.ndarray:
        """Read a state; see ``Asset.read_state``."""
        return np.asarray(self._request("read_state", state.number, name))

    def write_state(self, state: WorkerState, name: str, array: np.ndarray) -> None:
        """Write a state; see ``Asset.write_state``."""
        self._request("write_state", state.number, name, array)


def _end(connection: Connection, process: subprocess.Popen[bytes], output: Any) -> None:
    connection.close()
    process.kill()
    process.wait()
    output.close()


class _AssetServer:
    """The asset in the worker process, with its states by number."""

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
        """Return the number of states."""
        return len(self._states) - 1

    def read_state(self, state: int, name: str) -> Any:
        return self._asset.read_state(self._states[state], name)

    def write_state(self, state: int, name: str, array: np.ndarray) -> None:
        self._asset.write_state(self._states[state], name, array)


def serve(descriptor: int) -> None:
    """Answer requests until the other side closes the connection.

    Args:
        descriptor: file descriptor of the connection.
    """
    # The terminal sends SIGINT to this process too, but only the user's process handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection, server = Connection(descriptor), _AssetServer()
    while True:
        try:
            number, method, args, freed = connection.recv()
        except EOFError:
            return
        server.free(freed)
        try:
            connection.send((number, "value", getattr(server, method)(*args)))
        except UserError as error:
            connection.send((number, "error", str(error)))
