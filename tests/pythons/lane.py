"""``make test-pythons``: what needs no torch, on the other Python versions that the project supports.

    python -m tests.pythons.lane FOLDER [--python 3.10 ...]

Each version gets an environment in FOLDER with the project and its extras for running, serving and reports.
Bundles that this interpreter exports are run, asked, judged and served there. The tests that need no torch run,
and those for devices, ``tests/device``, from the unpacked source distribution. A version that this machine lacks is named as not tested.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from tests.oldest.lane import ROOT, Lane, environment, make_environment, requirements

VERSIONS = ("3.10", "3.12", "3.13")  # 3.11 runs all tests
EXTRAS = ("onnxruntime", "report", "serve")
PRECISIONS = ("fp32", "fp16")  # of the fixture tiny_bundle
CHECKS = (
    "help", "doctor", "targets", "inspect", "verify", "run", "chat", "parity", "report", "serve",
    "build_engine", "export", "pytest", "device",
)  # fmt: skip
TESTS = ("tests/runtimes", "tests/dsvl_export/cli/test_package.py", "tests/dsvl_export/cli/test_terminal.py")
FEWEST_TESTS = 230  # 3.10 runs 245; it has no tomllib
FEWEST_DEVICE_TESTS = 37


def find_python(version: str) -> str | None:
    """An interpreter of this version from PATH or pyenv, or None."""
    name = f"python{version}"
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [shutil.which(name), *sorted(pyenv.glob(f"{version}.*/bin/{name}"), reverse=True)]
    for candidate in filter(None, candidates):
        # pyenv puts commands on PATH for versions that are not switched on; those fail.
        if subprocess.run([candidate, "-c", "import ssl, venv"], capture_output=True).returncode == 0:
            return str(candidate)
    return None


class TorchFreeLane(Lane):
    """The checks of an environment without torch; each raises SystemExit where it fails."""

    precisions = PRECISIONS

    def __init__(self, python: Path, bundle: Path, engines: Path, scratch: Path, source: Path) -> None:
        super().__init__(python, bundle, scratch)
        self.engines = engines  # a bundle for TensorRT
        self.source = source  # the unpacked source distribution

    def check(self, name: str) -> None:
        getattr(self, name)()

    def build_engine(self) -> None:
        """Refusals: a bundle of another backend, and no TensorRT."""
        self.command("build-engine", self.bundle, code=2)
        self.command("build-engine", self.engines, code=2)

    def export(self) -> None:
        """Refused, because torch is not there."""
        self.command("export", "tiny", "--output", self.scratch / "unused", code=2)
        assert not (self.scratch / "unused").exists()

    def pytest(self) -> None:
        """The tests that need no torch; at least ``FEWEST_TESTS`` must run and pass."""
        plugin = ("--noconftest", "-p", "tests.pythons.without_torch", "-p", "no:cacheprovider")
        self._pytest(ROOT, environment(), FEWEST_TESTS, *plugin, *TESTS)

    def device(self) -> None:
        """The tests for devices, as a user runs them; at least ``FEWEST_DEVICE_TESTS`` must run and pass."""
        variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        options = ("--confcutdir=tests/device", "-p", "no:cacheprovider", "tests/device")
        self._pytest(self.source, variables, FEWEST_DEVICE_TESTS, *options)

    def _pytest(self, folder: Path, variables: dict[str, str], fewest: int, *arguments: str) -> None:
        """Run pytest in a folder; at least ``fewest`` tests must run and all pass."""
        command = [str(self.python), "-m", "pytest", "-q", "-r", "", *arguments]
        variables = {**variables, "DSVL_TEST_BUNDLE": str(self.bundle)}
        done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=folder)
        summary = done.stdout.splitlines()[-1] if done.stdout else ""
        passed = [int(part.split()[0]) for part in summary.split(", ") if " passed" in part]
        if done.returncode or sum(passed) < fewest:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        print(f"  {summary}", flush=True)


def unpack_source(folder: Path) -> Path:
    """Build the source distribution and unpack it; its folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    code = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, cwd=ROOT, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def export_bundle(folder: Path, backend: str, *options: str) -> Path:
    """Tiny's bundle for a backend, made by this interpreter."""
    wanted = [word for precision in PRECISIONS for word in ("--precision", precision)]
    command = [
        "export",
        "tiny",
        "--backend",
        backend,
        *wanted,
        "--output",
        str(folder),
        "--no-parity",
        *options,
    ]
    subprocess.run(
        [sys.executable, "-m", "dsvl_export.cli", *command],
        check=True,
        env=environment(),
        capture_output=True,
    )
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--python", action="append", metavar="VERSION", help="default: " + ", ".join(VERSIONS)
    )
    given = parser.parse_args()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    bundle = export_bundle(folder / "bundle", "onnxruntime")
    engines = export_bundle(folder / "engines", "tensorrt", "--no-goldens")
    source = unpack_source(folder / "source")
    packages = [*map(str, requirements(EXTRAS)), "httpx>=0.27", "pytest>=8", "setuptools>=77"]
    tested, absent = [], []
    for version in given.python or VERSIONS:
        python = find_python(version)
        if python is None:
            absent.append(version)
            continue
        print(f"Python {version} ({python})", flush=True)
        started = time.perf_counter()
        interpreter = make_environment(folder / version, python, [*packages, f"--editable={ROOT}"])
        print(f"  installed in {time.perf_counter() - started:.1f} s", flush=True)
        lane = TorchFreeLane(interpreter, bundle, engines, folder, source)
        for check in CHECKS:
            started = time.perf_counter()
            lane.check(check)
            print(f"  {check}: passed in {time.perf_counter() - started:.1f} s", flush=True)
        tested.append(version)
    print(f"Tested: {', '.join(tested) or 'nothing'}.")
    if absent:
        print(f"Not tested, because this machine has no such Python: {', '.join(absent)}.")
    sys.exit(0 if tested else 1)


if __name__ == "__main__":
    main()
