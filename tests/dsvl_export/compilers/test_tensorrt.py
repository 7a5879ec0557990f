"""TensorRT bundles: engines built without a GPU, parity on the same files, targets, and building on a device."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import onnx
import pytest

from dsvl_export.compilers.engines.build import EngineSettings, build_engine
from dsvl_export.exporter.export import export
from dsvl_export.lint.bundles import lint_path
from dsvl_export.parity_check import parity
from dsvl_export.parity_check.report.record import record_verdict
from dsvl_export.planning.plan import Planner, Request
from dsvl_export.targets.targets import find_target
from reference.checkpoint.checkpoint import open_checkpoint
from reference.tiny import HELDOUT
from runtimes.bundle.bundle import Bundle
from runtimes.errors import UserError
from runtimes.goldens.task import load_task
from runtimes.pipeline import Pipeline
from tests.conftest import OraclePair
from tests.grids import variants_by_precision

MORE_PRECISIONS = [pytest.param(name, marks=pytest.mark.full) for name in ("fp8", "int4")]
NAMES = {"fp16": "fp16", "int8": "int8-fp16", "fp8": "fp8-fp16", "int4": "int4-fp16"}
PROOF = f"built by TensorRT-RTX on CPU, numerics by ONNX Runtime {version('onnxruntime')} on the same file"


@pytest.mark.parametrize("precision", ["fp16", "int8", *MORE_PRECISIONS])
def test_engines_and_parity_on_the_same_files(rtx: Bundle, precision: str) -> None:
    """Engines of every component, and all stages, taps and held-out questions on the ONNX they were built from."""
    backend_name, name = rtx.select("tensorrt_rtx", precision)
    assert name == NAMES[precision]
    result = parity(rtx, backend_name, name, task=load_task(HELDOUT)[::4], taps=True)
    assert str(result.execution) == PROOF
    assert result.passed, [stage for stage in result.stages if stage.state != "passed"]
    assert not any(localization.first for localization in result.localizations)
    assert result.task and result.task.accuracy_ratio and result.task.accuracy_ratio >= 0.99
    for component in ("vision_encoder", "adaptor", "decoder"):
        artifact = rtx.artifact(component, backend_name, name)
        assert artifact.engine and artifact.engine.file == artifact.files[-1]
        assert artifact.engine.sm == {"fp16": (86, 89, 120), "fp8": (89, 120)}.get(precision, (89,))
        assert rtx.manifest.files[artifact.engine.file].bytes > 50_000
        if precision in ("int8", "fp8"):
            codes = {node.op_type for node in onnx.load(str(rtx.path(artifact.files[0]))).graph.node}
            assert codes >= {"QuantizeLinear", "DequantizeLinear"}


def test_the_report_says_how_it_is_known(rtx: Bundle, tmp_path: Path) -> None:
    copy = Bundle.open(shutil.copytree(rtx.folder, tmp_path / "bundle"))
    page = record_verdict(copy, parity(copy, "tensorrt_rtx", "fp16"))
    assert PROOF in " ".join(page.read_text().split())
    assert Bundle.open(copy.folder).manifest.parity["tensorrt_rtx/fp16"]["execution"] == PROOF


@variants_by_precision({"siglip": ("int4",), "hybrid": ("fp16",)}, "int8", "fp8")
def test_random_checkpoints_build_and_pass_parity(
    trt: ModuleType, pair: OraclePair, precision: str, tmp_path: Path
) -> None:
    """Both variants, grouped queries among them; 4-bit groups that divide their widths."""
    if precision == "int4":
        (tmp_path / "four.yaml").write_text(
            "base: fp16\nrules: [{layers: 'decoder.*', kind: linear, precision: int4-g4}]"
        )
        precision = str(tmp_path / "four.yaml")
    bundle = export(
        pair.checkpoint.folder, tmp_path / "b", "tensorrt_rtx", [precision], capacity=256, capabilities=(89,)
    )
    result = parity(bundle, taps=True)
    assert str(result.execution) == PROOF
    assert result.passed, [stage for stage in result.stages if stage.state != "passed"]


@pytest.mark.parametrize(
    "precision", ["int8", *(pytest.param(name, marks=pytest.mark.full) for name in ("fp16", "int8-int4"))]
)
def test_jetpack_6_passes_parity(jetson: Bundle, precision: str) -> None:
    """Primitives of opset 20 (21 with 4-bit weights), for TensorRT 10.3 on SM 87."""
    result = parity(jetson, *jetson.select("tensorrt", precision), task=load_task(HELDOUT)[::4], taps=True)
    assert result.execution.kind == "simulated"
    assert result.passed, [stage for stage in result.stages if stage.state != "passed"]
    assert result.stage("layers").state == "passed"
    for component in ("vision_encoder", "adaptor", "decoder"):
        artifact = jetson.artifact(component, *jetson.select("tensorrt", precision))
        assert (artifact.target, artifact.dialect, artifact.tools["for"]) == (
            "jetson-agx-orin",
            "trt10",
            "10.3",
        )
        model = onnx.load(str(jetson.path(artifact.files[0])), load_external_data=False)
        four_bit = precision == "int8-int4" and component == "decoder"
        assert model.opset_import[0].version == (21 if four_bit else 20)
        assert not {node.domain for node in model.graph.node} - {""}
    assert all(not findings for findings in lint_path(jetson.folder).values())


@pytest.mark.parametrize("precision", ["fp16", "int8-fp16", "int8-int4-fp16"])
def test_tensorrt_rtx_builds_the_files_for_jetpack_6_too(
    trt: ModuleType, jetson: Bundle, precision: str, tmp_path: Path
) -> None:
    """Another release than theirs, but the nearest there is here: cache of dynamic length, two blocks of keys."""
    for component in ("vision_encoder", "adaptor", "decoder"):
        file = jetson.path(jetson.artifact(component, "tensorrt", precision).files[0])
        contract = jetson.manifest.contracts[precision][component]
        settings = EngineSettings(512, compute_capabilities=(86,))
        build_engine(trt, file, contract, settings, tmp_path / "engine")
        assert (tmp_path / "engine").stat().st_size > 50_000


def test_a_recipes_name_finds_it_on_another_base_and_nothing_else(jetson: Bundle) -> None:
    assert jetson.select("tensorrt", "int8") == ("tensorrt", "int8-fp16")
    others = replace(
        jetson.manifest,
        artifacts=tuple(item for item in jetson.manifest.artifacts if item.precision != "int8-fp16"),
    )
    with pytest.raises(
        UserError, match="holds no tensorrt int8; it has tensorrt fp16, tensorrt int8-int4-fp16"
    ):
        Bundle(jetson.folder, others).select("tensorrt", "int8")
    with pytest.raises(UserError, match="holds no tensorrt int8-int"):
        Bundle(jetson.folder, others).select("tensorrt", "int8-int")


@pytest.mark.parametrize("precision", ["fp16", "int8-int4"])
def test_plan_gives_the_bytes_of_the_onnx(jetson: Bundle, precision: str) -> None:
    source = open_checkpoint("tiny")
    plan = Planner(source.config, source.embedding_bytes()).plan(
        find_target("jetson-orin"), Request("tensorrt", precision, 200)
    )
    assert plan.exact
    for component, planned in plan.artifacts.items():
        files = jetson.artifact(component, *jetson.select("tensorrt", precision)).files
        assert planned == pytest.approx(sum(jetson.manifest.files[name].bytes for name in files), rel=0.02)


def test_fp8_on_orin_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"Orin 64 GB cannot run fp8 with tensorrt \(FP8 needs SM 89, this is SM 87\). The nearest precision is int8",
    ):
        export("tiny", tmp_path / "b", "tensorrt", ["fp8"], target="jetson-orin")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"target": "jetson-orinn"}, "There is no target 'jetson-orinn'"),
        ({"target": "iphone"}, "iPhone 16 Pro .* does not support the backend 'tensorrt'"),
        ({"tensorrt": "9.2"}, "TensorRT 9.2 is too old; the oldest supported version is 10.3"),
        (
            {"tensorrt": "10.3", "target": "b200"},
            "TensorRT 10.3 is too old for NVIDIA B200 .*; the oldest supported version is 10.8",
        ),
        ({"tensorrt": "new"}, "'new' is not a version of TensorRT"),
        ({"capacity": 100_000}, "capacity must lie between 1 and the model's"),
        ({"precisions": ["kv-int8"]}, "has no KV cache in int8; the nearest is float"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], sentence: str, tmp_path: Path) -> None:
    given = {"backend": "tensorrt", "precisions": ["fp16"], **options}
    with pytest.raises(UserError, match=sentence):
        export("tiny", tmp_path / "b", **given)  # type: ignore[arg-type]
    assert not (tmp_path / "b").exists()


def test_the_command_line(run, tmp_path: Path) -> None:
    done = run(
        "export",
        "tiny",
        "--target",
        "jetson-orin",
        "--precision",
        "int8",
        "--output",
        tmp_path / "b",
        "--no-parity",
    )
    assert done.code == 0 and "build-engine" in done.out
    bundle = Bundle.open(tmp_path / "b")
    assert bundle.choices() == [("tensorrt", "int8-fp16")]
    assert run("lint", tmp_path / "b").out == "All 3 files keep the rules.\n"
    listed = run("lint", tmp_path / "b", "--tensorrt", "10.3", "--sm", "87", "--json")
    assert listed.code == 0 and set(map(len, json.loads(listed.out).values())) == {0}
    asked = run("run", tmp_path / "b", "--prompt", "What is this?", "--device", "cpu", "--max-new-tokens", 2)
    assert asked.code == 0
    refused = run("run", tmp_path / "b", "--prompt", "What is this?")
    assert refused.code == 2 and len(refused.err.strip().splitlines()) == 1
    built = run("build-engine", tmp_path / "b")
    assert built.code == 2 and len(built.err.strip().splitlines()) == 1
    onnxruntime = run("build-engine", "does-not-exist")
    assert (onnxruntime.code, onnxruntime.err) == (2, "Error: There is no bundle folder does-not-exist.\n")


def test_a_newer_dialect_is_named_by_the_linter(rtx: Bundle, run) -> None:
    done = run("lint", rtx.folder / "tensorrt_rtx/fp16/decoder/decoder.onnx", "--target", "jetson-orin")
    assert done.code == 1
    assert "TensorScatter needs TensorRT 10.15, this is 10.3; export for TensorRT 10.3" in done.out


@pytest.mark.full
def test_bfloat16_is_built_and_nothing_is_claimed_of_its_numbers(trt: ModuleType, tmp_path: Path) -> None:
    """ONNX Runtime has no kernels for it on a CPU, so parity does not judge."""
    bundle = export(
        "tiny", tmp_path / "b", "tensorrt_rtx", ["bf16", "int8-bf16"], capacity=256, capabilities=(89,)
    )
    for precision in ("bf16", "int8-bf16"):
        result = parity(bundle, "tensorrt_rtx", precision)
        assert (result.verdict, result.execution.kind) == ("not judged", "built only")
        assert str(result.execution).startswith(
            "built only: TensorRT-RTX on CPU; ONNX Runtime has no bfloat16 kernels"
        )
        contract = bundle.manifest.contracts[precision]["decoder"]
        assert (contract.inputs[0].dtype, contract.states[0].dtype) == ("float32", "float16")
        file = bundle.path(bundle.artifact("decoder", "tensorrt_rtx", precision).files[0])
        types = {item.data_type for item in onnx.load(str(file)).graph.initializer}
        assert onnx.TensorProto.BFLOAT16 in types
    with pytest.raises(UserError, match="has no precision 'bf16'"):
        export("tiny", tmp_path / "c", "onnxruntime", ["bf16"])


# On a real GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "int8-fp16"])
def test_engines_pass_parity_on_the_gpu(engine_bundle: Bundle, precision: str) -> None:
    """All stages and held-out questions through TensorRT's own engines."""
    result = parity(engine_bundle, "tensorrt", precision, task=load_task(HELDOUT))
    assert result.execution.kind == "ran"
    assert result.passed, [stage for stage in result.stages if stage.state != "passed"]


@pytest.mark.gpu
def test_engines_answer_as_onnx_runtime_does_on_the_gpus_machine(engine_bundle: Bundle) -> None:
    picture = next((engine_bundle.folder / "goldens/images").iterdir())
    answers = {
        Pipeline.open(engine_bundle, "tensorrt", "fp16", device=device)
        .chat("Describe the picture.", [picture])
        .text
        for device in ("cpu", None)
    }
    assert len(answers) == 1
