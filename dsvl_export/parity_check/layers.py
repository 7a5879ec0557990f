"""The stage ``layers``: each layer by itself, compared with the same layer of the precision plan.

A layer gets the recorded tap before it as input. The quantization error is in both results, so that
the bound covers only the rounding of one layer, and the layer that fails is the faulty one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsvl_export.compilers.protocol import RunsLayers
from dsvl_export.compilers.registry import load_compiler
from dsvl_export.parity_check.localization import debug_folder
from dsvl_export.parity_check.result import ParityResult, StageResult
from dsvl_export.parity_check.tolerances import Tolerance
from runtimes.backends.mil.package import SPECIFICATION
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.contracts import Contract
from runtimes.chain import Chain
from runtimes.errors import UserError
from runtimes.goldens.golden import load_golden, relative_rms
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

STAGE = "layers"
OUTPUTS, COMPONENTS = "outputs", "components"  # tables of the files: of layers, and of components
INPUTS = "layers/inputs/inputs.safetensors"
SEPARABLE = ("onnxruntime", "openvino", "coreml")  # backends that run the files of single layers
ARTIFACTS = (".onnx", ".xml", Path(SPECIFICATION).name)  # endings of files that hold a program


def outputs_file(precision: str) -> str:
    """Return the path in a bundle of the layers' outputs in a precision."""
    return f"layers/{precision}/outputs.safetensors"


def record_inputs(source: Checkpoint, embedding_file: Path, golden: Path, file: Path) -> None:
    """Write the inputs of the layers, and the outputs of the fp32 reference's layers."""
    import torch

    from reference.goldens.layers import record_layer_inputs
    from reference.session import reference_chain

    model = source.load_model()
    chain = reference_chain(source, embedding_file, model)
    inputs = record_layer_inputs(source, model, chain, load_golden(golden))
    tables = {"inputs": inputs.inputs, "taps": inputs.taps}
    save_tables(file, source.digest, {**tables, **_outputs(model, source, inputs, torch.float32)})


def record_outputs(weights: QuantizedWeights, inputs: Path, file: Path) -> None:
    """Write the outputs of the layers of a precision plan for the recorded inputs."""
    from calibration.planned_model import planned_model
    from reference.trace import PRECISION_DTYPES

    source, plan = weights.source, weights.plan
    recorded, _ = _read_inputs(inputs, source.digest)
    base = PRECISION_DTYPES[plan.base]
    outputs = _outputs(planned_model(weights), source, recorded, base, plan.kv_cache)
    save_tables(file, source.digest, outputs)


def _outputs(
    model: DeepSeekVL, source: Checkpoint, inputs: LayerInputs, base: torch.dtype, kv_cache: str = "float"
) -> dict[str, Table]:
    """Compute the outputs of the layers and of the components of a model."""
    from reference.goldens.layers import component_outputs, layer_outputs

    return {
        OUTPUTS: layer_outputs(model, source.config, inputs, base, kv_cache),
        COMPONENTS: component_outputs(model, source.config, inputs, base),
    }


def _read_inputs(file: Path, checkpoint: str) -> tuple[LayerInputs, dict[str, Table]]:
    """Read the inputs, and all tables of the file, with the outputs of the fp32 reference."""
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
    """Fill in the stage ``layers``; its detail says why if the layers cannot be judged.

    If a backend cannot run single layers, components are judged as a whole; the stage
    ``long_context`` does this for the decoder. The chain closes its sessions.

    Args:
        bundle: the bundle that is judged.
        chain: the sessions that are judged.
        base: tolerance of the float precision that the precision is based on.
        result: the result to fill in.
        options: device and threads of the sessions of single layers.
        on_step: called with the name of the step, the parts done and all parts.

    Raises:
        UserError: the layer goldens are damaged or do not fit the contracts.
    """
    stage, manifest = result.stage(STAGE), bundle.manifest
    path = outputs_file(result.precision)
    if INPUTS not in manifest.files or (path not in manifest.files and result.precision != "fp32"):
        stage.detail = "the bundle has no layer goldens"
        return
    digest = manifest.checkpoint["sha256"]
    bundle.check([path for path in (INPUTS, path) if path in manifest.files])
    inputs, exact = _read_inputs(bundle.path(INPUTS), digest)
    expected = load_tables(bundle.path(path), digest) if path in manifest.files else exact
    try:
        compiler, reason = _layer_compiler(result)
        if compiler is None:
            _judge_components(chain, inputs, expected[COMPONENTS], exact[COMPONENTS], base, result)
            stage.detail = stage.detail or f"components as a whole: {reason}"
        else:
            tables = (expected[OUTPUTS], exact[OUTPUTS])
            _judge_single_layers(bundle, chain, compiler, inputs, *tables, base, result, options, on_step)
    except KeyError as error:
        raise UserError(
            f"The layer goldens of {bundle.folder} do not fit its contracts: {error} is missing;"
            " export it again."
        ) from error


