"""Layers one by one: each is handed the recorded tap before it, and must give what the plan's layer gives.

What a quantized precision loses is in both, so that a bound is as narrow as the roundings of one layer, and
the layer that fails is the faulty one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsvl_export.compilers import load_compiler
from dsvl_export.parity_check.localization import debug_folder
from dsvl_export.parity_check.result import ParityResult, Rung
from dsvl_export.parity_check.tolerances import Tolerance
from runtimes.backends.mil.package import SPECIFICATION
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.contracts import Contract
from runtimes.chain import Chain
from runtimes.errors import UserError
from runtimes.goldens.golden import relative_rms
from runtimes.goldens.layers import (
    STATELESS,
    LayerInputs,
    Table,
    load_tables,
    sample_rows,
    save_tables,
)
from runtimes.goldens.taps import TAPPED_COMPONENTS
from runtimes.session import SessionOptions

if TYPE_CHECKING:
    import torch

    from calibration.quantized_weights import QuantizedWeights
    from reference.checkpoint.checkpoint import Checkpoint
    from reference.model.deepseek_vl import DeepSeekVL

RUNG = "layers"
RunLayers = Callable[..., dict[str, np.ndarray]]  # docs/how-to/add-a-backend.md has its arguments
OUTPUTS, COMPONENTS = "outputs", "components"  # tables of the files: of layers, and of whole components
INPUTS = "layers/inputs/inputs.safetensors"
ARTIFACTS = (".onnx", Path(SPECIFICATION).name)  # how files that hold a program end


def outputs_file(precision: str) -> str:
    return f"layers/{precision}/outputs.safetensors"


def record_inputs(source: Checkpoint, embedding_file: Path, golden: Path, file: Path) -> None:
    """Write what layers are handed, and what the fp32 reference's layers make of it."""
    import torch

    from reference.goldens.layers import record_layer_inputs
    from reference.session import reference_chain
    from runtimes.goldens.golden import load_golden

    model = source.model()
    chain = reference_chain(source, embedding_file, model)
    given = record_layer_inputs(source, model, chain, load_golden(golden))
    tables = {"inputs": given.inputs, "taps": given.taps}
    save_tables(file, source.digest, {**tables, **_outputs(model, source, given, torch.float32)})


def record_outputs(weights: QuantizedWeights, inputs: Path, file: Path) -> None:
    """Write what the layers of a precision make of the recorded inputs."""
    from calibration.planned_model import planned_model
    from reference.trace import PRECISION_DTYPES

    source, plan = weights.source, weights.plan
    given, _ = _read_inputs(inputs, source.digest)
    base = PRECISION_DTYPES[plan.base]
    save_tables(file, source.digest, _outputs(planned_model(weights), source, given, base, plan.kv_cache))


def _outputs(
    model: DeepSeekVL, source: Checkpoint, given: LayerInputs, base: torch.dtype, kv_cache: str = "float"
) -> dict[str, Table]:
    """What a model's layers and whole components make of the inputs."""
    from reference.goldens.layers import component_outputs, layer_outputs

    return {
        OUTPUTS: layer_outputs(model, source.config, given, base, kv_cache),
        COMPONENTS: component_outputs(model, source.config, given, base),
    }


def _read_inputs(file: Path, checkpoint: str) -> tuple[LayerInputs, dict[str, Table]]:
    """The inputs, and what the fp32 reference makes of them."""
    tables = load_tables(file, checkpoint)
    return LayerInputs(checkpoint, tables["inputs"], tables["taps"]), tables


def judge_layers(
    bundle: Bundle,
    chain: Chain,
    base: Tolerance,
    result: ParityResult,
    options: SessionOptions,
    on_step: Callable[[str, int, int], None],
) -> None:
    """Fill the rung of the layers; where they cannot be judged, it says why. The chain loses its sessions.

    Where a backend does not run single layers, components are judged as a whole; the stage ``long_context``
    judges the decoder like that.

    Args:
        base: tolerance of what is not quantized.
    """
    rung, manifest = result.rung(RUNG), bundle.manifest
    path = outputs_file(result.precision)
    if INPUTS not in manifest.files or (path not in manifest.files and result.precision != "fp32"):
        rung.detail = "the bundle has no layer goldens"
        return
    digest = manifest.checkpoint["sha256"]
    bundle.check([path for path in (INPUTS, path) if path in manifest.files])
    given, exact = _read_inputs(bundle.path(INPUTS), digest)
    expected = load_tables(bundle.path(path), digest) if path in manifest.files else exact
    try:
        run, reason = _layer_runner(result)
        if run is None:
            _judge_components(chain, given, expected[COMPONENTS], exact[COMPONENTS], base, result)
            rung.detail = rung.detail or f"components as a whole: {reason}"
        else:
            tables = (expected[OUTPUTS], exact[OUTPUTS])
            _judge_each(bundle, chain, run, given, *tables, base, result, options, on_step)
    except KeyError as error:
        raise UserError(
            f"The layer goldens of {bundle.folder} do not fit its contracts: {error} is missing;"
            " export it again."
        ) from error


