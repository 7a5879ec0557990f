"""What every ONNX Runtime makes of every precision: the table of docs/how-to/onnxruntime-versions.md.

    python benchmarks/onnxruntime_versions.py WORK [--versions 1.23.2 1.32.0] [--ignore-floors]

Exports `tiny` for a CPU, for Jetson Orin and for H100, makes an environment without PyTorch for each version
in WORK and runs `parity` on a CPU there. Exit code 1 where a version does not pass that
`runtimes/backends/onnxruntime_releases.py` lets through. With --ignore-floors nothing is refused beforehand:
that is how the floors are found. 1.23.2 is installed under Python 3.10 where there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSIONS = ("1.23.2", "1.24.4", "1.26.0", "1.27.0", "1.28.0", "1.29.0", "1.30.0", "1.31.1", "1.32.0")
LAST_FOR_310 = "1.23.2"
NEEDED = (
    "fastjsonschema", "numpy", "packaging", "pillow", "psutil", "pyyaml", "rich", "safetensors",
    "tokenizers", "typer",
)  # fmt: skip
# Bundle → what `export` is given, and its precisions.
BUNDLES = {
    "cpu": (
        (),
        (
            "fp32", "fp16", "int8-weights", "int4", "int8", "int8-fp16", "int8-int4", "8da8w", "8da4w",
            "8da4w-g128", "kv-int8", "fp8",
        ),
    ),
    "jetson-orin": (("--target", "jetson-orin"), ("fp32", "fp16", "int4", "int8", "int8-int4")),
    "h100": (("--target", "h100"), ("fp32", "fp16", "int4", "fp8", "int8", "int8-int4")),
}  # fmt: skip
WORDS = {0: "passed", 1: "FAILED", 2: "does not load", 3: "refused"}
# Runs the command line with a table of features that no file has.
WITHOUT_FLOORS = (
    "import sys, runtimes.backends.onnxruntime as r; r.release_problem = lambda artifact: '';"
    "from dsvl_export.cli import main; main(sys.argv[1:])"
)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def python_of(version: str, work: Path) -> Path:
    """The interpreter of an environment with one ONNX Runtime."""
    folder = work / f"onnxruntime-{version}"
    if not (folder / "complete").exists():
        older = shutil.which("python3.10") if version == LAST_FOR_310 else None
        subprocess.run([older or sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        command = [
            str(folder / "bin/python"),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
        ]
        subprocess.run([*command, f"onnxruntime=={version}", "onnx", *NEEDED], check=True)
        (folder / "complete").touch()
    return folder / "bin/python"


def bundle_of(name: str, work: Path) -> Path:
    folder, (options, precisions) = work / f"bundle-{name}", BUNDLES[name]
    wanted = [word for precision in precisions for word in ("--precision", precision)]
    command = ["export", "tiny", *options, *wanted, "--output", str(folder), "--no-parity"]
    subprocess.run([sys.executable, "-m", "dsvl_export.cli", *command], check=True, env=environment())
    return folder


def judge(python: Path, bundle: Path, precision: str, work: Path, ignore_floors: bool) -> str:
    """``passed``, or what happens instead."""
    start = ["-c", WITHOUT_FLOORS] if ignore_floors else ["-m", "dsvl_export.cli"]
    arguments = [
        "parity",
        str(bundle),
        "--precision",
        precision,
        "--task",
        "none",
        "--device",
        "cpu",
        "--json",
    ]
    command = [str(python), *start, *arguments, "--report", str(work / "reports")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    word = WORDS.get(done.returncode, f"ended with {done.returncode}")
    if word == "refused":
        reason = json.loads(done.stdout)[0]["execution"]["by"]
        word = f"needs {reason.partition('ONNX Runtime ')[2].partition(' or later')[0]}"
    if word not in ("passed",) and not word.startswith("needs"):
        print(f"{python.parent.parent.name} {bundle.name} {precision}: {done.stderr[-300:]}", file=sys.stderr)
    return word


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--versions", nargs="+", default=VERSIONS)
    parser.add_argument("--ignore-floors", action="store_true")
    given = parser.parse_args()
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    print(f"| | | {' | '.join(given.versions)} |")
    print("|---|---|" + "---|" * len(given.versions))
    good = True
    for name, (_, precisions) in BUNDLES.items():
        bundle = bundle_of(name, work)
        for precision in precisions:
            found = [
                judge(python_of(version, work), bundle, precision, work, given.ignore_floors)
                for version in given.versions
            ]
            good &= all(word == "passed" or word.startswith("needs") for word in found)
            print(f"| {name} | `{precision}` | {' | '.join(found)} |", flush=True)
    sys.exit(0 if good or given.ignore_floors else 1)


if __name__ == "__main__":
    main()
