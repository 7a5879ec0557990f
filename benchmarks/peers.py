"""Other runtimes on the same shapes, each in an environment of its own, made when it is first asked for.

A peer is ``peer_<name>.py``: ``make`` writes what it loads, ``time`` prints one JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measuring import made_once

from reference.model.config import DecoderConfig

# What each environment holds; ``environments/<peer>.txt`` has the version of every package in it.
PEERS: dict[str, tuple[str, ...]] = {
    "llama": ("llama-cpp-python==0.3.36", "gguf"),
    "transformers": ("torch==2.13.0", "transformers==5.5.4"),
    "genai": (
        "torch==2.13.0",
        "onnxruntime-genai==0.18.0",
        "onnxruntime==1.32.0",
        "transformers==5.24.0",
        "onnx==1.23.2",
        "onnx_ir==1.1.0",
    ),
    "vision": ("torch==2.13.0", "transformers==5.5.4", "openvino==2026.4.1"),
    "openvino": (
        "torch==2.13.0",
        "openvino==2026.4.1",
        "optimum-intel==2.2.0",
        "nncf==3.4.0",
        "transformers==5.5.4",
    ),
}


# How the peers of a decoder keep and compute their weights; the scripts say what is meant.
FORMS: dict[str, tuple[str, ...]] = {
    "llama": ("q4_0",),
    "transformers": ("fp32", "bf16", "bf16-compile"),
    "genai": ("int4-32", "int4-128"),
    "openvino": ("int4-32", "int4-128"),
}


# What each environment must be able to import, by package.
IMPORTS: dict[str, dict[str, str]] = {
    "llama": {"llama-cpp-python": "llama_cpp", "gguf": "gguf"},
    "transformers": {"torch": "torch", "transformers": "transformers.models.llama.modeling_llama"},
    "genai": {"onnxruntime-genai": "onnxruntime_genai.models.builder", "transformers": "transformers"},
    "vision": {"transformers": "transformers.models.siglip.modeling_siglip", "openvino": "openvino"},
    "openvino": {
        "transformers": "transformers.models.auto.processing_auto",
        "nncf": "nncf",
        "optimum-intel": "optimum.intel.openvino",
    },
}
# Packages that others bring and nothing here uses. torchvision must be built for the same torch, which
# an index with a CPU build of torch alone does not give.
UNWANTED: dict[str, tuple[str, ...]] = {"openvino": ("torchvision",)}


def python_of(peer: str, work: Path) -> Path:
    """The interpreter of a peer's environment, which is made and checked when it is first asked for."""
    folder = work / "environments" / peer
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        compiled = " (it is compiled, some minutes)" if peer == "llama" else ""
        print(f"Installing {', '.join(PEERS[peer])}{compiled}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
        pins = Path(__file__).parent / "environments" / f"{peer}.txt"
        subprocess.run([*pip, "install", "--quiet", "--constraint", str(pins), *PEERS[peer]], check=True)
        for package in UNWANTED.get(peer, ()):
            subprocess.run([*pip, "uninstall", "--quiet", "--yes", package], check=True)
        check_imports(peer, python)
        (folder / "complete").touch()
    return python


def check_imports(peer: str, python: Path) -> None:
    """Import what a peer needs, each in a process of its own.

    Raises:
        SystemExit: names the package that cannot be imported.
    """
    for package, module in IMPORTS[peer].items():
        done = subprocess.run([str(python), "-c", f"import {module}"], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise SystemExit(f"{package} cannot be imported in the environment of {peer}: {reason}")


def run(peer: str, work: Path, *arguments: object) -> str:
    """``peer_<name>.py`` with these arguments; what it printed."""
    script = Path(__file__).with_name(f"peer_{peer}.py")
    command = [str(python_of(peer, work)), str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{script.name} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def decoder(
    peer: str, form: str, config: DecoderConfig, work: Path, name: str
) -> Callable[[int, int, int, int], dict[str, Any]]:
    """A peer with a decoder of this shape: seconds of a prefill and of each decoded token.

    Args:
        form: one of the peer's ``FORMS``.

    Returns:
        A function of threads, tokens of the prompt, of the context, and to decode.
    """
    shape = work / f"{name}-shape.json"
    shape.write_text(json.dumps(asdict(config)))
    output = made_once(
        work / f"{name}-{peer}-{form}", lambda place: run(peer, work, "make", form, shape, place)
    )

    def measure(threads: int, prompt: int, context: int, tokens: int) -> dict[str, Any]:
        numbers = ("--threads", threads, "--prompt", prompt, "--context", context, "--tokens", tokens)
        found: dict[str, Any] = json.loads(run(peer, work, "time", form, output, *numbers).splitlines()[-1])
        return found

    return measure
