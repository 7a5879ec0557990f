"""What a Jetson needs: the runtime works where torch, transformers and onnx cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from runtimes.bundle.bundle import Bundle

REFUSE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "onnx", "onnxscript", "reference"}:
            raise ModuleNotFoundError(f"{name} is refused here", name=name)

sys.meta_path.insert(0, Refuse())
"""

SCRIPT = (
    REFUSE
    + """
import runtimes
from dsvl_export import Pipeline, parity
heavy = {"onnxruntime", "torch"} & set(sys.modules)
assert not heavy, f"imported too early: {heavy}"
answer = Pipeline.open(sys.argv[1]).chat("Describe the picture.", [sys.argv[2]])
print(answer.text)
assert parity(sys.argv[1]).passed
"""
)


def test_answer_and_parity_without_torch(tiny_bundle: Bundle, pictures: list[Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tiny_bundle.folder), str(pictures[0])],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The ")


def test_importing_the_package_imports_no_backend() -> None:
    code = (
        "import sys, dsvl_export, runtimes, dsvl_export.cli\n"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_export_without_torch_names_what_to_install() -> None:
    code = f"{REFUSE}\nsys.argv = ['dsvl-export', 'export', 'tiny', '--output', 'unused']\nimport dsvl_export.cli\ndsvl_export.cli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "Error: This command needs torch; run: pip install 'dsvl-export[export]'.\n"
