"""Drift: which layer of a component is the first to leave the reference."""

from __future__ import annotations

import copy
import math
import tempfile
from pathlib import Path

import numpy as np

from dsvl_export.compilers import load_compiler
from dsvl_export.ladder.noise import Noise
from dsvl_export.ladder.result import Drift, ParityResult, TapError
from dsvl_export.ladder.tolerances import Tolerance
from runtimes.backends import load_backend
from runtimes.bundle import Bundle
from runtimes.chain import Chain
from runtimes.errors import UserError
from runtimes.goldens import Golden, relative_rms
from runtimes.session import SessionOptions
from runtimes.taps import TAPPED_COMPONENTS, take_taps

RUNG_OF = {
    "vision_encoder": ("vision_encoder",),
    "adaptor": ("adaptor",),
    "decoder": ("prefill_logits", "teacher_forced_logits"),
}


def suspects(result: ParityResult) -> list[str]:
    """Components whose own rung failed; the decoder where tokens alone differ."""
    failed = [
        component
        for component in TAPPED_COMPONENTS
        if any(result.rung(name).state == "failed" for name in RUNG_OF[component])
    ]
    return failed or (["decoder"] if result.rung("greedy_tokens").state == "failed" else [])


def tapped_chain(
    bundle: Bundle, chain: Chain, backend: str, precision: str, components: list[str], folder: Path
) -> Chain:
    """The chain with debug builds of some components, written into ``folder``."""
    tapped = copy.copy(chain)
    for component in components:
        contract = bundle.manifest.contracts[precision][component]
        artifact = bundle.path(bundle.artifact(component, backend, precision).files[0])
        file = load_compiler(backend).debug_build(artifact, contract, folder)
        module = load_backend(backend)
        start = module.open_decoder if component == "decoder" else module.open_component
        setattr(tapped, component, start(file, contract.with_taps(), SessionOptions()))
    return tapped


def debug_folder(bundle: Bundle) -> tempfile.TemporaryDirectory[str]:
    """A temporary folder, inside the bundle where that can be written: weights are linked, not copied."""
    try:
        return tempfile.TemporaryDirectory(prefix=".debug-", dir=bundle.folder)
    except OSError:
        return tempfile.TemporaryDirectory()


def locate(
    bundle: Bundle, chain: Chain, golden: Golden, component: str, result: ParityResult, noise: Noise
) -> Drift:
    """Take the taps of one component from a debug build and compare them with the golden's.

    What cannot be located is said in the drift's note: a bundle without taps, a debug build that
    cannot be made here, or an error that shows in no tap.
    """
    assert result.tolerance
    expected = golden.taps.get(component)
    if not expected:
        return Drift(component, (), None, "the goldens have no taps; export the bundle again")
    measured = noise.taps.get(component, {})
    try:
        with debug_folder(bundle) as folder:
            debug = tapped_chain(bundle, chain, result.backend, result.precision, [component], Path(folder))
            found = take_taps(debug, golden, component)
            taps = tuple(
                _tap_error(name, found[name], expected[name], measured.get(name), result.tolerance)
                for name in found
            )
    except UserError as error:
        return Drift(component, (), None, f"no debug build: {str(error).rstrip('.')}")
    first = next((tap.name for tap in taps if not tap.relative_rms <= tap.band), None)
    return Drift(component, taps, first, "" if first else "all taps of the first golden lie in their bands")


def _tap_error(
    name: str, found: np.ndarray, expected: np.ndarray, noise: float | None, tolerance: Tolerance
) -> TapError:
    error = relative_rms(found, expected) if found.shape == expected.shape else math.inf
    return TapError(name, error, tolerance.band(noise), noise)
