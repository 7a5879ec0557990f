"""Drift: which layer of a component is the first to leave the reference."""

from __future__ import annotations

import copy
import math
import tempfile
from pathlib import Path

import numpy as np

from dsvl_export.compilers import load_compiler
from dsvl_export.parity_check.quantization_error import Noise
from dsvl_export.parity_check.result import Drift, ParityResult, TapError
from dsvl_export.parity_check.stages import Goldens
from dsvl_export.parity_check.tolerances import Tolerance
from runtimes.backends.registry import load_backend
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.manifest import DEBUG_PREFIX
from runtimes.chain import Chain
from runtimes.errors import UserError
from runtimes.goldens.golden import Golden, relative_rms
from runtimes.goldens.taps import TAPPED_COMPONENTS, Taps, take_taps
from runtimes.session import SessionOptions

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


def take_from_debug_build(
    bundle: Bundle,
    chain: Chain,
    golden: Golden,
    component: str,
    pair: tuple[str, str],
    options: SessionOptions,
) -> Taps:
    """Taps of one component of a bundle's backend and precision, from a debug build of its artifact.

    The chain gives up its own session of the component first: two at once need not fit into memory.
    """
    backend, precision = pair
    setattr(chain, component, None)
    contract = bundle.manifest.contracts[precision][component]
    artifact = bundle.path(bundle.artifact(component, backend, precision).files[0])
    debug, module = copy.copy(chain), load_backend(backend)
    with debug_folder(bundle) as folder:
        file = load_compiler(backend, debug_build=True).debug_build(artifact, contract, Path(folder))
        start = module.open_decoder if component == "decoder" else module.open_component
        setattr(debug, component, start(file, contract.with_taps(), options))
        return take_taps(debug, golden, component)


def debug_folder(bundle: Bundle) -> tempfile.TemporaryDirectory[str]:
    """A temporary folder, inside the bundle where that can be written: weights are linked, not copied."""
    try:
        return tempfile.TemporaryDirectory(prefix=DEBUG_PREFIX, dir=bundle.folder)
    except OSError:
        return tempfile.TemporaryDirectory()


def locate(
    bundle: Bundle,
    chain: Chain,
    goldens: Goldens,
    checkpoint: str,
    component: str,
    result: ParityResult,
    noise: Noise,
    options: SessionOptions,
) -> Drift:
    """Take the taps of one component from a debug build and compare them with the first golden's.

    What cannot be located is said in the drift's note: a bundle without taps, a debug build that
    cannot be made here, or an error that shows in no tap. The chain loses the component.
    """
    assert result.tolerance
    try:
        golden = goldens.load(0, checkpoint)
        expected = golden.taps.get(component, {})
        if not expected:
            return Drift(component, (), None, "the goldens have no taps; export the bundle again")
        pair = (result.backend, result.precision)
        found = take_from_debug_build(bundle, chain, golden, component, pair, options)
    except (UserError, OSError) as error:
        return Drift(component, (), None, f"no debug build: {str(error).rstrip('.')}")
    if found.keys() != expected.keys():
        return Drift(component, (), None, "the goldens have other taps; export the bundle again")
    measured = noise.taps.get(component, {})
    taps = tuple(
        _tap_error(name, array, expected[name], measured.get(name), result.tolerance)
        for name, array in found.items()
    )
    first = next((tap.name for tap in taps if not tap.relative_rms <= tap.band), None)
    return Drift(component, taps, first, "" if first else _note(component, result))


def _note(component: str, result: ParityResult) -> str:
    """What it means that no tap left its band."""
    beyond = sorted(
        {rung.errors.golden for name in RUNG_OF[component]
         if (rung := result.rung(name)).state == "failed" and rung.errors}
    )  # fmt: skip
    inside = "all taps of golden 0 lie in their bands"
    if not beyond or 0 in beyond:
        return inside
    return f"{inside}; the error shows in golden {', '.join(map(str, beyond))}, which has no taps"


def _tap_error(
    name: str, found: np.ndarray, expected: np.ndarray, noise: float | None, tolerance: Tolerance
) -> TapError:
    with np.errstate(invalid="ignore", over="ignore"):
        error = relative_rms(found, expected) if found.shape == expected.shape else math.inf
    return TapError(name, error, tolerance.band(noise), noise)
