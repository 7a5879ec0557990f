"""The stage ``layers``: each layer by itself, compared with the same layer of the precision plan.

A layer gets the recorded tap before it as input. The quantization error is in both results, so that
the bound covers only the rounding of one layer, and the layer that fails is the faulty one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from runtimes.bundle.manifest import Artifact
from runtimes.bundle.mixes import device_of
from runtimes.chain import Chain
from runtimes.errors import UserError
from runtimes.execution import component_executions
from runtimes.goldens.golden import load_golden, relative_rms
from runtimes.goldens.layers import (
    STATELESS,
    LayerInputs,
    Table,
    load_tables,
    sample_rows,
    save_tables,
)
from runtimes.session import Execution, SessionOptions

if TYPE_CHECKING:
    import torch

    from calibration.quantized_weights import QuantizedWeights
    from reference.checkpoint.checkpoint import Checkpoint
    from reference.model.deepseek_vl import DeepSeekVL

STAGE = "layers"
OUTPUTS, COMPONENTS = "outputs", "components"  # tables of the files: of layers, and of components
INPUTS = "layers/inputs/inputs.safetensors"
SEPARABLE = ("onnxruntime", "openvino", "coreml")  # backends that run the files of single layers
PROGRAMS = (".onnx", ".xml", Path(SPECIFICATION).name)  # endings of files that hold a program


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
    result: ParityResult,
    threads: int | None,
    on_step: Callable[[str, int, int], None],
) -> None:
    """Fill in the stage ``layers``; its detail says why if the layers cannot be judged.

    If a backend cannot run single layers, its components are judged as a whole; the stage
    ``long_context`` does this for the decoder. The chain closes its sessions.

    Args:
        bundle: the bundle that is judged.
        chain: the sessions that are judged.
        result: the result to fill in.
        threads: number of CPU threads of the sessions of single layers.
        on_step: called with the name of the step, the parts done and all parts.

    Raises:
        UserError: the layer goldens are damaged or do not fit the contracts.
    """
    stage, manifest = result.stage(STAGE), bundle.manifest
    artifacts = bundle.artifacts(result.backend, result.precision)
    precisions = {item.precision for item in artifacts.values()} - {"fp32"}
    paths = {precision: outputs_file(precision) for precision in precisions}
    if not manifest.files.keys() >= {INPUTS, *paths.values()}:
        stage.detail = "the bundle has no layer goldens"
        return
    digest = manifest.checkpoint["sha256"]
    bundle.check({INPUTS, *paths.values()})
    inputs, exact = _read_inputs(bundle.path(INPUTS), digest)
    planned = {precision: load_tables(bundle.path(path), digest) for precision, path in paths.items()}
    problems: list[str] = []
    runs = component_executions(bundle, result.backend, result.precision, result.execution.device)
    try:
        for component, artifact in artifacts.items():
            on_step(f"layers of the {component}", 0, 1)
            expected = planned.get(artifact.precision, exact)
            compiler, reason = _layer_compiler(artifact, runs[component])
            if compiler is None:
                stage.detail = stage.detail or f"components as a whole: {reason}"
                if component in STATELESS:
                    tables = (expected[COMPONENTS][component], exact[COMPONENTS][component])
                    _judge_component(chain, component, inputs, *tables, result)
            else:
                setattr(chain, component, None)
                tables = (expected[OUTPUTS][component], exact[OUTPUTS][component])
                options = SessionOptions(threads, device_of(result.execution.device, component))
                skipped = _judge_single_layers(bundle, artifact, compiler, inputs, *tables, result, options)
                problems += [skipped] if skipped else []
    except KeyError as error:
        raise UserError(
            f"The layer goldens of {bundle.folder} do not fit its contracts: {error} is missing;"
            " export it again."
        ) from error
    if problems and stage.state != "failed":
        stage.state, stage.detail = "not run", problems[0]


def _layer_compiler(artifact: Artifact, run: Execution) -> tuple[RunsLayers | None, str]:
    """Return the compiler that runs single layers of an artifact, or None and the reason."""
    backend = artifact.backend
    try:
        compiler = load_compiler(backend)
    except UserError as error:
        return None, str(error).rstrip(".")
    separable = run.kind == "simulated" or backend in SEPARABLE  # engines run as a whole
    if not isinstance(compiler, RunsLayers) or not separable:
        return None, f"layers of {backend} cannot be run one by one here"
    return compiler, ""


def _judge_component(
    chain: Chain,
    component: str,
    recorded: LayerInputs,
    expected: Mapping[str, np.ndarray],
    exact: Mapping[str, np.ndarray],
    result: ParityResult,
) -> None:
    """Judge a component as a whole, on its recorded inputs."""
    stage, session = result.stage(STAGE), getattr(chain, component)
    inputs = {
        spec.name: recorded.inputs[component][spec.name].astype(spec.dtype)
        for spec in session.contract.inputs
    }
    outputs = session.run(inputs)
    for name, array in expected.items():
        error = relative_rms(array, exact[name])
        failed = stage.state == "failed"
        tensor, actual = f"{component}: {name}", sample_rows(outputs[name])
        bound = result.tolerances[component].plan_bound(error)
        stage.compare(0, tensor, actual, array, bound, error)
        if stage.state == "failed" and not failed:
            stage.detail = f"{tensor} is not what the precision plan computes on the recorded input"


def _judge_single_layers(
    bundle: Bundle,
    artifact: Artifact,
    compiler: RunsLayers,
    recorded: LayerInputs,
    expected: Mapping[str, np.ndarray],
    exact: Mapping[str, np.ndarray],
    result: ParityResult,
    options: SessionOptions,
) -> str:
    """Judge layers one by one; return why if they cannot be cut out of a file, else nothing."""
    stage, component, problem = result.stage(STAGE), artifact.component, ""
    contract = bundle.manifest.contracts[artifact.precision][component]
    for file in (bundle.path(path) for path in artifact.files if path.endswith(PROGRAMS)):
        try:
            outputs = _run_layers(bundle, compiler, file, contract, recorded, options)
        except (UserError, OSError) as error:
            problem = problem or f"no build of single layers: {str(error).rstrip('.')}"
            continue
        base = result.tolerances[component].base
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity fail the stage
            for name, array in expected.items():
                _judge(f"{component}: {name}", outputs[name], array, exact[name], base, stage)
    return problem


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
