"""The oldest ONNX Runtime that runs a file: one table, by what the file holds.

Measured by ``benchmarks/onnxruntime_versions.py``, which prints what every release makes of every precision.
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
OLDEST = "1.23"  # that this package takes at all
PYTHON_OF_OLDEST = (3, 10)  # the last release for it is OLDEST
PACKAGES = ("onnxruntime-gpu", "onnxruntime")


@dataclass(frozen=True)
class Feature:
    """What a file may hold that not every release computes.

    Args:
        since: the oldest release that computes it on a CPU.
        problem: what older releases do with it, as the end of a sentence.
        link: the public report.
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
# Precisions on their usual base → what their files for ONNX Runtime hold; the others run on OLDEST.
PRECISIONS = {"kv-int8": "int8-cache", "fp8": "float8"}
# Bundles of dsvl-export 0.4 do not say what they need; their files round activations in opset 23.
ROUNDS_ACTIVATIONS = ("int8", "int8-int4", "8da8w", "8da4w", "8da4w-g128")


def release_for_precision(precision: str) -> str:
    """The oldest release for a shipped precision of ``onnxruntime``, as ``int8`` or ``int8-fp16``."""
    name = precision.removesuffix("-fp16")
    if name != precision and name in ("int8", "int8-int4"):
        return FEATURES["float16-quantize"].since
    feature = PRECISIONS.get(name)
    return FEATURES[feature].since if feature else OLDEST


def release_for_artifact(artifact: Artifact) -> str:
    """The oldest release for an artifact's ONNX files, as its manifest says or, without that, its name.

    Raises:
        UserError: the manifest says something that is not a version.
    """
    if NEEDED in artifact.tools:
        text = artifact.tools[NEEDED]
        if not re.fullmatch(r"\d{1,4}\.\d{1,4}(\.\d{1,4})?", text):
            raise UserError(
                f"The manifest gives {artifact.files[0]} an {NEEDED} of {text[:40]!r}; export it again."
            )
        return text
    precision = artifact.precision.removesuffix(f"-{artifact.base}")
    found = [OLDEST if precision == "fp8" and artifact.base == "fp16" else release_for_precision(precision)]
    if precision in ROUNDS_ACTIVATIONS:
        found.append(FEATURES["opset23-quantize"].since)
        if artifact.base == "fp16":
            found.append(FEATURES["float16-quantize"].since)
    if artifact.dialect == "trt11":
        found.append(FEATURES["tensor-scatter"].since)
    return newest(found)


def newest(releases: Iterable[str]) -> str:
    return max(releases, key=numbers)


def numbers(release: str) -> tuple[int, ...]:
    """``(1, 23)`` of ``1.23.2``; what follows is left out, as in ``1.24.0.dev1``."""
    return tuple(int(part) for part in re.findall(r"\d+", release)[:2])


def refusal(needed: str, installed: str) -> str:
    """Why a release is too old and what to do, as the end of a sentence; empty where it is not."""
    if numbers(installed) >= numbers(needed):
        return ""
    python = ""
    if sys.version_info[:2] <= PYTHON_OF_OLDEST:
        python = " under Python 3.11 or later"
    return (
        f"it needs ONNX Runtime {needed} or later, here is {installed};"
        f" run: pip install '{installed_package()}>={needed}'{python}"
    )


def installed_package() -> str:
    """The distribution that ONNX Runtime is installed from."""
    for name in PACKAGES:
        try:
            version(name)
        except PackageNotFoundError:
            continue
        return name
    return PACKAGES[-1]
