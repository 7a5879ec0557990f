"""Decoder sessions of every backend that runs here; the contract tests take each in turn."""

from __future__ import annotations

import pytest

from reference.checkpoint import open_checkpoint
from reference.session import TorchDecoder
from reference.trace import component_contract
from runtimes.backends import load_backend
from runtimes.bundle import Bundle
from runtimes.session import DecoderSession, SessionOptions

SESSIONS = ("torch fp32", "onnxruntime fp32", "onnxruntime fp16")


@pytest.fixture(scope="session", params=SESSIONS)
def decoder(request: pytest.FixtureRequest, tiny_bundle: Bundle) -> DecoderSession:
    """The tiny decoder as a session."""
    backend, precision = request.param.split()
    if backend == "torch":
        checkpoint = open_checkpoint("tiny")
        contract = component_contract(checkpoint.config, "decoder", "fp32")
        return TorchDecoder(checkpoint.model().decoder, contract)
    file = tiny_bundle.path(tiny_bundle.artifact("decoder", backend, precision).files[0])
    contract = tiny_bundle.manifest.contracts[precision]["decoder"]
    return load_backend(backend).open_decoder(file, contract, SessionOptions())
