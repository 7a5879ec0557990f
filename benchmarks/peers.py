"""Other runtimes on the same shapes, each in an environment of its own, made when it is first asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from reference.config import DecoderConfig

PEERS = {"llama": ("llama-cpp-python==0.3.36", "gguf")}


def python_of(peer: str, work: Path) -> Path:
    """The interpreter of a peer's environment."""
    folder = work / "environments" / peer
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        print(f"Installing {', '.join(PEERS[peer])} (llama.cpp is compiled, some minutes)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PEERS[peer]], check=True)
        (folder / "complete").touch()
    return python


def run(peer: str, work: Path, *arguments: object) -> str:
    """``peer_<name>.py`` with these arguments; what it printed."""
    script = Path(__file__).with_name(f"peer_{peer}.py")
    command = [str(python_of(peer, work)), str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{script.name} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def llama_file(config: DecoderConfig, work: Path, name: str) -> Path:
    """A Q4_0 file of the decoder's shape."""
    file = work / f"{name}-q4_0.gguf"
    if not file.exists():
        shape = work / f"{name}-shape.json"
        shape.write_text(json.dumps(asdict(config)))
        partial = file.with_suffix(".partial")
        run("llama", work, "make", shape, partial)
        partial.rename(file)
    return file


def llama(file: Path, work: Path, threads: int, prompt: int, context: int, tokens: int) -> dict[str, Any]:
    """Seconds of a prefill and of each decoded token."""
    numbers = ("--threads", threads, "--prompt", prompt, "--context", context, "--tokens", tokens)
    found: dict[str, Any] = json.loads(run("llama", work, "time", file, *numbers))
    return found
