"""Backend ``coreml``: packages in Core ML on a Mac; elsewhere an interpreter executes the saved files.

Devices say which functions of a decoder are called: ``ane`` those of fixed lengths, which the Neural Engine
asks for, ``gpu`` and ``cpu`` the flexible one. The interpreter takes them all, so each can be proven.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from runtimes.backends.mil.package import CHUNK, EXTEND, IMAGE, PREFILL, Package, package_folder
from runtimes.backends.static_shape import Asset, FixedComponent, FixedDecoder, Sizes
from runtimes.bundle.contracts import Contract
from runtimes.errors import UserError
from runtimes.installation import install_command
from runtimes.session import ComponentSession, DecoderSession, EntryPoints, Execution, SessionOptions

if TYPE_CHECKING:
    from runtimes.bundle.manifest import Artifact
    from runtimes.chain import Chain

DEVICES = ("gpu", "ane", "cpu")
FLEXIBLE = ("gpu", "cpu")


def devices() -> list[str]:
    if find_spec("coremltools") is None:
        raise UserError(f"The backend coreml is not installed; run: {install_command('coremltools')}.")
    return list(DEVICES)


def execution(artifact: Artifact, device: str | None = None) -> Execution:
    try:
        known = devices()
    except UserError as error:
        return Execution("not run", str(error).rstrip("."))
    device = device or known[0]
    if device not in known:
        return Execution("not run", f"coreml runs on {', '.join(known)}, not on {device}")
    if sys.platform == "darwin":
        return Execution("ran", f"Core ML ({device})", device=device)
    return Execution("simulated", "the MIL interpreter on the saved package", device=device)


def open_component(file: Path, contract: Contract, options: SessionOptions) -> ComponentSession:
    return CoreMLComponent(_asset(Package(package_folder(file)), contract, options), contract)


def open_decoder(file: Path, contract: Contract, options: SessionOptions) -> DecoderSession:
    package = Package(package_folder(file))
    sizes = _sizes(package.capacity(), (options.device or DEVICES[0]) in FLEXIBLE)
    return FixedDecoder(_asset(package, contract, options), contract, sizes)


def entry_points(chain: Chain, capacity: int) -> EntryPoints:
    """The encoder's function for images, and the decoder's functions that another device calls."""
    encoder, decoder = chain.vision_encoder, chain.decoder
    assert isinstance(encoder, CoreMLComponent) and isinstance(decoder, FixedDecoder)
    name = PREFILL if decoder.sizes.flexible else EXTEND
    other = FixedDecoder(decoder.asset, decoder.contract, _sizes(capacity, name == EXTEND))
    return EntryPoints(
        images={f"function {IMAGE} of the vision encoder": encoder.run_image},
        decoders={f"function {name} of the decoder": other},
        values={"capacity of the decoder's package": (decoder.sizes.capacity, capacity)},
    )


def _sizes(capacity: int, flexible: bool) -> Sizes:
    several = EXTEND if flexible else PREFILL
    return Sizes(capacity, several, min(CHUNK, capacity), flexible, any_rows=flexible)


def _asset(package: Package, contract: Contract, options: SessionOptions) -> Asset:
    if sys.platform == "darwin":
        from runtimes.backends.mil.native import NativeAsset

        return NativeAsset(package, contract, options.device or DEVICES[0])
    from runtimes.backends.mil.interpreter import InterpretedAsset

    return InterpretedAsset(package, contract, options.threads)


class CoreMLComponent(FixedComponent):
    """A stateless component, which a vision encoder can also be given an image for."""

    def run_image(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """``run`` on a square image ``uint8 [N, N, 3]``, as an app passes one."""
        found = self.asset.call(IMAGE, {IMAGE: image})
        return {spec.name: found[spec.name].astype(spec.dtype) for spec in self.contract.outputs}
