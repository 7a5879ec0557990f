"""The version of this package, and of its code."""

from __future__ import annotations

from functools import cache
from pathlib import Path

__version__ = "0.5.0.dev0"
PACKAGES = ("calibration", "dsvl_export", "reference", "runtimes")
ASIDE = {"__pycache__", "cli", "report", "serving"}  # what is there changes no artifact


@cache
def code_digest() -> str:
    """SHA-256 of sources and data: in a checkout, what an export writes can change without the version."""
    import hashlib

    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*")):
            name = file.relative_to(root)
            if file.is_file() and not ASIDE.intersection(name.parts):
                digest.update(name.as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
