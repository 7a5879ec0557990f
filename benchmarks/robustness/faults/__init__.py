"""Random faults in the files of a bundle, as mistakes of a converter or an editor would look.

A fault is drawn from a seed, planted, and given its new hash: nothing but the numbers tells it from a sound
file. ``plant`` says what it did.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

from benchmarks.robustness.faults import ir_files, mil_packages, onnx_files, programs, shared
from runtimes.bundle.files import read_json, sha256_of_file, write_json
from runtimes.bundle.manifest import MANIFEST, FileEntry

# Folders of artifacts, and how often each is chosen; a program of ExecuTorch has all components.
COMPONENTS = {"decoder": 5, "vision_encoder": 4, "adaptor": 1, "program": 10}
SHARED_SHARE = 0.15  # of all faults
BACKENDS = {
    "onnxruntime": onnx_files.plant, "openvino": ir_files.plant, "coreml": mil_packages.plant,
    "executorch": programs.plant,
}  # fmt: skip


def plant(bundle: Path, backend: str, precision: str, seed: int) -> tuple[str, list[Path]]:
    """Plant one fault into a bundle.

    Returns:
        What was done, and the files that were changed besides the manifest.
    """
    random = Random(seed)
    if random.random() < SHARED_SHARE:
        done, files = shared.plant(bundle, random)
    else:
        folders = {folder.name: folder for folder in (bundle / backend / precision).iterdir()}
        parts = [name for name in COMPONENTS if name in folders]
        (part,) = random.choices(parts, [COMPONENTS[name] for name in parts])
        done, files = BACKENDS[backend](folders[part], random)
        done = f"{part}: {done}"
    for file in files:
        rehash(bundle, file.relative_to(bundle).as_posix())
    return done, files


def rehash(bundle: Path, path: str) -> None:
    """Give a changed file its new hash in the manifest."""
    raw = read_json(bundle / MANIFEST)
    file = bundle / path
    raw["files"][path] = vars(FileEntry(file.stat().st_size, sha256_of_file(file)))
    write_json(bundle / MANIFEST, raw)
