"""Backend ``coreai``: ``.aimodel`` assets in Apple's Core AI runtime, on macOS and Linux.

The runtime ends the process on internal errors and writes to the terminal, so it runs in a worker
process. States stay in that process and are updated in place.
"""

from __future__ import annotations

import asyncio
import platform
import threading
from collections.abc import Collection, Coroutine, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtimes.backends.static_shape import DecoderSizes, StaticShapeComponent, StaticShapeDecoder
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
PREFILL = "prefill"  # the entry point for multiple tokens; DECODE is that for one
CHUNK = 128  # tokens of a prefill call
NARROW = {np.dtype(np.int64): np.int32}


def devices() -> list[str]:
    """List the devices that this machine supports; see ``Backend.devices``."""
    _version()
    return ["cpu"]


def _version() -> str:
    try:
        return version("coreai-core")
    except PackageNotFoundError as error:
        raise UserError(f"The backend coreai is not installed; run: {install_command('coreai')}.") from error


def execution(artifact: Artifact, device: str | None = None) -> Execution:
    """Determine whether an artifact can run here; see ``Backend.execution``."""
    try:
        installed = _version()
    except UserError as error:
        return Execution("not run", str(error).rstrip("."))
    if device not in (None, "cpu"):
        return Execution("not run", f"coreai runs on cpu here, not on {device}")
    return Execution("ran", f"Core AI {installed}, Apple's runtime, on {platform.system()}")


def open_component(file: Path, contract: Contract, options: SessionOptions) -> ComponentSession:
    """Open a component; see ``Backend.open_component``."""
    return StaticShapeComponent(open_asset(file, contract), contract)


def open_decoder(file: Path, contract: Contract, options: SessionOptions) -> DecoderSession:
    """Open the decoder; see ``Backend.open_decoder``."""
    try:
        prefill = read_json(file.parent / SIZES)[PREFILL]
        sizes = DecoderSizes(
            prefill["capacity"], PREFILL, prefill["sequence"], flexible=False, any_rows=False
        )
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{file.parent / SIZES} does not hold the sizes of the decoder; export it again."
        ) from error
    return StaticShapeDecoder(open_asset(file, contract), contract, sizes)


def entry_points(chain: Chain, own: Collection[str], capacity: int) -> EntryPoints:
    """Return the capacity of the asset; the sessions call all its functions."""
    decoder = chain.decoder
    if "decoder" not in own:
        return EntryPoints()
    assert isinstance(decoder, StaticShapeDecoder)
    return EntryPoints(values={"capacity of the decoder's asset": (decoder.sizes.capacity, capacity)})


def open_asset(file: Path, contract: Contract) -> WorkerAsset:
    """Open the asset of a program file in a worker process.

    Raises:
        UserError: Core AI cannot load it.
    """
    description = f"Core AI, running the {contract.component},"
    start = ("runtimes.backends.coreai", "CoreAIAsset")
    return WorkerAsset(start, (file.parent, contract), description)


class CoreAIAsset:
    """An asset in Core AI; its states are arrays of the runtime."""

    def __init__(self, folder: Path, contract: Contract) -> None:
        """Load the asset.

        Raises:
            UserError: Core AI cannot load it.
        """
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

    def _wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _load(self, folder: Path, functions: list[str]) -> None:
        from coreai.authoring import AIModelAsset

        self._executable = AIModelAsset.load(folder).executable()  # open until the process ends
        model = await self._executable.__aenter__()
        self._functions = {name: model.load_function(name) for name in functions}

    def call(
        self, function: str, inputs: Mapping[str, np.ndarray], state: Any = None
    ) -> dict[str, np.ndarray]:
        """Run a function on inputs by name; see ``Asset.call``.

        Raises:
            UserError: Core AI failed.
        """
        from coreai.runtime import NDArray

        arrays = {
            name: NDArray(np.ascontiguousarray(array.astype(NARROW.get(array.dtype, array.dtype))))
            for name, array in inputs.items()
        }
        try:
            outputs = self._wait(self._functions[function](inputs=arrays, state=state or {}))
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"Core AI failed in the {self._contract.component}: {first_line(error)}."
            ) from error
        return {spec.name: outputs[spec.name].numpy() for spec in self._contract.outputs}

    def new_state(self) -> dict[str, Any]:
        """Create zeroed states of one sequence."""
        from coreai.runtime import NDArray

        return {spec.name: NDArray(spec.allocate(self._sizes)) for spec in self._contract.states}

    def read_state(self, state: dict[str, Any], name: str) -> np.ndarray:
        """Return a state ``[1, Hkv, C, Dh]``."""
        return np.asarray(state[name].numpy())

    def write_state(self, state: dict[str, Any], name: str, array: np.ndarray) -> None:
        """Overwrite a state with ``[1, Hkv, C, Dh]``."""
        from coreai.runtime import NDArray

        state[name] = NDArray(np.ascontiguousarray(array))
