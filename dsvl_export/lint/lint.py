"""The linter: every rule on every node, for one release of TensorRT and, if known, one GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from dsvl_export.lint.finding import Finding
from dsvl_export.lint.operators import operator_findings
from dsvl_export.lint.quantization import quantization_findings
from dsvl_export.lint.types import type_findings
from dsvl_export.lint.view import GraphView
from runtimes.errors import UserError

TRT11_SINCE = Version("10.15")  # RotaryEmbedding, RMSNormalization and TensorScatter import since then
TENSORRT_RTX_AS = Version("11.0")  # its parser and operators are those of TensorRT 11


@dataclass(frozen=True)
class Release:
    """A version of TensorRT, and the compute capability (as in 87) that its engine is for."""

    version: Version
    sm: int | None = None

    @property
    def dialect(self) -> str:
        """Of the ONNX that it takes."""
        return "trt11" if self.version >= TRT11_SINCE else "trt10"

    @classmethod
    def tensorrt_rtx(cls, sm: int | None = None) -> Release:
        return cls(TENSORRT_RTX_AS, sm)


def lint(file: Path, release: Release) -> list[Finding]:
    """All that TensorRT would not take, or would not take as it is meant; harmful findings first.

    Raises:
        UserError: it is no ONNX file.
    """
    found = list(_findings(GraphView(file), release))
    return sorted(found, key=lambda one: not one.harmful)


def refuse(file: Path, release: Release) -> None:
    """Raise UserError where TensorRT would refuse a file or change its meaning; the first reason is named."""
    harmful = [finding for finding in lint(file, release) if finding.harmful]
    if harmful:
        gpu = f" on SM {release.sm}" if release.sm else ""
        raise UserError(f"TensorRT {release.version}{gpu} would not build {file.name}: {harmful[0]}")


def _findings(view: GraphView, release: Release) -> Iterator[Finding]:
    yield from type_findings(view, release.version, release.sm)
    yield from operator_findings(view, release.version)
    yield from quantization_findings(view)
