"""Localization: which layer of a component is the first to diverge from the reference."""

from __future__ import annotations

import copy
import math
import tempfile
from pathlib import Path

import numpy as np

from dsvl_export.compilers.registry import load_compiler
from dsvl_export.parity_check.goldens import Goldens
from dsvl_export.parity_check.quantization_error import QuantizationError
from dsvl_export.parity_check.result import STAGES_OF, Localization, ParityResult, TapError
from dsvl_export.parity_check.tolerances import Tolerance
from runtimes.backends.registry import load_backend
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.manifest import DEBUG_PREFIX
from runtimes.chain import Chain
from runtimes.errors import UserError
from runtimes.goldens.golden import Golden, relative_rms
from runtimes.goldens.taps import TAPPED_COMPONENTS, Taps, record_taps
from runtimes.session import SessionOptions


def components_to_localize(result: ParityResult) -> list[str]:
    """Return the components whose own stage failed, or the decoder if only the tokens differ."""
    failed = [
        component
        for component in TAPPED_COMPONENTS
        if any(result.stage(name).state == "failed" for name in STAGES_OF[component])
    ]
    return failed or (["decoder"] if result.stage("greedy_tokens").state == "failed" else [])


def take_from_debug_build(
    bundle: Bundle,
    chain: Chain,
    golden: Golden,
    component: str,
    pair: tuple[str, str],
    options: SessionOptions,
) -> Taps:
    """Take the taps of one component from a debug build of its artifact.

    The chain closes its own session of the component first, since two may not fit into memory.

    Args:
        bundle: the bundle with the artifact.
        chain: runs the other components.
        golden: the inputs.
        component: the component whose taps are taken.
        pair: backend and precision of the artifact.
        options: device and threads of the session.

    Raises:
        UserError: the debug build cannot be made or run here.
    """
    setattr(chain, component, None)
    item, contract = bundle.artifact(component, *pair), bundle.contract(component, *pair)
    debug, module = copy.copy(chain), load_backend(item.backend)
    compiler = load_compiler(item.backend, debug_build=True)
    with debug_folder(bundle) as folder:
        file = compiler.debug_build(bundle.path(item.files[0]), contract, Path(folder))
        start = module.open_decoder if component == "decoder" else module.open_component
        setattr(debug, component, start(file, contract.with_taps(), options))
        return record_taps(debug, golden, component)


def debug_folder(bundle: Bundle) -> tempfile.TemporaryDirectory[str]:
    """Return a temporary folder; inside a writable bundle, to link weights instead of copying."""
    if bundle.downloaded:
        return tempfile.TemporaryDirectory()
    try:
        return tempfile.TemporaryDirectory(prefix=DEBUG_PREFIX, dir=bundle.folder)
    except OSError:
        return tempfile.TemporaryDirectory()


def localize(
    bundle: Bundle,
    chain: Chain,
    goldens: Goldens,
    checkpoint: str,
    component: str,
    result: ParityResult,
    quantization_error: QuantizationError,
    options: SessionOptions,
) -> Localization:
    """Compare the taps of one component, from a debug build, with those of the first golden.

    The note of the result says why no layer can be named: a bundle without taps, a debug build that
    cannot be made here, or an error that shows in no tap. The chain closes its session of the
    component.
    """
    try:
        golden = goldens.load(0, checkpoint)
        expected = golden.taps.get(component, {})
        if not expected:
            return Localization(component, (), None, "the goldens have no taps; export the bundle again")
        pair = (result.backend, result.precision)
        actual = take_from_debug_build(bundle, chain, golden, component, pair, options)
    except (UserError, OSError) as error:
        return Localization(component, (), None, f"no debug build: {str(error).rstrip('.')}")
    if actual.keys() != expected.keys():
        return Localization(component, (), None, "the goldens have other taps; export the bundle again")
    measured = quantization_error.taps.get(component, {})
    taps = tuple(
        _tap_error(name, array, expected[name], measured.get(name), result.tolerances[component].own)
        for name, array in actual.items()
    )
    first = next((tap.name for tap in taps if not tap.relative_rms <= tap.bound), None)
    return Localization(component, taps, first, "" if first else _note(component, result))


def _note(component: str, result: ParityResult) -> str:
    """Explain why no tap lies beyond its bound although a stage failed."""
    beyond = sorted(
        {stage.errors.golden for name in STAGES_OF[component]
         if (stage := result.stage(name)).state == "failed" and stage.errors}
    )  # fmt: skip
    within = "all taps of golden 0 lie within their bounds"
    if not beyond or 0 in beyond:
        return within
    return f"{within}; the error shows in golden {', '.join(map(str, beyond))}, which has no taps"


def _tap_error(
    name: str, actual: np.ndarray, expected: np.ndarray, measured: float | None, tolerance: Tolerance
) -> TapError:
    with np.errstate(invalid="ignore", over="ignore"):
        error = relative_rms(actual, expected) if actual.shape == expected.shape else math.inf
    return TapError(name, error, tolerance.tap_bound(measured), measured)
