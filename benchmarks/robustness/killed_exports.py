"""``kill -9`` at random moments of exports of the tiny model, then the same export again to its end.

    OMP_NUM_THREADS=1 python benchmarks/robustness/killed_exports.py WORK [--backend coreml] [--kills 100]

The files must be those of an export that nothing disturbed, byte for byte. Each export is a child of this
process, which has loaded the libraries already. Exit code 1 says that a resumed export failed or differs.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

from dsvl_export.exporter.export import export
from runtimes.bundle.files import sha256_of_file
from runtimes.bundle.manifest import STAGING

# Backend → what is exported. Core AI's own writer makes other bytes each time.
PRECISIONS = {
    "onnxruntime": ("fp32", "int8"), "tensorrt": ("fp16",), "coreml": ("fp16",), "executorch": ("fp32",),
    "openvino": ("fp32",),
}  # fmt: skip


def start(folder: Path, backend: str) -> int:
    """Export in a child; returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        export("tiny", folder, backend, PRECISIONS[backend])
        code = 0
    except BaseException:  # noqa: BLE001 - a child must never return
        traceback.print_exc()
    finally:
        os._exit(code)


def hashes(folder: Path) -> dict[str, str]:
    """Of all files but the record of the export itself."""
    files = (file for file in folder.rglob("*") if file.is_file() and STAGING not in file.parts)
    return {file.relative_to(folder).as_posix(): sha256_of_file(file) for file in files}


def differences(work: Path, backend: str, kills: int) -> list[str]:
    """What was wrong after each of the kills; prints a line about them."""
    whole, folder = work / f"{backend}-whole", work / f"{backend}-killed"
    shutil.rmtree(whole, ignore_errors=True)
    export("tiny", whole, backend, PRECISIONS[backend])  # also loads what children share
    expected = hashes(whole)
    shutil.rmtree(whole)
    begun = time.perf_counter()
    os.waitpid(start(whole, backend), 0)
    seconds = time.perf_counter() - begun
    moments, found, running = random.Random(backend), [], 0
    for number in range(kills):
        shutil.rmtree(folder, ignore_errors=True)
        moment = moments.uniform(0, seconds)
        child = start(folder, backend)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        running += os.WIFSIGNALED(status)
        _, status = os.waitpid(start(folder, backend), 0)
        made = hashes(folder) if folder.exists() else {}
        if status or made != expected:
            names = sorted(name for name in {*made, *expected} if made.get(name) != expected.get(name))
            found.append(f"{backend} kill {number} after {moment:.2f} s: status {status}, {names[:5]}")
    print(f"{backend:12} {kills} kills, {running} while it ran, of {seconds:.1f} s: {len(found)} differ")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--backend", choices=PRECISIONS, action="append")
    parser.add_argument("--kills", type=int, default=100, help="of each backend")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    found = [
        line
        for backend in given.backend or PRECISIONS
        for line in differences(given.work, backend, given.kills)
    ]
    print("\n".join(found))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
