"""The digest of a stage's code: what changes it, what does not, and that no module is forgotten."""

from __future__ import annotations

import shutil
from pathlib import Path

import grimp
import pytest

from dsvl_export.exporter import stage_code
from dsvl_export.version import PACKAGES, ROOT, code_digest

KINDS = {name: getattr(stage_code, name) for name in dir(stage_code) if name.isupper()}
# The modules that a kind of stage calls.
CALLS = {
    "RECORDING": ("reference.session", "reference.goldens.record", "reference.checkpoint.specs"),
    "CALIBRATION": ("dsvl_export.quantization.calibrate", "calibration.precision_plan"),
    "QUANTIZATION_ERROR": (
        "dsvl_export.parity_check.quantization_error",
        "calibration.quantized_weights",
    ),
    "LAYERS": ("reference.goldens.layers", "calibration.planned_model"),
    "ARTIFACTS": (
        *(
            f"dsvl_export.compilers.{name}"
            for name in (
                "coreai",
                "coreml",
                "executorch",
                "onnxruntime",
                "openvino",
                "tensorrt",
                "tensorrt_rtx",
            )
        ),
        "dsvl_export.planning.workload",
    ),
    "ADAPTERS": ("calibration.switchable_adapter", "runtimes.backends.onnxruntime_adapters"),
}
# Modules that these import, and that change no byte of a file.
WITHOUT_INFLUENCE = {
    "dsvl_export.cluster.ray_cluster",  # where samples are run
    "dsvl_export.targets.machine",
    "dsvl_export.version",  # in the inputs of every stage
    "reference.tiny",  # the place of the checkpoint `tiny`, whose files are hashed
    "runtimes.hub",  # brings the same files
    "runtimes.installation",  # texts of errors
    "runtimes.memory",  # how many samples are run at once
    "runtimes.units",
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages whose files can be changed."""
    root = tmp_path_factory.mktemp("tree")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    return root


def digests(root: Path) -> dict[str, str]:
    code_digest.cache_clear()
    return {name: code_digest(paths, root) for name, paths in KINDS.items()}


def changed_by(root: Path, path: str) -> set[str]:
    """The kinds of stages whose digest a change of one file changes."""
    before, file = digests(root), root / path
    content = file.read_bytes()
    file.write_bytes(content + b"\n# changed\n")
    after = digests(root)
    file.write_bytes(content)
    return {name for name in KINDS if before[name] != after[name]}


@pytest.mark.parametrize(
    "path",
    [
        "dsvl_export/cli/export.py",
        "dsvl_export/cli/display.py",
        "dsvl_export/exporter/config.py",
        "dsvl_export/exporter/stages.py",
        "dsvl_export/exporter/staging.py",
        "dsvl_export/parity_check/report/html.py",
        "dsvl_export/parity_check/tolerances.py",
        "dsvl_export/planning/plan.py",
        "dsvl_export/serving/models.py",
        "runtimes/generation/sampling.py",
        "runtimes/pipeline.py",
        "runtimes/scheduler.py",
    ],
)
def test_what_no_stage_computes_with_changes_no_digest(tree: Path, path: str) -> None:
    assert changed_by(tree, path) == set()


@pytest.mark.parametrize(
    ("path", "kinds"),
    [
        ("reference/model/decoder.py", set(KINDS)),
        ("runtimes/goldens/golden.py", set(KINDS)),
        ("calibration/quantized_weights.py", set(KINDS) - {"REFERENCE", "RECORDING"}),
        ("calibration/recipes/int8.yaml", set(KINDS) - {"REFERENCE", "RECORDING"}),
        ("dsvl_export/quantization/calibrate.py", {"CALIBRATION"}),
        ("calibration/switchable_adapter.py", set(KINDS) - {"REFERENCE", "RECORDING"}),
        ("runtimes/backends/onnxruntime_adapters.py", {"ARTIFACTS", "ADAPTERS"}),
        ("dsvl_export/parity_check/quantization_error.py", {"QUANTIZATION_ERROR", "LAYERS"}),
        ("dsvl_export/parity_check/layers.py", {"LAYERS"}),
        ("dsvl_export/compilers/onnx/lower.py", {"ARTIFACTS"}),
        ("dsvl_export/compilers/mil/listing.swift", {"ARTIFACTS"}),
        ("dsvl_export/targets/options.py", {"ARTIFACTS"}),
        ("runtimes/backends/onnxruntime.py", {"ARTIFACTS"}),
    ],
)
def test_what_a_stage_computes_with_changes_its_digest(tree: Path, path: str, kinds: set[str]) -> None:
    assert changed_by(tree, path) == kinds


def test_a_new_file_and_a_new_name_change_the_digest(tree: Path) -> None:
    before = digests(tree)["REFERENCE"]
    file = tree / "reference/model/new.py"
    file.write_text("")
    assert digests(tree)["REFERENCE"] != before
    file.unlink()
    cache = tree / "reference/model/__pycache__"
    cache.mkdir()
    (cache / "decoder.cpython-311.pyc").write_bytes(b"\0")
    assert digests(tree)["REFERENCE"] == before


def test_a_path_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="reference"):
        code_digest(("reference",), tmp_path)


@pytest.fixture(scope="module")
def imports() -> grimp.ImportGraph:
    return grimp.build_graph(*PACKAGES, cache_dir=None)


@pytest.mark.parametrize("kind", CALLS)
def test_every_imported_module_is_covered(imports: grimp.ImportGraph, kind: str) -> None:
    """What a stage calls imports no module of ours, at any depth, that its list leaves out."""
    called = set(CALLS[kind])
    modules = called.union(*(imports.find_upstream_modules(module) for module in called))
    paths = [ROOT / path for path in KINDS[kind]]

    def is_covered(module: str) -> bool:
        file = ROOT / module.replace(".", "/")
        return any(path in (file, *file.parents, file.with_suffix(".py")) for path in paths)

    assert {module for module in modules if not is_covered(module)} <= WITHOUT_INFLUENCE
