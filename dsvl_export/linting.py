"""Linting of bundles and files: which rules hold for which file."""

from __future__ import annotations

from pathlib import Path

from dsvl_export.compilers import CompileOptions
from dsvl_export.compilers.tensorrt import tensorrt_version
from dsvl_export.linter import Finding, Release, lint
from dsvl_export.linter.quantization import quantization_findings
from dsvl_export.linter.view import GraphView
from dsvl_export.planner.targets import find_target, load_targets
from runtimes.bundle import Artifact, Bundle


def lint_path(
    path: Path, tensorrt: str | None = None, target: str | None = None, sm: int | None = None
) -> dict[Path, list[Finding]]:
    """Findings of an ONNX file, or of every ONNX file of a bundle.

    Args:
        tensorrt, target, sm: as ``lint`` of the command line takes them; of a bundle's own files they are
            known, and given ones go before.

    Raises:
        UserError: there is nothing to check, or no such version or target.
    """
    device = find_target(target) if target else None
    release = Release(
        tensorrt_version(CompileOptions(device, tensorrt=tensorrt)), sm or (device.sm if device else None)
    )
    if not path.is_dir():
        return {path: lint(path, release)}
    bundle = Bundle.open(path)
    given = bool(tensorrt or target or sm)
    return {
        bundle.path(item.files[0]): _of_artifact(bundle, item, release, given)
        for item in bundle.manifest.artifacts
        if item.files[0].endswith(".onnx")
    }


def _of_artifact(bundle: Bundle, item: Artifact, release: Release, given: bool) -> list[Finding]:
    file = bundle.path(item.files[0])
    if not item.dialect.startswith("trt"):
        return list(quantization_findings(GraphView(file)))
    if given:
        return lint(file, release)
    if item.backend == "tensorrt_rtx":
        return lint(file, Release.tensorrt_rtx(min(item.engine.sm) if item.engine else None))
    known = load_targets().get(item.target)
    return lint(
        file,
        Release(
            tensorrt_version(CompileOptions(known, tensorrt=item.tools.get("for"))),
            known.sm if known else None,
        ),
    )
