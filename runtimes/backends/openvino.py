"""Backend ``openvino``: IR files (``.xml``, ``.bin``) in OpenVINO, on a CPU, Intel GPU or NPU."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtimes.backends.openvino_cache import GrowingCache
from runtimes.backends.openvino_fixed import FixedShapeComponent, FixedShapeDecoder
from runtimes.backends.openvino_requests import Request, reason
from runtimes.bundle.contracts import Contract, appended_state
from runtimes.cache import KVCache
from runtimes.decode_call import UNLIMITED, validated_call
from runtimes.errors import UserError
from runtimes.installation import install_command
from runtimes.session import ComponentSession, DecoderSession, Execution, SessionOptions

if TYPE_CHECKING:
    from runtimes.bundle.manifest import Artifact

DIALECT = "openvino"
CPU, GPU, NPU = "cpu", "gpu", "npu"
FIXED_SHAPE_DEVICES: tuple[str, ...] = (NPU,)  # devices whose compilers need fixed shapes
# Key of the model's ``rt_info``: OpenVINO's name of the type in which floats are computed.
INFERENCE_PRECISION = ["dsvl_export", "inference_precision"]
FLOAT32, FLOAT16, BFLOAT16 = "f32", "f16", "bf16"
CAPABILITIES = {FLOAT32: "FP32", FLOAT16: "FP16", BFLOAT16: "BF16"}  # of devices
BASE_OF = {FLOAT32: "fp32", FLOAT16: "fp16", BFLOAT16: "bf16"}
CONCURRENT = True  # sessions may run at the same time in different threads


def _import() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise UserError(
            f"The backend openvino is not installed; run: {install_command('openvino')}."
        ) from error
    return openvino


@cache
def _core() -> Any:
    return _import().Core()


def devices() -> list[str]:
    """List the devices that this machine supports; see ``Backend.devices``."""
    available = {name.partition(".")[0].lower() for name in _core().available_devices}
    return [device for device in (CPU, GPU, NPU) if device in available]


def execution(artifact: Artifact, device: str | None = None) -> Execution:
    """Determine whether an artifact can run here; see ``Backend.execution``."""
    device = device or CPU
    problem = ""
    try:
        available = devices()
        if device in available:
            problem = _base_problem(artifact.base, device)
    except UserError as error:
        return Execution("not run", str(error).rstrip("."))
    except RuntimeError as error:
        return Execution("not run", f"OpenVINO does not start: {reason(error)}")
    if artifact.dialect != DIALECT:
        return Execution("not run", f"its dialect is {artifact.dialect}, but this release runs {DIALECT}")
    if device not in available:
        return Execution("not run", f"OpenVINO finds no {device} here, only {', '.join(available)}")
    if newer := _release_problem(artifact, release()):
        return Execution("not run", newer)
    if problem:
        return Execution("not run", problem)
    return Execution("ran", f"{device} with openvino {release()}", device=device)


def release() -> str:
    """Return the version of the installed OpenVINO, such as ``2026.4.1``.

    Raises:
        UserError: it is not installed.
    """
    return str(_import().__version__).partition("-")[0]


def _release_problem(artifact: Artifact, installed: str) -> str:
    """Explain why this release cannot read an IR; empty if it can: older IRs are always read."""
    built = artifact.tools.get("openvino", "0")
    if _parts(built)[:2] > _parts(installed)[:2]:
        return f"it was built by OpenVINO {built}, but {installed} is installed; run: pip install -U openvino"
    return ""


def _parts(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]


def _computes(device: str, element: str) -> bool:
    """Return whether a device computes in f32, f16 or bf16."""
    return CAPABILITIES[element] in _core().get_property(device.upper(), "OPTIMIZATION_CAPABILITIES")


def _base_problem(base: str, device: str) -> str:
    """Explain why a device cannot compute a precision with a base; empty if it can.

    Files with the base fp16 can be computed in f32 as well.
    """
    usable = [
        name
        for element, name in BASE_OF.items()
        if _computes(device, element) or (element == FLOAT16 and _computes(device, FLOAT32))
    ]
    if base in usable:
        return ""
    return f"this {device} does not compute in {base}; use a precision with the base {' or '.join(usable)}"


def open_component(file: Path, contract: Contract, options: SessionOptions) -> ComponentSession:
    """Open a component; see ``Backend.open_component``."""
    if (options.device or CPU) in FIXED_SHAPE_DEVICES:
        return FixedShapeComponent(partial(compile_file, file, contract, options), contract)
    return OpenVinoComponent(compile_file(file, contract, options), contract)


def open_decoder(file: Path, contract: Contract, options: SessionOptions) -> DecoderSession:
    """Open the decoder; see ``Backend.open_decoder``."""
    if (options.device or CPU) in FIXED_SHAPE_DEVICES:
        return FixedShapeDecoder(partial(compile_file, file, contract, options), contract)
    return OpenVinoDecoder(compile_file(file, contract, options), contract)


def compile_file(
    file: Path, contract: Contract, options: SessionOptions, sizes: Mapping[str, int] | None = None
) -> Any:
    """Read an IR and compile it for a device, which computes floats in the type of the file.

    A device that computes in f32, but not in f16, computes files of f16 in f32.

    Args:
        file: the ``.xml`` file.
        contract: the component's contract.
        options: of the session.
        sizes: sizes of the named dimensions, for devices that need fixed shapes.

    Raises:
        UserError: the file or the device cannot be used.
    """
    core, device = _core(), options.device or CPU
    if device not in devices():
        raise UserError(f"OpenVINO finds no {device} here, only {', '.join(devices())}; choose one of them.")
    specs = {spec.name: spec for spec in (*contract.inputs, *contract.states)}
    try:
        model = core.read_model(file)
        element = model.get_rt_info(INFERENCE_PRECISION).astype(str)
        if {port.any_name for port in model.inputs} != specs.keys():
            raise UserError(f"The inputs of {file} differ from its contract; export it again.")
        if problem := _base_problem(BASE_OF[element], device):
            raise UserError(f"{file} cannot run: {problem}.")
        if element == FLOAT16 and not _computes(device, element):
            element = FLOAT32
        # By default, OpenVINO computes everything in the fastest type of the device.
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": element}
        if "DYNAMIC_QUANTIZATION_GROUP_SIZE" in core.get_property(device.upper(), "SUPPORTED_PROPERTIES"):
            settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "0"  # activations stay floats
        if device == CPU and options.threads:
            settings["INFERENCE_NUM_THREADS"] = str(options.threads)
        if sizes is not None:
            model.reshape({name: spec.sized(sizes) for name, spec in specs.items()})
        return core.compile_model(model, device.upper(), settings)
    except (RuntimeError, KeyError) as error:
        raise UserError(f"OpenVINO cannot load {file}: {reason(error)}.") from error


class OpenVinoComponent:
    """Session of a stateless component in OpenVINO."""

    def __init__(self, compiled: Any, contract: Contract) -> None:
        """Run a ``CompiledModel`` under its contract."""
        self.contract, self._request = contract, Request(compiled, contract)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute the outputs by name; see ``ComponentSession.run``."""
        for spec in self.contract.inputs:
            spec.check(inputs[spec.name])
        arrays = {spec.name: np.ascontiguousarray(inputs[spec.name]) for spec in self.contract.inputs}
        self._request.infer(arrays)
        return self._request.outputs()


