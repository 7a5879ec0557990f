"""Backend ``coreai``: ``.aimodel`` assets in Apple's own runtime, on macOS and, without a Mac, on Linux.

The runtime ends the process where it meets an error of its own, and writes to the terminal; so it always
runs in a process apart. States stay there, in place.
"""

from __future__ import annotations

import asyncio
import platform
import threading
from collections.abc import Coroutine, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtimes.backends.static_shape import FixedComponent, FixedDecoder, Sizes
from runtimes.backends.worker import WorkerAsset
from runtimes.bundle.contracts import Contract
from runtimes.bundle.files import read_json
from runtimes.errors import UserError, first_line
from runtimes.installation import install_command
from runtimes.session import ComponentSession, DecoderSession, EntryPoints, Execution, SessionOptions

if TYPE_CHECKING:
    from runtimes.bundle.manifest import Artifact
    from runtimes.chain import Chain

SUFFIX = ".aimodel"
PROGRAM = "main.mlirb"  # in an asset
SIZES = "dsvl_export.json"  # in an asset: entry point → sizes of the contract's named dims
PREFILL = "prefill"  # the entry point for several tokens, beside DECODE
CHUNK = 128  # tokens that it takes
NARROW = {np.dtype(np.int64): np.int32}


def devices() -> list[str]:
    _version()
    return ["cpu"]


def _version() -> str:
    try:
        return version("coreai-core")
    except PackageNotFoundError as error:
        raise UserError(f"The backend coreai is not installed; run: {install_command('coreai')}.") from error


def execution(artifact: Artifact, device: str | None = None) -> Execution:
    try:
        installed = _version()
    except UserError as error:
        return Execution("not run", str(error).rstrip("."))
    if device not in (None, "cpu"):
        return Execution("not run", f"coreai runs on cpu here, not on {device}")
    return Execution("ran", f"Core AI {installed}, Apple's runtime, on {platform.system()}")


def open_component(file: Path, contract: Contract, options: SessionOptions) -> ComponentSession:
    return FixedComponent(open_asset(file, contract), contract)


def open_decoder(file: Path, contract: Contract, options: SessionOptions) -> DecoderSession:
    try:
        several = read_json(file.parent / SIZES)[PREFILL]
        fixed = Sizes(several["capacity"], PREFILL, several["sequence"], flexible=False, any_rows=False)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{file.parent / SIZES} does not say what the decoder takes; export it again."
        ) from error
    return FixedDecoder(open_asset(file, contract), contract, fixed)


def entry_points(chain: Chain, capacity: int) -> EntryPoints:
    """All functions are called by the sessions; the capacity is the asset's own."""
    decoder = chain.decoder
    assert isinstance(decoder, FixedDecoder)
    return EntryPoints(values={"capacity of the decoder's asset": (decoder.sizes.capacity, capacity)})


def open_asset(file: Path, contract: Contract) -> WorkerAsset:
    """The asset whose program a file is, in a process of its own.

    Raises:
        UserError: Core AI cannot load it.
    """
    what = f"Core AI, running the {contract.component},"
    return WorkerAsset(("runtimes.backends.coreai", "CoreAIAsset"), (file.parent, contract), what)


class CoreAIAsset:
    """An asset in the runtime; states are the runtime's own arrays."""

    def __init__(self, folder: Path, contract: Contract) -> None:
        self._contract = contract
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._functions: dict[str, Any] = {}
        try:
            sizes = read_json(folder / SIZES)
            self._sizes = next(iter(sizes.values()))
            self._wait(self._load(folder, list(sizes)))
        except (OSError, RuntimeError, ValueError, StopIteration) as error:
            raise UserError(f"Core AI cannot load {folder}: {first_line(error)}.") from error

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _load(self, folder: Path, functions: list[str]) -> None:
        from coreai.authoring import AIModelAsset

        self._executable = AIModelAsset.load(folder).executable()  # kept open as long as this process lives
        model = await self._executable.__aenter__()
        self._functions = {name: model.load_function(name) for name in functions}

    def call(
        self, function: str, inputs: Mapping[str, np.ndarray], state: Any = None
    ) -> dict[str, np.ndarray]:
        from coreai.runtime import NDArray

        given = {
            name: NDArray(np.ascontiguousarray(array.astype(NARROW.get(array.dtype, array.dtype))))
            for name, array in inputs.items()
        }
        try:
            found = self._wait(self._functions[function](inputs=given, state=state or {}))
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"Core AI failed in the {self._contract.component}: {first_line(error)}."
            ) from error
        return {spec.name: found[spec.name].numpy() for spec in self._contract.outputs}

    def new_state(self) -> dict[str, Any]:
        from coreai.runtime import NDArray

        return {spec.name: NDArray(spec.allocate(self._sizes)) for spec in self._contract.states}

    def read_state(self, state: dict[str, Any], name: str) -> np.ndarray:
        return np.asarray(state[name].numpy())

    def write_state(self, state: dict[str, Any], name: str, array: np.ndarray) -> None:
        from coreai.runtime import NDArray

        state[name] = NDArray(np.ascontiguousarray(array))
