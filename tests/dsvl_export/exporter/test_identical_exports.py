"""Two exports of the same input are the same bytes, whatever order sets and hashes have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsvl_export.exporter.export import export
from runtimes.bundle.files import sha256_of_file

EXPORT = """
import sys
from dsvl_export.exporter.export import export
for backend, precision in (("onnxruntime", "fp32"), ("coreml", "fp16")):
    export(sys.argv[1], sys.argv[2], backend, [precision])
"""


@pytest.mark.full
def test_exports_of_two_processes_are_identical(one_layer: Path, tmp_path: Path) -> None:
    """A new process, and this one, whose hashes have another seed and which has exported much before."""
    with subprocess.Popen(
        [sys.executable, "-c", EXPORT, str(one_layer), str(tmp_path / "new")],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        stderr=subprocess.PIPE,
    ) as process:
        export(one_layer, tmp_path / "here", "onnxruntime", ["fp32"])
        export(one_layer, tmp_path / "here", "coreml", ["fp16"])
        _, told = process.communicate()
    assert process.returncode == 0, told.decode()
    one, other = (
        {
            file.relative_to(folder).as_posix(): sha256_of_file(file)
            for file in folder.rglob("*")
            if file.is_file()
        }
        for folder in (tmp_path / "new", tmp_path / "here")
    )
    assert len(one) > 20 and "manifest.json" in one and "goldens/00.safetensors" in one
    assert one == other
