"""Table of the oldest ONNX Runtime release for each feature of a file.

Measured by ``benchmarks/onnxruntime_versions.py``, which prints the result of every release for
every precision.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from runtimes.errors import UserError

if TYPE_CHECKING:
    from runtimes.bundle.manifest import Artifact

NEEDED = "onnxruntime_needed"  # key of an artifact's tools: the oldest release that runs its files
OLDEST = "1.23"  # oldest release that this package supports
PYTHON_OF_OLDEST = (3, 10)  # the last release for it is OLDEST
PACKAGES = ("onnxruntime-gpu", "onnxruntime")


@dataclass(frozen=True)
class Feature:
    """A feature of a file that not every release supports.

    Args:
        since: the oldest release that supports it on a CPU.
        problem: what older releases do, as the end of a sentence.
        link: the public report or documentation.
    """

    since: str
    problem: str
    link: str


FEATURES = {
    "opset24": Feature(
        "1.24", "refuse ONNX opset 24", "https://onnxruntime.ai/docs/reference/compatibility.html"
    ),
    "opset23-quantize": Feature(
        "1.24",
        "have no kernel for the QuantizeLinear of opset 23",
        "https://github.com/microsoft/onnxruntime/issues/25932",
    ),
    "tensor-scatter": Feature(
        "1.26",  # 1.24.4 has none, 1.25 was not measured
        "have no CPU kernel for the TensorScatter of opset 24",
        "https://github.com/microsoft/onnxruntime/blob/main/docs/OperatorKernels.md",
    ),
    "int8-cache": Feature(
        "1.27",
        "have no CPU kernel for a KV cache of 8 bits",
        "https://github.com/microsoft/onnxruntime/pull/28576",
    ),
    "float16-quantize": Feature(
        "1.30",
        "round float16 activations toward zero instead of to the nearest code",
        "https://github.com/microsoft/onnxruntime/pull/32452",
    ),
    "float8": Feature(
        "1.32",
        "replace products of float8 by an operator for integers and refuse the file",
        "https://github.com/microsoft/onnxruntime/issues/22269",
    ),
}
# Precision on its usual base → feature of its ONNX files; the others run on OLDEST.
PRECISIONS = {"kv-int8": "int8-cache", "fp8": "float8"}
# Bundles of dsvl-export 0.4 do not state the release; their files quantize activations in opset 23.
ROUNDS_ACTIVATIONS = ("int8", "int8-int4", "8da8w", "8da4w", "8da4w-g128")


def release_for_precision(precision: str) -> str:
    """Return the oldest release for a precision of ``onnxruntime``, such as ``int8-fp16``."""
    name = precision.removesuffix("-fp16")
    if name != precision and name in ("int8", "int8-int4"):
        return FEATURES["float16-quantize"].since
    feature = PRECISIONS.get(name)
    return FEATURES[feature].since if feature else OLDEST


def release_for_artifact(artifact: Artifact) -> str:
    """Return the oldest release for an artifact's ONNX files, from the manifest or its precision.

    Raises:
        UserError: the manifest's value is not a version.
    """
    if NEEDED in artifact.tools:
        text = artifact.tools[NEEDED]
        if not re.fullmatch(r"\d{1,4}\.\d{1,4}(\.\d{1,4})?", text):
            raise UserError(
                f"The manifest's {NEEDED} of {artifact.files[0]} is not a version: {text[:40]!r};"
                " export it again."
            )
        return text
    precision = artifact.precision.removesuffix(f"-{artifact.base}")
    fp16_fp8 = precision == "fp8" and artifact.base == "fp16"
    releases = [OLDEST if fp16_fp8 else release_for_precision(precision)]
    if precision in ROUNDS_ACTIVATIONS:
        releases.append(FEATURES["opset23-quantize"].since)
        if artifact.base == "fp16":
            releases.append(FEATURES["float16-quantize"].since)
    if artifact.dialect == "trt11":
        releases.append(FEATURES["tensor-scatter"].since)
    return newest_release(releases)


def newest_release(releases: Iterable[str]) -> str:
    """Return the newest of several releases."""
    return max(releases, key=version_numbers)


def version_numbers(release: str) -> tuple[int, ...]:
    """Return major and minor version: ``(1, 23)`` of ``1.23.2``, ``(1, 24)`` of ``1.24.0.dev1``."""
    return tuple(int(part) for part in re.findall(r"\d+", release)[:2])


def upgrade_message(needed: str, installed: str) -> str:
    """Explain why a release is too old and what to do; empty if it is not too old.

    Args:
        needed: the oldest release that works.
        installed: the installed release.

    Returns:
        the end of a sentence about an artifact or precision.
    """
    if version_numbers(installed) >= version_numbers(needed):
        return ""
    python = ""
    if sys.version_info[:2] <= PYTHON_OF_OLDEST:
        python = " under Python 3.11 or later"
    return (
        f"it needs ONNX Runtime {needed} or later, but {installed} is installed;"
        f" run: pip install '{installed_package()}>={needed}'{python}"
    )


def installed_package() -> str:
    """Return the name of the installed distribution of ONNX Runtime."""
    for name in PACKAGES:
        try:
            version(name)
        except PackageNotFoundError:
            continue
        return name
    return PACKAGES[-1]
