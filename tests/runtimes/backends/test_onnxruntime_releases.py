"""Which ONNX Runtime a file needs: what old releases would compute wrongly or not load is refused by name."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from runtimes.backends import onnxruntime, onnxruntime_releases
from runtimes.backends.engines import backend as engines
from runtimes.backends.onnxruntime_releases import (
    FEATURES,
    NEEDED,
    OLDEST,
    release_for_artifact,
    release_for_precision,
    upgrade_message,
    version_numbers,
)
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.files import write_json
from runtimes.bundle.manifest import Artifact
from runtimes.errors import UserError
from runtimes.pipeline import Pipeline


def artifact(precision: str, dialect: str = "ort", base: str = "fp32", **tools: str) -> Artifact:
    files = ("onnxruntime/x/decoder/decoder.onnx",)
    return Artifact("decoder", "onnxruntime", precision, "cpu", dialect, files, tools, base=base)


def install(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    monkeypatch.setattr(onnxruntime, "release", lambda: release)


def test_releases_are_compared_by_number() -> None:
    assert (
        version_numbers("1.9.1")
        < version_numbers("1.23")
        == version_numbers("1.23.2")
        < version_numbers("1.24.0.dev20251001")
    )
    assert upgrade_message("1.30", "1.30.0") == upgrade_message("1.23", "1.32.0") == ""


def test_the_sentence_has_both_releases_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 11, 7))
    monkeypatch.setattr(onnxruntime_releases, "installed_package", lambda: "onnxruntime-gpu")
    needs = "it needs ONNX Runtime 1.27 or later, but 1.23.2 is installed; run: pip install 'onnxruntime-gpu>=1.27'"
    assert upgrade_message("1.27", "1.23.2") == needs
    monkeypatch.setattr(sys, "version_info", (3, 10, 12))
    assert upgrade_message("1.27", "1.23.2") == f"{needs} under Python 3.11 or later"


@pytest.mark.parametrize(
    ("found", "release"),
    [
        (artifact("int8", **{NEEDED: "1.23"}), "1.23"),
        (artifact("mine", **{NEEDED: "1.32"}), "1.32"),
        # As 0.4 wrote them.
        (artifact("fp32"), "1.23"),
        (artifact("int4"), "1.23"),
        (artifact("int8"), "1.24"),
        (artifact("8da4w-g128", "ort_tokens"), "1.24"),
        (artifact("kv-int8"), "1.27"),
        (artifact("fp8"), "1.32"),
        (artifact("int8-fp16", base="fp16"), "1.30"),
        (artifact("int8-fp16", "trt10", "fp16"), "1.30"),
        (artifact("fp16", "trt11", "fp16"), "1.26"),
        (artifact("fp8-fp16", "trt11", "fp16"), "1.26"),
    ],
)
def test_the_release_of_an_artifact(found: Artifact, release: str) -> None:
    assert release_for_artifact(found) == release


@pytest.mark.parametrize("text", ["", "new", "1", "1.2.3.4", "9" * 5000, "1.3x"])
def test_a_release_that_is_none(text: str) -> None:
    with pytest.raises(
        UserError,
        match=r"The manifest's onnxruntime_needed of onnxruntime/x/decoder/decoder.onnx is not a version",
    ):
        release_for_artifact(artifact("int8", **{NEEDED: text}))


def test_an_old_release_is_refused_before_a_file_is_opened(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_bundle.folder, tmp_path / "b"))
    manifest = Bundle.open(folder).manifest
    marked = tuple(replace(item, tools={**item.tools, NEEDED: "1.31"}) for item in manifest.artifacts)
    write_json(folder / "manifest.json", replace(manifest, artifacts=marked).to_dict())
    install(monkeypatch, "1.30.1")
    with pytest.raises(
        UserError,
        match=r"onnxruntime fp32 of .* cannot run here: it needs ONNX Runtime 1\.31 or later, but 1\.30\.1 is installed; run: pip install 'onnxruntime>=1\.31'",
    ):
        Pipeline.open(folder, precision="fp32")
    install(monkeypatch, "1.31.0")
    Pipeline.open(folder, precision="fp32")


def test_a_simulator_is_named_with_its_release_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_gpu", lambda: (None, "there is no GPU"))
    monkeypatch.setattr(engines, "DRIVER_FILES", ())
    file = artifact("int8-fp16", "trt10", "fp16", **{NEEDED: FEATURES["float16-quantize"].since})
    install(monkeypatch, "1.32.0")
    assert str(engines.execution("tensorrt", file)) == "simulated by ONNX Runtime 1.32.0 on the same file"
    install(monkeypatch, "1.29.0")
    found = engines.execution("tensorrt", file)
    assert found.kind == "not run"
    assert found.by.startswith(
        "without a GPU it needs ONNX Runtime 1.30 or later, but 1.29.0 is installed; run: pip"
    )


def test_the_release_of_a_precision_by_name() -> None:
    names = {"fp32": "1.23", "8da4w": "1.23", "int8": "1.23", "kv-int8": "1.27", "int8-fp16": "1.30",
             "int8-int4-fp16": "1.30", "int4-fp16": "1.23", "fp8": "1.32"}  # fmt: skip
    assert {name: release_for_precision(name) for name in names} == names


def test_the_table_keeps_to_what_the_package_takes() -> None:
    for feature in FEATURES.values():
        assert version_numbers(feature.since) > version_numbers(OLDEST)
        assert feature.link.startswith("https://")
