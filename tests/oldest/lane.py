"""The slow lane ``make test-oldest``: every dependency in the lowest version that pyproject declares.

    python tests/oldest/lane.py FOLDER [--python python3.10] [--group NAME ...]

Each group of extras gets an environment of its own in FOLDER, without this project's development tools. A
bundle that this interpreter exports beforehand is run, asked, judged and served there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMAGE = next((ROOT / "reference/tiny/heldout/images").glob("*.png"))
QUESTION = "What number is in the picture?"
PRECISIONS = ("fp32", "fp16", "int8", "int4", "8da8w")
SECONDS_TO_START = 60


@dataclass(frozen=True)
class Group:
    """Extras that are installed together, and what is done with them."""

    extras: tuple[str, ...]
    checks: tuple[str, ...]
    exports: bool = False  # which takes the Python of this interpreter


GROUPS = {
    "run": Group(
        ("onnxruntime",), ("help", "doctor", "targets", "inspect", "verify", "run", "chat", "parity")
    ),
    "serve": Group(("onnxruntime", "serve"), ("serve",)),
    "report": Group(("onnxruntime", "report"), ("report",)),
    "ray": Group(("onnxruntime", "serve", "ray"), ("import ray.serve, dsvl_export.cluster.ray_cluster",)),
    "export": Group(("export", "onnxruntime"), ("export", "plan"), True),
    "executorch": Group(("executorch", "onnxruntime"), ("export --backend executorch",), True),
    "coreml": Group(("coreml", "onnxruntime"), ("export --backend coreml",), True),
    "openvino": Group(("export", "openvino"), ("export --backend openvino",), True),
}
DEFAULT = ("run", "serve", "report", "ray", "export")


def requirements(extras: tuple[str, ...]) -> list[Requirement]:
    """The project's own, and those of extras with the extras in them."""
    found = [Requirement(text) for text in PROJECT["dependencies"]]
    for extra in extras:
        for text in PROJECT["optional-dependencies"][extra]:
            requirement = Requirement(text)
            if requirement.name == PROJECT["name"]:
                found += requirements(tuple(requirement.extras))
            elif requirement.marker is None or requirement.marker.evaluate():
                found.append(requirement)
    return found


def lowest_version(requirement: Requirement) -> str:
    """The lowest version that a requirement takes, as ``1.20`` or ``2.13.*``.

    Raises:
        ValueError: it has no lower bound.
    """
    versions = [item.version for item in requirement.specifier if item.operator in ("==", ">=")]
    if not versions:
        raise ValueError(f"{requirement} has no lower bound")
    return versions[0]


def lowest(wanted: list[Requirement]) -> list[str]:
    """``name==version`` of each requirement; of several for one package, the highest of their lowest."""
    found: dict[str, Requirement] = {}
    for requirement in wanted:
        known = found.get(requirement.name)
        if known is None or _number(requirement) > _number(known):
            found[requirement.name] = requirement
    return [f"{name}{_extras(item)}=={lowest_version(item)}" for name, item in found.items()]


def _extras(requirement: Requirement) -> str:
    return f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""


def _number(requirement: Requirement) -> Version:
    return Version(lowest_version(requirement).removesuffix(".*"))


def make_environment(folder: Path, python: str, pins: list[str]) -> Path:
    """An environment with these pins, made anew where they changed; its interpreter."""
    interpreter, complete = folder / "bin/python", folder / "complete"
    if not complete.exists() or complete.read_text() != " ".join(pins):
        subprocess.run([python, "-m", "venv", "--clear", str(folder)], check=True)
        command = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*command, "--only-binary", ":all:", *pins], check=True)
        complete.write_text(" ".join(pins))
    return interpreter


