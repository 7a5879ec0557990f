"""Private and brittle interfaces of other libraries: one module uses each, and a test says which one broke.

The operators of ``quantized_decomposed`` and the layout of Core ML's weight files have tests of their own,
in ``tests/calibration/test_quantized_program.py`` and ``tests/runtimes/backends/test_mil_blob.py``.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

from calibration.precision_plan import LayerPrecision
from calibration.quantized_program import QuantizedConv2d, QuantizedLinear, quantize_layer
from dsvl_export.version import PACKAGES

ROOT = Path(__file__).parents[1]
# Private name → the only file that uses it.
PRIVATE = {
    "coremltools.converters.mil.backend.mil.helper._get_offset_by_writing_data": "dsvl_export/compilers/mil/package.py",
    "coreai_torch._compression.custom_layers": "dsvl_export/compilers/coreai_asset/lower.py",
    "executorch.extension.pybindings.portable_lib._load_program": "runtimes/backends/executorch.py",
    "executorch.extension.pybindings.portable_lib._threadpool_get_thread_count": "runtimes/backends/executorch.py",
    "executorch.extension.pybindings.portable_lib._unsafe_reset_threadpool": "runtimes/backends/executorch.py",
    "torch._check": "dsvl_export/compilers/executorch_program/xnnpack_operators.py",
    "torch._int_mm": "dsvl_export/targets/targets.py",
    "torch._subclasses.fake_tensor.FakeTensorMode": "reference/trace.py",
    "torch.ao.quantization.fx._decomposed": "calibration/quantized_program.py",
}
# Files that change the class of another library's object: one function in each.
CHANGED_CLASSES = {"calibration/quantized_program.py", "dsvl_export/compilers/engines/network.py"}


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def private_names(tree: ast.AST) -> Iterator[str]:
    """Private names of other libraries that a module imports or reads from an imported module."""
    imported: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                imported[name.asname or name.name] = name.name
                yield name.name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for name in node.names:
                imported[name.asname or name.name] = f"{node.module}.{name.name}"
                yield f"{node.module}.{name.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = imported.get(node.value.id)
            if module and not module[0].isupper():
                yield f"{module}.{node.attr}"


def modules() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            yield str(file.relative_to(ROOT)), ast.parse(file.read_text(encoding="utf-8"))


def test_one_file_uses_each_private_interface() -> None:
    """A new use belongs into the file that is named here, or into the table with its own test."""
    uses = {
        (name, file)
        for file, tree in modules()
        for name in private_names(tree)
        if is_private(name) and name.partition(".")[0] not in (*PACKAGES, "__future__")
    }
    assert uses == set(PRIVATE.items())


def test_the_scan_finds_private_names() -> None:
    code = "import a._b\nfrom c import _d\nimport e.f as g\ng._h\nfrom i import j\nj.k\nj.__l__"
    found = {name for name in private_names(ast.parse(code)) if is_private(name)}
    assert found == {"a._b", "c._d", "e.f._h"}


@pytest.mark.parametrize("name", PRIVATE)
def test_the_installed_release_has_it(name: str) -> None:
    """If this fails, the library moved or removed the name: change the file that ``PRIVATE`` gives for it."""
    pytest.importorskip(name.partition(".")[0])
    module, _, attribute = name.rpartition(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # coreai_torch's, of torch's version
        assert hasattr(import_module(module), attribute) or import_module(name), PRIVATE[name]


def test_core_ai_registers_its_operators() -> None:
    """If this fails, change the import in ``dsvl_export/compilers/coreai_asset/lower.py``."""
    pytest.importorskip("coreai_torch")
    import_module("dsvl_export.compilers.coreai_asset.lower")
    for operator in ("quantize", "dequantize", "lut_to_dense", "constexpr_blockwise_shift_scale"):
        assert hasattr(torch.ops.coreai, operator), operator


def test_the_exporter_of_core_ml_can_be_extended() -> None:
    """If this fails, change ``_StreamingExporter`` in ``dsvl_export/compilers/mil/package.py``."""
    load = pytest.importorskip("coremltools.converters.mil.backend.mil.load")
    for method in ("create_file_value", "get_blob_writer", "get_weight_path"):
        assert callable(getattr(load.MILProtoExporter, method)), method
    program = import_module("coremltools.converters.mil.mil").Program()
    assert load.MILProtoExporter(program, "", 9).weight_id_to_file_value == {}


def test_few_files_change_classes() -> None:
    """For TensorRT's, ``tests/dsvl_export/exporter/test_build_engine.py`` fails where it is not allowed."""
    changing = {
        file
        for file, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and any(isinstance(target, ast.Attribute) and target.attr == "__class__" for target in node.targets)
    }
    assert changing == CHANGED_CLASSES


@pytest.mark.parametrize(
    ("layer", "quantized"), [(nn.Linear(4, 6), QuantizedLinear), (nn.Conv2d(3, 6, 2), QuantizedConv2d)]
)
def test_a_layer_takes_the_class_of_a_quantized_one(layer: nn.Module, quantized: type) -> None:
    """If this fails, PyTorch's layers no longer allow it: ``quantize_layer`` must replace them instead."""
    weight = layer.weight
    quantize_layer(layer, LayerPrecision("int8"))
    assert type(layer) is quantized
    assert layer.weight is weight
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias", "weight_scale", "input_scale"}