def _layer_runner(result: ParityResult) -> tuple[RunLayers | None, str]:
    """What runs single layers of a backend; None with the reason where they cannot be run here."""
    try:
        run = getattr(load_compiler(result.backend), "run_layers", None)
    except UserError as error:
        return None, str(error).rstrip(".")
    simulated = result.execution.kind == "simulated" or result.backend in ("onnxruntime", "coreml")
    if run is None or not simulated:
        return None, f"layers of {result.backend} cannot be run one by one here"
    return run, ""


def _judge_components(
    chain: Chain, given: LayerInputs, expected: Table, exact: Table, base: Tolerance, result: ParityResult
) -> None:
    """Judge components as a whole: each is given the recorded inputs."""
    rung, tolerance = result.rung(RUNG), result.tolerance
    assert tolerance
    for component in STATELESS:
        session = getattr(chain, component)
        inputs = {
            spec.name: given.inputs[component][spec.name].astype(spec.dtype)
            for spec in session.contract.inputs
        }
        found = session.run(inputs)
        for name, array in expected[component].items():
            noise = relative_rms(array, exact[component][name])
            failed = rung.state == "failed"
            what = f"{component}: {name}"
            rung.compare(0, what, sample_rows(found[name]), array, tolerance.plan_bound(base, noise), noise)
            if rung.state == "failed" and not failed:
                rung.detail = f"{what} is not what the precision plan computes on the recorded input"


def _judge_each(
    bundle: Bundle,
    chain: Chain,
    run: RunLayers,
    given: LayerInputs,
    expected: Table,
    exact: Table,
    base: Tolerance,
    result: ParityResult,
    options: SessionOptions,
    on_step: Callable[[str, int, int], None],
) -> None:
    """Judge layers one by one; where one cannot be cut out of its file, the rung says why."""
    rung, contracts = result.rung(RUNG), bundle.manifest.contracts[result.precision]
    skipped: list[str] = []
    for component in TAPPED_COMPONENTS:
        on_step(f"layers of the {component}", 0, 1)
        setattr(chain, component, None)
        files = bundle.artifact(component, result.backend, result.precision).files
        for artifact in (bundle.path(file) for file in files if file.endswith(ARTIFACTS)):
            try:
                found = _run_layers(bundle, run, artifact, contracts[component], given, options)
            except (UserError, OSError) as error:
                skipped.append(f"no build of single layers: {str(error).rstrip('.')}")
                continue
            with np.errstate(invalid="ignore", over="ignore"):  # what overflows fails by itself
                for name, array in expected[component].items():
                    _judge(f"{component}: {name}", found[name], array, exact[component][name], base, rung)
    if skipped and rung.state != "failed":
        rung.state, rung.detail = "not run", skipped[0]


def _judge(
    name: str, found: np.ndarray, expected: np.ndarray, exact: np.ndarray, base: Tolerance, rung: Rung
) -> None:
    """Judge one layer; the first that fails stands in the detail."""
    noise = relative_rms(expected, exact)
    bound, of_rows = base.layer_bounds(noise)
    failed = rung.state == "failed"
    rung.compare(0, name, found, expected, bound, noise)
    if found.shape == expected.shape and median_row_error(found, expected) > of_rows:
        rung.fail("in most rows")
    if rung.state == "failed" and not failed:
        rung.detail = f"{name} is wrong on its recorded input" + (f" ({rung.detail})" if rung.detail else "")


def median_row_error(found: np.ndarray, expected: np.ndarray) -> float:
    """RMS error of the median row of ``[rows, C]``, relative to the RMS of all."""
    errors = np.sqrt(np.mean(np.square(found.astype(np.float64) - expected), axis=-1))
    size = np.sqrt(np.mean(np.square(expected.astype(np.float64))))
    return float(np.median(errors) / max(float(size), 1e-30))


def _run_layers(
    bundle: Bundle,
    run: RunLayers,
    artifact: Path,
    contract: Contract,
    given: LayerInputs,
    options: SessionOptions,
) -> dict[str, np.ndarray]:
    """Sampled taps of an artifact whose layers are handed the recorded ones."""
    component = contract.component
    inputs = dict(given.inputs[component])
    if contract.states:
        count = inputs["inputs_embeds"].shape[1]
        sizes = {"batch": 1, "capacity": count}
        inputs["positions"] = np.arange(count)[None]
        inputs["logit_rows"] = np.arange(count)
        inputs |= {spec.name: spec.allocate(sizes) for spec in contract.states}
    with debug_folder(bundle) as folder:
        found = run(artifact, contract, inputs, given.taps[component], Path(folder), options)
    return {spec.name: sample_rows(found[spec.name]) for spec in contract.taps}