class Lane:
    """The checks of one environment; each raises SystemExit where it fails."""

    precisions: tuple[str, ...] = PRECISIONS  # of the bundle

    def __init__(self, python: Path, bundle: Path, scratch: Path) -> None:
        self.python, self.bundle, self.scratch = python, bundle, scratch

    def command(self, *arguments: object, text: str = "", code: int = 0) -> str:
        """Run ``dsvl-export``; what it printed."""
        command = [str(self.python), "-m", "dsvl_export.cli", *map(str, arguments)]
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, env=environment(), cwd=self.scratch
        )
        if done.returncode != code or "Traceback" in done.stderr:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def check(self, name: str) -> None:
        if name.startswith("import "):
            subprocess.run([str(self.python), "-c", name], check=True, env=environment())
        elif name.startswith("export"):
            backend = name.partition("--backend ")[2] or "onnxruntime"
            output = self.scratch / backend
            shutil.rmtree(output, ignore_errors=True)
            self.command("export", "tiny", "--backend", backend, "--output", output)
        else:
            getattr(self, name)()

    def help(self) -> None:
        """Every command's help, and what is wrong with a command line."""
        words = self.command("--help")
        for command in ("run", "chat", "parity", "serve", "export", "doctor", "plan", "lint"):
            assert command in words
            self.command(command, "--help")
        self.command("run", code=2)
        self.command("run", self.bundle, "--prompt", "x", "--seed", "y", code=2)

    def doctor(self) -> None:
        assert json.loads(self.command("doctor", "--json"))["healthy"]
        self.command("doctor")

    def targets(self) -> None:
        assert "jetson-orin-nano" in self.command("targets")

    def plan(self) -> None:
        self.command("plan", "tiny", "--context", 1024)

    def inspect(self) -> None:
        self.command("inspect", self.bundle)

    def verify(self) -> None:
        self.command("verify", self.bundle)

    def run(self) -> None:
        for precision in self.precisions:
            ask = ("run", self.bundle, "--precision", precision, "--image", IMAGE, "--prompt", QUESTION)
            assert self.command(*ask).strip(), precision

    def chat(self) -> None:
        assert self.command("chat", self.bundle, "--image", IMAGE, text=f"{QUESTION}\n/quit\n").strip()

    def parity(self) -> None:
        report = self.scratch / "reports"
        shutil.rmtree(report, ignore_errors=True)
        self.command("parity", self.bundle, "--task", "none", "--report", report)
        assert len(list(report.glob("*.json"))) == len(self.precisions)

    def report(self) -> None:
        folder = self.scratch / "page"
        shutil.rmtree(folder, ignore_errors=True)
        self.command("parity", self.bundle, "--precision", "fp32", "--task", "none", "--report", folder)
        assert "<html" in (folder / "parity-onnxruntime-fp32.html").read_text()

    def serve(self) -> None:
        """Start the server, ask it once, and stop it."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [str(self.python), "-m", "dsvl_export.cli", "serve", str(self.bundle), "--port", str(port)]
        log = (self.scratch / "serve.log").open("w+")
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment(), cwd=self.scratch)
        try:
            models = self._ask(server, port, "/v1/models", None)
            body = {
                "model": models["data"][0]["id"],
                "messages": [{"role": "user", "content": "What is this?"}],
                "max_tokens": 4,
            }
            answer = self._ask(server, port, "/v1/chat/completions", body)
            assert answer["choices"][0]["message"]["content"]
        except (OSError, AssertionError, KeyError) as error:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)}: {error!r}\n{log.read()}") from error
        finally:
            server.terminate()
            server.wait(30)
            log.close()

    def _ask(self, server: subprocess.Popen[bytes], port: int, path: str, body: object) -> dict:
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data)
        request.add_header("Content-Type", "application/json")
        give_up = time.monotonic() + SECONDS_TO_START
        while True:
            try:
                with urllib.request.urlopen(request, timeout=60) as response:
                    return json.load(response)
            except urllib.error.HTTPError:
                raise
            except OSError:
                if server.poll() is not None or time.monotonic() > give_up:
                    raise
                time.sleep(0.3)


def environment() -> dict[str, str]:
    """The variables with which a check runs this checkout's code."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "RAY_DEDUP_LOGS": "0"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--python", default="", help="of environments that do not export; default: python3.10, or this one"
    )
    parser.add_argument(
        "--group", action="append", choices=list(GROUPS), help="default: " + ", ".join(DEFAULT)
    )
    given = parser.parse_args()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    python = given.python or shutil.which("python3.10") or sys.executable
    bundle = folder / "bundle"
    wanted = [word for precision in PRECISIONS for word in ("--precision", precision)]
    command = ["export", "tiny", *wanted, "--output", str(bundle), "--no-parity"]
    subprocess.run([sys.executable, "-m", "dsvl_export.cli", *command], check=True, env=environment())
    for name in given.group or DEFAULT:
        group = GROUPS[name]
        pins = lowest(requirements(group.extras))
        print(f"{name}: {' '.join(pins)}", flush=True)
        interpreter = make_environment(folder / name, sys.executable if group.exports else python, pins)
        lane = Lane(interpreter, bundle, folder)
        for check in group.checks:
            started = time.perf_counter()
            lane.check(check)
            print(f"  {check}: passed in {time.perf_counter() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main()
