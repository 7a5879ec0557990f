"""Decoder sessions of every backend that runs here; the contract tests take each in turn."""

from __future__ import annotations

from functools import partial

import pytest

from reference.checkpoint.checkpoint import open_checkpoint
from reference.session import TorchDecoder
from reference.trace import component_contract
from runtimes.backends import openvino
from runtimes.backends.engines.session import EngineDecoder
from runtimes.backends.onnxruntime import OrtDeviceCache
from runtimes.backends.openvino_fixed import FixedShapeDecoder
from runtimes.backends.registry import load_backend
from runtimes.bundle.bundle import Bundle
from runtimes.session import DecoderSession, SessionOptions
from tests.runtimes.backends.fake_cuda import loaded

ENGINE_CAPACITY = 48
# What runs the decoder, and the ONNX dialect (or torch, or the device) and precision of its program.
SESSIONS = (
    "torch torch fp32",
    "onnxruntime ort fp32",
    "onnxruntime ort fp16",
    "onnxruntime-values ort fp32",
    "onnxruntime trt11 fp32",
    "onnxruntime trt11 fp16",
    "onnxruntime trt10 fp32",
    "engine-on-a-fake-gpu trt11 fp32",
    "engine-on-a-fake-gpu trt11 fp16",
    "engine-on-a-fake-gpu trt10 fp32",
    "coreml gpu fp16",
    "coreml ane fp16",
    "coreai cpu fp32",
    "executorch cpu fp32",
    "openvino cpu fp32",
    "openvino-fixed-shapes cpu fp32",
    pytest.param("gpu engines fp16", marks=pytest.mark.gpu),
    pytest.param("onnxruntime-cuda ort fp16", marks=pytest.mark.gpu),
)


@pytest.fixture(scope="session", params=SESSIONS)
def decoder(request: pytest.FixtureRequest, tiny_bundle: Bundle) -> DecoderSession:
    """The tiny decoder as a session."""
    runner, dialect, precision = request.param.split()
    if runner == "torch":
        checkpoint = open_checkpoint("tiny")
        contract = component_contract(checkpoint.config, "decoder", "fp32")
        return TorchDecoder(checkpoint.load_model().decoder, contract)
    if runner == "gpu":
        bundle: Bundle = request.getfixturevalue("engine_bundle")
        artifact = bundle.artifact("decoder", "tensorrt", precision)
        contract = bundle.manifest.contracts[precision]["decoder"]
        return load_backend("tensorrt").open_decoder(
            bundle.path(artifact.files[0]), contract, SessionOptions()
        )
    if runner == "openvino-fixed-shapes":  # the session of an NPU, on a CPU
        bundle = request.getfixturevalue("openvino_bundle")
        artifact = bundle.artifact("decoder", "openvino", precision)
        contract = bundle.manifest.contracts[precision]["decoder"]
        compile_for = partial(
            openvino.compile_file, bundle.path(artifact.files[0]), contract, SessionOptions()
        )
        return FixedShapeDecoder(compile_for, contract)
    if runner in ("coreml", "coreai", "executorch", "openvino"):
        kind = "apple" if runner in ("coreml", "coreai") else runner
        bundle = request.getfixturevalue(f"{kind}_bundle")
        artifact = bundle.artifact("decoder", runner, precision)
        contract = bundle.manifest.contracts[precision]["decoder"]
        options = SessionOptions(device=dialect)
        return load_backend(runner).open_decoder(bundle.path(artifact.files[0]), contract, options)
    bundle = tiny_bundle if dialect == "ort" else request.getfixturevalue(f"{dialect}_bundle")
    backend = "onnxruntime" if dialect == "ort" else "tensorrt"
    file = bundle.path(bundle.artifact("decoder", backend, precision).files[0])
    contract = bundle.manifest.contracts[precision]["decoder"]
    if runner.startswith("onnxruntime"):
        device = "cuda" if runner == "onnxruntime-cuda" else None
        if device and device not in load_backend("onnxruntime").devices():
            pytest.skip("this ONNX Runtime has no CUDA")
        opened = load_backend("onnxruntime").open_decoder(file, contract, SessionOptions(device=device))
        if runner == "onnxruntime-values":  # the cache that a GPU has, in the CPU's memory
            opened.new_cache = partial(OrtDeviceCache, contract.states, memory="cpu")  # type: ignore[method-assign]
        return opened
    return EngineDecoder(loaded(file, contract, ENGINE_CAPACITY), contract)
