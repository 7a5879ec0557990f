"""The linter: all rules on all nodes, for one TensorRT release and optionally one GPU."""

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

TRT11_SINCE = Version("10.15")  # imports RotaryEmbedding, RMSNormalization and TensorScatter
TENSORRT_RTX_AS = Version("11.0")  # its parser and operators are those of TensorRT 11


@dataclass(frozen=True)
class Release:
    """A version of TensorRT, and the compute capability (as in 87) of the engine's GPU."""

    version: Version
    sm: int | None = None

    @property
    def dialect(self) -> str:
        """The dialect of ONNX files for this version."""
        return "trt11" if self.version >= TRT11_SINCE else "trt10"

    @classmethod
    def tensorrt_rtx(cls, sm: int | None = None) -> Release:
        """Return the release whose rules hold for TensorRT-RTX."""
        return cls(TENSORRT_RTX_AS, sm)


def lint(file: Path, release: Release) -> list[Finding]:
    """List the findings of a file, harmful ones first.

    Raises:
        UserError: the file is not a readable ONNX file.
    """
    found = list(_findings(GraphView(file), release))
    return sorted(found, key=lambda one: not one.harmful)


def refuse(file: Path, release: Release) -> None:
    """Refuse a file that TensorRT would refuse or change; the error gives the first reason.

    Raises:
        UserError: there is a harmful finding.
    """
    harmful = [finding for finding in lint(file, release) if finding.harmful]
    if harmful:
        gpu = f" on SM {release.sm}" if release.sm else ""
        raise UserError(f"TensorRT {release.version}{gpu} would not build {file.name}: {harmful[0]}")


def _findings(view: GraphView, release: Release) -> Iterator[Finding]:
    yield from type_findings(view, release.version, release.sm)
    yield from operator_findings(view, release.version)
    yield from quantization_findings(view)
