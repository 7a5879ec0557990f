"""Backend ``coreml``: packages in Core ML on a Mac, or in an interpreter on other systems.

The device selects the functions of a decoder: ``ane`` calls those of static lengths, which the
Neural Engine requires, ``gpu`` and ``cpu`` the flexible one. The interpreter runs all of them, so
that each can be tested.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from runtimes.backends.mil.package import CHUNK, EXTEND, IMAGE, PREFILL, Package, package_folder
from runtimes.backends.static_shape import Asset, DecoderSizes, StaticShapeComponent, StaticShapeDecoder
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
    """List the devices that this machine supports; see ``Backend.devices``."""
    if find_spec("coremltools") is None:
        raise UserError(f"The backend coreml is not installed; run: {install_command('coremltools')}.")
    return list(DEVICES)


def execution(artifact: Artifact, device: str | None = None) -> Execution:
    """Determine whether an artifact can run here; see ``Backend.execution``."""
    try:
        available = devices()
    except UserError as error:
        return Execution("not run", str(error).rstrip("."))
    device = device or available[0]
    if device not in available:
        return Execution("not run", f"coreml runs on {', '.join(available)}, not on {device}")
    if sys.platform == "darwin":
        return Execution("ran", f"Core ML ({device})", device=device)
    return Execution("simulated", "the MIL interpreter on the saved package", device=device)


def open_component(file: Path, contract: Contract, options: SessionOptions) -> ComponentSession:
    """Open a component; see ``Backend.open_component``."""
    return CoreMLComponent(_asset(Package(package_folder(file)), contract, options), contract)


def open_decoder(file: Path, contract: Contract, options: SessionOptions) -> DecoderSession:
    """Open the decoder; see ``Backend.open_decoder``."""
    package = Package(package_folder(file))
    sizes = _sizes(package.capacity(), (options.device or DEVICES[0]) in FLEXIBLE)
    return StaticShapeDecoder(_asset(package, contract, options), contract, sizes)


def entry_points(chain: Chain, own: Collection[str], capacity: int) -> EntryPoints:
    """Return the encoder's image function and the decoder's functions for other devices."""
    points, encoder, decoder = EntryPoints(), chain.vision_encoder, chain.decoder
    if "vision_encoder" in own:
        assert isinstance(encoder, CoreMLComponent)
        points = replace(points, images={f"function {IMAGE} of the vision encoder": encoder.run_image})
    if "decoder" in own:
        assert isinstance(decoder, StaticShapeDecoder)
        name = PREFILL if decoder.sizes.flexible else EXTEND
        other = StaticShapeDecoder(decoder.asset, decoder.contract, _sizes(capacity, name == EXTEND))
        values = {"capacity of the decoder's package": (decoder.sizes.capacity, capacity)}
        points = replace(points, decoders={f"function {name} of the decoder": other}, values=values)
    return points


def _sizes(capacity: int, flexible: bool) -> DecoderSizes:
    function = EXTEND if flexible else PREFILL
    return DecoderSizes(capacity, function, min(CHUNK, capacity), flexible, any_rows=flexible)


def _asset(package: Package, contract: Contract, options: SessionOptions) -> Asset:
    if sys.platform == "darwin":
        from runtimes.backends.mil.native import NativeAsset

        return NativeAsset(package, contract, options.device or DEVICES[0])
    from runtimes.backends.mil.interpreter import InterpretedAsset

    return InterpretedAsset(package, contract, options.threads)


class CoreMLComponent(StaticShapeComponent):
    """Session of a stateless component; a vision encoder also accepts images."""

    def run_image(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Run on a square image ``uint8 [N, N, 3]``, which apps pass.

        Returns:
            vision features by name, batch 1.
        """
        outputs = self.asset.call(IMAGE, {IMAGE: image})
        return {spec.name: outputs[spec.name].astype(spec.dtype) for spec in self.contract.outputs}
