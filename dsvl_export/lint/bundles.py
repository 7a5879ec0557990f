"""Lint ONNX files and bundles, and choose the rules for each file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dsvl_export.lint import Finding, Release, lint
from dsvl_export.lint.quantization import quantization_findings
from dsvl_export.lint.view import GraphView
from dsvl_export.targets.options import CompileOptions, TensorRTOptions
from dsvl_export.targets.targets import find_target, load_targets
from runtimes.backends.onnxruntime import ORT
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.manifest import Artifact
from runtimes.errors import UserError


def lint_path(
    path: Path, tensorrt: str | None = None, target: str | None = None, sm: int | None = None
) -> dict[Path, list[Finding]]:
    """Lint an ONNX file, or every ONNX file of a bundle.

    A bundle's file that is not for TensorRT has the single finding ``not checked``; without a
    version, target or GPU, the rules of quantization are checked on ONNX files for ONNX Runtime.

    Args:
        path: an ONNX file or a bundle.
        tensorrt: version of TensorRT; None is the target's, or the one that the bundle's file is
            for.
        target: name of the target device; None leaves it open.
        sm: compute capability, as in 87; None is the target's, or the one that the bundle's file is
            for.

    Returns:
        Findings for each file.

    Raises:
        UserError: there is nothing to check, the version or target does not exist, or the target
            has no TensorRT.
    """
    device = find_target(target) if target else None
    if device and not device.tensorrt:
        fitting = ", ".join(name for name, each in load_targets().items() if each.tensorrt)
        raise UserError(
            f"lint checks files for TensorRT, which {device.device} does not have; give one of {fitting}."
        )
    options = CompileOptions(device, tensorrt=TensorRTOptions(tensorrt))
    release = Release(options.tensorrt_version(), sm or (device.sm if device else None))
    if not path.is_dir():
        return {path: lint(path, release)}
    bundle = Bundle.open(path)
    is_chosen = bool(tensorrt or target or sm)
    findings = {
        bundle.path(file): _of_file(bundle, item, file, release, is_chosen)
        for item in bundle.manifest.artifacts
        for file in item.files
        if file.endswith(".onnx") or file == item.files[0]
    }
    if not findings:
        raise UserError(f"The bundle {path} has no artifacts to check.")
    return findings


def summarize_findings(found: Mapping[Path, Sequence[Finding]]) -> str:
    """Summarize the findings of all files in one sentence; unchecked files do not count as good."""
    checked = [findings for findings in found.values() if all(finding.checked for finding in findings)]
    broken = sum(any(finding.harmful for finding in findings) for findings in checked)
    missing = len(found) - len(checked)
    if not checked:
        return f"Nothing was checked: none of {len(found)} files is for TensorRT."
    if broken:
        summary = f"{broken} of {len(checked)} files break a rule"
    else:
        summary = f"{'' if missing else 'All '}{len(checked)} files keep the rules"
    return f"{summary}, {missing} more were not checked." if missing else f"{summary}."


def _of_file(bundle: Bundle, item: Artifact, name: str, release: Release, is_chosen: bool) -> list[Finding]:
    file = bundle.path(name)
    if not item.dialect.startswith("trt"):
        if item.dialect == ORT and not is_chosen:
            return list(quantization_findings(GraphView(file)))
        return [_not_checked(item)]
    if is_chosen:
        return lint(file, release)
    if item.backend == "tensorrt_rtx":
        return lint(file, Release.tensorrt_rtx(min(item.engine.sm) if item.engine else None))
    device = load_targets().get(item.target)
    return lint(
        file,
        Release(
            CompileOptions(device, tensorrt=TensorRTOptions(item.tools.get("for"))).tensorrt_version(),
            device.sm if device else None,
        ),
    )


def _not_checked(item: Artifact) -> Finding:
    return Finding(
        "the file",
        "not-checked",
        "not checked",
        f"it is for {item.backend}, not for TensorRT",
        "export it with --backend tensorrt to have it checked",
    )
