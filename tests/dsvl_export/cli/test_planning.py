"""The commands ``doctor``, ``targets`` and ``plan``, and the known defects that ``export`` names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dsvl_export.targets.defects import Defect
from dsvl_export.targets.targets import find_target, measure_target
from runtimes.bundle.bundle import Bundle
from tests.dsvl_export.cli.command_line import refused


def test_doctor_and_targets(run, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("doctor")
    assert done.code == 0
    for text in ("onnxruntime", "yes: fp32, fp16", "This machine is ready.", "https://"):
        assert text in done.out
    assert json.loads(run("doctor", "--json").out)["healthy"]
    broken = {"executorch": "1.4.1", "torch": "2.12.0"}
    monkeypatch.setattr("dsvl_export.planning.doctor.package_versions", lambda: broken)
    monkeypatch.setattr("dsvl_export.planning.doctor.backend_names", lambda: ["executorch", "onnxruntime"])
    sick = run("doctor")
    assert sick.code == 1
    assert "Broken: executorch 1.4 needs torch 2.13" in sick.out
    listed = run("targets").out
    assert "jetson-agx-orin" in listed
    assert "204.8 GB/s" in listed
    assert json.loads(run("targets", "--json").out)["h100"]["sm"] == 90


def test_plan_command(run, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("plan", "tiny", "--precision", "fp32")
    assert done.code == 0
    assert "up to a context of 1024" in done.out
    machine = json.loads(run("plan", "tiny", "--precision", "fp32", "--context", "512", "--json").out)
    written = sum(
        tiny_bundle.manifest.files[path].bytes
        for item in tiny_bundle.manifest.artifacts
        if item.precision == "fp32"
        for path in item.files
    )
    assert machine["artifact_bytes"] == pytest.approx(written, rel=0.02)
    assert machine["exact"]
    phone = run("plan", "tiny", "--target", "android", "--precision", "int4")
    assert refused(phone, "The backend executorch cannot compute vision_encoder.")
    iphone = run("plan", "tiny", "--target", "iphone", "--backend", "coreml", "--precision", "palette4")
    assert "https://github.com/apple/coremltools/issues/2716" in iphone.out
    assert refused(
        run("plan", "tiny", "--target", "jetson-agx-orin", "--precision", "fp8"),
        "cannot run fp8 with tensorrt (FP8 needs SM 89, this is SM 87). The nearest precision is int8",
    )
    assert refused(run("plan", "tiny", "--context", "9999"), "the model has 1024 positions")
    assert refused(run("plan", "tiny", "--target", "toaster"), "There is no target 'toaster'")
    assert refused(run("plan", "/nowhere"), "The folder /nowhere does not exist")
    assert refused(run("plan", "tiny", "--text-tokens", "1000000"), "the model has only 1024 positions")
    small = replace(measure_target(find_target("cpu")), usable_gb=0.115)
    monkeypatch.setattr("dsvl_export.targets.targets.measure_target", lambda target: small)
    tight = run("plan", "tiny", "--precision", "fp32", "--context", "1024")
    assert tight.code == 1
    assert "no: the largest context that fits is" in tight.out


def test_export_warns_of_known_defects(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    defect = Defect(
        "x", "Answers are green.", "Wear glasses.", "https://example.org/1", backends=["onnxruntime"]
    )
    monkeypatch.setattr("dsvl_export.targets.defects.load_defects", lambda: (defect,))
    done = run("export", "tiny", "--output", tmp_path / "b", "--no-goldens")
    assert done.code == 0
    assert "Known defect: Answers are green. Wear glasses. (https://example.org/1)" in done.err