class OpenVinoDecoder:
    """Session of the decoder in OpenVINO.

    The graph reads the cache and returns the new rows of a step, which are copied into it.
    """

    max_logit_rows = max_batch = UNLIMITED

    def __init__(self, compiled: Any, contract: Contract) -> None:
        """Run a ``CompiledModel`` under its contract."""
        self.contract, self._request = contract, Request(compiled, contract)
        self.tapped: Mapping[str, np.ndarray] = {}

    def new_cache(self, batch: int, capacity: int) -> GrowingCache:
        """Create an empty cache."""
        return GrowingCache(self.contract.states, batch, capacity)

    def decode(self, inputs_embeds: np.ndarray, logit_rows: np.ndarray, cache: KVCache) -> np.ndarray:
        """Append tokens to the cache and compute logits; see ``DecoderSession.decode``."""
        embeds = np.ascontiguousarray(inputs_embeds)
        with validated_call(self.contract, GrowingCache, embeds, logit_rows, cache) as (
            own, rows, positions,
        ):  # fmt: skip
            tensors = dict(
                zip((spec.name for spec in self.contract.inputs), (embeds, positions, rows), strict=True)
            )
            states = zip(self.contract.states, own.states(begins=not positions[0, 0]), strict=True)
            self._request.infer(tensors | {spec.name: array for spec, array in states})
            new = [self._request.output(appended_state(spec)) for spec in self.contract.states]
            own.write(new, positions)
            outputs = self._request.outputs()
        logits = outputs.pop("logits")
        self.tapped = outputs
        return logits
