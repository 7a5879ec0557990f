"""The install command for a missing module: the smallest package that has it, for this machine."""

from __future__ import annotations

from pathlib import Path

JETSON = Path("/etc/nv_tegra_release")  # a file of JetPack
# Top-level module of an extra → arguments of ``pip install``: an extra where its bounds matter or
# several packages are needed together. A failed import of any other module is an internal error.
PACKAGES = {
    "coreai": "'coreai-core>=1.0.0b3'",
    "coreai_torch": "'dsvl-export[coreai]'",
    "coremltools": "'coremltools>=9,<10'",
    "cuda": "cuda-python",
    "executorch": "'executorch>=1.4,<1.6' 'torch==2.13.*'",
    "fastapi": "'dsvl-export[serve]'",
    "jsonschema": "'dsvl-export[structured]'",
    "jinja2": "'dsvl-export[report]'",
    "llguidance": "'dsvl-export[structured]'",
    "matplotlib": "matplotlib",
    "ml_dtypes": "ml-dtypes",
    "onnx": "onnx",
    "onnxruntime": "'dsvl-export[onnxruntime]'",
    "openvino": "'dsvl-export[openvino]'",
    "prometheus_client": "'dsvl-export[serve]'",
    "ray": "'dsvl-export[ray]'",
    "tensorrt": "'dsvl-export[tensorrt]'",
    "tensorrt_rtx": "'dsvl-export[tensorrt-rtx]'",
    "threadpoolctl": "'threadpoolctl>=3.5'",
    "torch": "'dsvl-export[export]'",
    "torchao": "torchao",
    "uvicorn": "'dsvl-export[serve]'",
}
# Modules that JetPack contains, or of which it supports one version.
ON_JETSON = {
    "cuda": "pip install 'cuda-python==12.6.*' (JetPack 6), or 'cuda-python==13.*' (JetPack 7)",
    "tensorrt": "python3 -m venv --system-site-packages ENVIRONMENT, for JetPack's own",
}


def on_jetson() -> bool:
    """Return whether this machine is a Jetson with JetPack."""
    return JETSON.exists()


def install_command(module: str) -> str:
    """Return the command that installs a module.

    Args:
        module: dotted name; one that is not in ``PACKAGES`` counts as the name of its package.
    """
    top = module.partition(".")[0]
    if top in ON_JETSON and on_jetson():
        return ON_JETSON[top]
    return f"pip install {PACKAGES.get(top, top)}"
