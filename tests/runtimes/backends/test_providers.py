"""Execution providers of ONNX Runtime: asked for, there, and never replaced by the CPU without a word."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from runtimes.backends import onnxruntime as backend
from runtimes.bundle.bundle import Bundle
from runtimes.errors import UserError
from runtimes.pipeline import Pipeline
from runtimes.session import SessionOptions

ALL = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]


class FakeRuntime(SimpleNamespace):
    """An onnxruntime-gpu whose GPU providers start, or do not; either way the CPU computes."""

    def __init__(self, starts: bool) -> None:
        super().__init__(
            **{name: getattr(onnxruntime, name) for name in ("SessionOptions", "OrtValue", "__version__")}
        )
        self.starts, self.asked = starts, []
        self.preloaded = 0

    def get_available_providers(self) -> list[str]:
        return ALL

    def preload_dlls(self) -> None:
        self.preloaded += 1

    def InferenceSession(self, file: str, settings: Any, providers: list[str]) -> Any:
        self.asked.append(providers)
        session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
        if self.starts:
            session.get_providers = lambda: [*providers, "CPUExecutionProvider"]  # type: ignore[method-assign]
        return session


def opened(bundle: Bundle, device: str | None) -> Any:
    file = bundle.path(bundle.artifact("decoder", "onnxruntime", "fp32").files[0])
    return backend.open_decoder(
        file, bundle.manifest.contracts["fp32"]["decoder"], SessionOptions(device=device)
    )


@pytest.mark.parametrize(
    ("device", "providers"),
    [(None, ALL[2:]), ("cpu", ALL[2:]), ("cuda", ALL[1:2]), ("tensorrt", ALL[:2])],
)
def test_providers_of_a_device(
    tiny_bundle: Bundle, device: str | None, providers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = FakeRuntime(starts=True)
    monkeypatch.setattr(backend, "_import", lambda: runtime)
    session = opened(tiny_bundle, device)
    assert runtime.asked == [providers]
    assert runtime.preloaded == (device in ("cuda", "tensorrt"))
    assert session._memory == ("cuda" if device in ("cuda", "tensorrt") else "cpu")


def test_a_step_copies_no_device_cache(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arrays are copies of the whole cache; a decode step must not ask for them."""
    session = opened(tiny_bundle, None)
    cache = backend.OrtDeviceCache(session.contract.states, 1, 8, "cpu")
    width = int(session.contract.inputs[0].shape[2])

    def copied(self: object) -> None:
        raise AssertionError("the cache was copied")

    monkeypatch.setattr(backend.OrtDeviceCache, "arrays", property(copied))
    for _ in range(3):
        session.decode(np.ones((1, 1, width), np.float32), np.array([0]), cache)
    assert cache.length == 3


def test_a_silent_fallback_is_refused(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_import", lambda: FakeRuntime(starts=False))
    with pytest.raises(
        UserError,
        match="could not start CUDAExecutionProvider and fell back to CPUExecutionProvider; fix CUDA",
    ):
        opened(tiny_bundle, "cuda")


def test_a_missing_provider_names_the_extra(tiny_bundle: Bundle) -> None:
    with pytest.raises(
        UserError,
        match=r"cannot run on 'cuda'; it has .*CPUExecutionProvider; run: pip uninstall onnxruntime, pip install 'dsvl-export\[onnxruntime-gpu\]'",
    ):
        opened(tiny_bundle, "cuda")
    with pytest.raises(UserError, match=r"cannot run on 'npu'; it has .*CPUExecutionProvider\."):
        opened(tiny_bundle, "npu")
    with pytest.raises(UserError, match="cannot run here: this ONNX Runtime has no cuda, only cpu"):
        Pipeline.open(tiny_bundle, "onnxruntime", "fp32", device="cuda")


def test_executions(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = tiny_bundle.artifact("decoder", "onnxruntime", "fp32")
    assert str(backend.execution(artifact)).startswith("ran on cpu with onnxruntime")
    assert backend.execution(artifact, "cuda").kind == "not run"
    monkeypatch.setattr(backend, "_import", lambda: FakeRuntime(starts=True))
    assert backend.devices() == ["cpu", "cuda", "tensorrt"]
    ran = backend.execution(artifact, "cuda")
    assert (ran.kind, ran.device) == ("ran", "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_parity_on_a_gpu(tiny_bundle: Bundle, device: str) -> None:
    """fp16 through the provider itself, with the cache in the GPU's memory."""
    from dsvl_export.parity_check import parity

    if device not in backend.devices():
        pytest.skip(f"this ONNX Runtime has no {device}")
    result = parity(tiny_bundle, "onnxruntime", "fp16", device=device)
    assert result.execution.device == device
    assert result.passed, [stage for stage in result.stages if stage.state != "passed"]
