"""Readers of untrusted files under atheris, which mutates inputs toward code that they have not reached.

    pip install atheris
    python benchmarks/robustness/coverage_guided.py manifest --seconds 600
    python benchmarks/robustness/coverage_guided.py package --seconds 600
    python benchmarks/robustness/coverage_guided.py image --seconds 600

A target ends with exit code 0 after its time, or at the first input for which its reader raises anything
but UserError, takes more than 20 s or needs more than 4 GB; that input is kept in the working folder.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["runtimes", "PIL"]):
    import numpy as np
    from PIL import Image

    from runtimes.backends.mil.interpreter import Function
    from runtimes.backends.mil.package import SPECIFICATION, WEIGHTS, Package
    from runtimes.bundle.bundle import Bundle
    from runtimes.bundle.manifest import MANIFEST
    from runtimes.errors import UserError
    from runtimes.preprocess import PreprocessSpec, preprocess

SECONDS, MEGABYTES, LONGEST = 20, 4_000, 1 << 20
SPEC = PreprocessSpec(48, 14, (0.5,) * 3, (0.5,) * 3, (127,) * 3, 1 / 255, True)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA")


def manifest_target(work: Path, corpus: Path) -> Callable[[bytes], object]:
    """``manifest.json`` of a bundle."""
    from dsvl_export.exporter.export import export

    bundle = export("tiny", work / "bundle", goldens=False).folder
    shutil.copyfile(bundle / MANIFEST, corpus / "manifest")

    def read(content: bytes) -> object:
        (bundle / MANIFEST).write_bytes(content)
        return Bundle.open(bundle).manifest.to_dict()

    return read


def package_target(work: Path, corpus: Path) -> Callable[[bytes], object]:
    """The protobuf, or where the first byte is 1 the weights, of a Core ML package."""
    from dsvl_export.exporter.export import export

    bundle = export("tiny", work / "bundle", "coreml", ["fp16"], goldens=False).folder
    (folder,) = bundle.glob("coreml/fp16/adaptor/*.mlpackage")
    parts = [folder / SPECIFICATION, folder / WEIGHTS]
    originals = [part.read_bytes() for part in parts]
    for place, original in enumerate(originals):
        (corpus / str(place)).write_bytes(bytes([place]) + original[: LONGEST - 1])

    def read(content: bytes) -> object:
        mutated = int(content[:1] == b"\1")
        parts[mutated].write_bytes(content[1:])
        parts[1 - mutated].write_bytes(originals[1 - mutated])
        package = Package(folder)
        weights = package.weights
        for offset in range(64, 1024, 64):
            try:
                weights.read(offset, (64,))
            except UserError:
                continue
        for name in package.function_names:
            package.check_lengths(name, {"low": (1, 36, 64)})
            Function(package, name, {})
        return package.count_weights(), package.metadata

    return read


def image_target(work: Path, corpus: Path) -> Callable[[bytes], object]:
    """An image file of any format, preprocessed."""
    picture = Image.fromarray(np.arange(16 * 12 * 3, dtype=np.uint8).reshape(12, 16, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation
    for kind in FORMATS:
        file = io.BytesIO()
        picture.save(file, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}))
        (corpus / kind).write_bytes(file.getvalue())

    def read(content: bytes) -> object:
        return preprocess(content, SPEC)

    return read


TARGETS = {"manifest": manifest_target, "package": package_target, "image": image_target}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=600)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        child = os.fork()  # the fuzzer ends its process without cleaning up
        if not child:
            fuzz(TARGETS[given.target], Path(work), given.seconds)
        _, status = os.waitpid(child, 0)
    sys.exit(os.waitstatus_to_exitcode(status))


def fuzz(target: Callable[[Path, Path], Callable[[bytes], object]], work: Path, seconds: int) -> None:
    """Fuzz a target, and end the process."""
    corpus = work / "corpus"
    corpus.mkdir()
    read = target(work, corpus)

    def one_input(content: bytes) -> None:
        with suppress(UserError):
            read(content)

    options = [
        f"-max_total_time={seconds}", f"-timeout={SECONDS}", f"-rss_limit_mb={MEGABYTES}",
        f"-max_len={LONGEST}", "-seed=1", "-print_final_stats=1",
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(corpus)], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