def _layer_compiler(result: ParityResult) -> tuple[RunsLayers | None, str]:
    """Return the compiler that runs single layers of a backend, or None and the reason."""
    try:
        compiler = load_compiler(result.backend)
    except UserError as error:
        return None, str(error).rstrip(".")
    # Engines run as a whole.
    separable = result.execution.kind == "simulated" or result.backend in SEPARABLE
    if not isinstance(compiler, RunsLayers) or not separable:
        return None, f"layers of {result.backend} cannot be run one by one here"
    return compiler, ""


def _judge_components(
    chain: Chain,
    recorded: LayerInputs,
    expected: Table,
    exact: Table,
    base: Tolerance,
    result: ParityResult,
) -> None:
    """Judge components as a whole, on the recorded inputs."""
    stage, tolerance = result.stage(STAGE), result.tolerance
    assert tolerance
    for component in STATELESS:
        session = getattr(chain, component)
        inputs = {
            spec.name: recorded.inputs[component][spec.name].astype(spec.dtype)
            for spec in session.contract.inputs
        }
        outputs = session.run(inputs)
        for name, array in expected[component].items():
            error = relative_rms(array, exact[component][name])
            failed = stage.state == "failed"
            tensor, actual = f"{component}: {name}", sample_rows(outputs[name])
            stage.compare(0, tensor, actual, array, tolerance.plan_bound(base, error), error)
            if stage.state == "failed" and not failed:
                stage.detail = f"{tensor} is not what the precision plan computes on the recorded input"


def _judge_single_layers(
    bundle: Bundle,
    chain: Chain,
    compiler: RunsLayers,
    recorded: LayerInputs,
    expected: Table,
    exact: Table,
    base: Tolerance,
    result: ParityResult,
    options: SessionOptions,
    on_step: Callable[[str, int, int], None],
) -> None:
    """Judge layers one by one; the detail says why if one cannot be cut out of its file."""
    stage, contracts = result.stage(STAGE), bundle.manifest.contracts[result.precision]
    skipped: list[str] = []
    for component in TAPPED_COMPONENTS:
        on_step(f"layers of the {component}", 0, 1)
        setattr(chain, component, None)
        files = bundle.artifact(component, result.backend, result.precision).files
        for artifact in (bundle.path(file) for file in files if file.endswith(ARTIFACTS)):
            try:
                outputs = _run_layers(bundle, compiler, artifact, contracts[component], recorded, options)
            except (UserError, OSError) as error:
                skipped.append(f"no build of single layers: {str(error).rstrip('.')}")
                continue
            with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity fail the stage
                for name, array in expected[component].items():
                    _judge(f"{component}: {name}", outputs[name], array, exact[component][name], base, stage)
    if skipped and stage.state != "failed":
        stage.state, stage.detail = "not run", skipped[0]


def _judge(
    name: str,
    actual: np.ndarray,
    expected: np.ndarray,
    exact: np.ndarray,
    base: Tolerance,
    stage: StageResult,
) -> None:
    """Judge one layer; the detail names the first layer that fails."""
    error = relative_rms(expected, exact)
    bound, row_bound = base.layer_bounds(error)
    failed = stage.state == "failed"
    stage.compare(0, name, actual, expected, bound, error)
    if actual.shape == expected.shape and median_row_error(actual, expected) > row_bound:
        stage.fail("in most rows")
    if stage.state == "failed" and not failed:
        stage.detail = f"{name} is wrong on its recorded input" + (
            f" ({stage.detail})" if stage.detail else ""
        )


def median_row_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the RMS error of the median row of ``[rows, C]``, relative to the RMS of all rows."""
    errors = np.sqrt(np.mean(np.square(actual.astype(np.float64) - expected), axis=-1))
    size = np.sqrt(np.mean(np.square(expected.astype(np.float64))))
    return float(np.median(errors) / max(float(size), 1e-30))


def _run_layers(
    bundle: Bundle,
    compiler: RunsLayers,
    artifact: Path,
    contract: Contract,
    recorded: LayerInputs,
    options: SessionOptions,
) -> dict[str, np.ndarray]:
    """Run the layers of an artifact on the recorded taps; return sampled rows of their outputs."""
    component = contract.component
    inputs = dict(recorded.inputs[component])
    if contract.states:
        count = inputs["inputs_embeds"].shape[1]
        sizes = {"batch": 1, "capacity": count}
        inputs["positions"] = np.arange(count)[None]
        inputs["logit_rows"] = np.arange(count)
        inputs |= {spec.name: spec.allocate(sizes) for spec in contract.states}
    with debug_folder(bundle) as folder:
        taps = recorded.taps[component]
        outputs = compiler.run_layers(artifact, contract, inputs, taps, Path(folder), options)
    return {spec.name: sample_rows(outputs[spec.name]) for spec in contract.taps}
