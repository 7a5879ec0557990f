"""The linter against its corpus, and against TensorRT-RTX's own parser and builder on the same files."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from packaging.version import Version

from dsvl_export.compilers.engines.build import EngineSettings, build_engine
from dsvl_export.lint import Finding, Release, lint
from dsvl_export.lint.bundles import summarize_findings
from dsvl_export.lint.operators import RULES, operator_table
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.contracts import Contract, TensorSpec
from runtimes.errors import UserError
from tests.dsvl_export.linter_corpus import CASES, Case, quantized, unary

# Taken by the parser without a word, so no verdict of its can agree.
SILENT = {"zero-point"}


def saved(case: Case, folder: Path) -> Path:
    file = folder / "model.onnx"
    onnx.save(case.model, str(file))
    return file


def contract_of(model: onnx.ModelProto) -> Contract:
    """The file's own inputs, so that dynamic dims get a profile."""
    specs = []
    for value in model.graph.input:
        dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        specs.append(TensorSpec(value.name, "float32", tuple(dims), ""))
    return Contract("a test", tuple(specs), ())


@pytest.mark.parametrize("name", CASES)
def test_the_linter_names_the_rule(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    found = lint(saved(case, tmp_path), Release.tensorrt_rtx(case.sm))
    assert {finding.rule for finding in found} == set(case.rules), [str(finding) for finding in found]
    nodes = {item.name for item in case.model.graph.node}
    values = {value.name for value in (*case.model.graph.input, *case.model.graph.initializer)}
    for finding in found:
        assert finding.node in nodes | values | {
            "the file",
            *(output for item in case.model.graph.node for output in item.output),
        }
        assert finding.remedy
        assert str(finding).startswith(finding.node)


@pytest.mark.parametrize("name", CASES)
def test_the_linter_agrees_with_tensorrt_rtx(name: str, tmp_path: Path) -> None:
    """No false accept and no false reject: what is harmful is refused by the parser or builder, or warned of."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is there for Linux on x86-64 alone")
    case = CASES[name]
    file = saved(case, tmp_path)
    findings = [found for found in lint(file, Release.tensorrt_rtx(case.sm)) if found.harmful]
    harmful = any(not (found.effect == "changed" and found.rule in SILENT) for found in findings)
    settings = EngineSettings(capacity=16, compute_capabilities=(case.sm,))
    try:
        build_engine(trt, file, contract_of(case.model), settings, tmp_path / "model.engine")
        refused = ""
    except UserError as error:
        refused = str(error)
    assert bool(refused) == harmful, refused or [str(finding) for finding in findings]
    assert (tmp_path / "model.engine").exists() != bool(refused)


def test_the_corpus_is_large_enough() -> None:
    good = [name for name, case in CASES.items() if not case.rules]
    assert len(CASES) >= 40 and len(good) >= 20 and len(CASES) - len(good) >= 40
    assert {case.model.graph.node[0].op_type for case in CASES.values()} >= set(RULES)


def test_every_imported_operator_is_one_that_tensorrt_rtx_supports() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is there for Linux on x86-64 alone")
    from runtimes.backends.engines.library import get_logger

    builder = trt.Builder(get_logger(trt))
    parser = trt.OnnxParser(builder.create_network(0), get_logger(trt))
    known = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    for operator in known:
        if operator not in ("LinearAttention", "CausalConvWithState"):  # newer than this release writes
            assert parser.supports_operator(operator) == (operator in operator_table()), operator


@pytest.mark.parametrize(
    ("name", "version", "rules"),
    [
        ("attention in half", "10.3", {"operator", "opset"}),
        ("attention in half", "10.14", {"opset"}),
        ("attention in half", "10.15", set()),
        ("RoPE", "10.14", {"operator", "opset"}),
        ("cache", "10.15", set()),
        ("int8 layer", "10.15", set()),
    ],
)
def test_versions_differ(name: str, version: str, rules: set[str], tmp_path: Path) -> None:
    found = lint(saved(CASES[name], tmp_path), Release(Version(version)))
    assert {finding.rule for finding in found} == rules


def test_capabilities_of_jetson(tmp_path: Path) -> None:
    """FP8 on Orin (SM 87) is refused, on Thor (SM 110) it is not; TensorRT-RTX knows neither."""
    file = saved(Case(quantized(codes="float8_e4m3fn")), tmp_path)
    (orin,) = lint(file, Release(Version("11.4"), 87))
    assert str(orin).endswith("float8e4m3fn needs SM 89, this is SM 87; use int8 for this GPU.")
    assert lint(file, Release(Version("11.4"), 110)) == []


def test_harmful_findings_come_first(tmp_path: Path) -> None:
    case = Case(quantized(scale=[0.1] * 31 + [0.0], zero=[0] * 32))
    found = lint(saved(case, tmp_path), Release.tensorrt_rtx())
    assert [finding.harmful for finding in found] == sorted((f.harmful for f in found), reverse=True)
    assert {finding.effect for finding in found} == {"refused", "unusual"}


def test_what_is_no_onnx_file(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"\xff\xff no")
    with pytest.raises(UserError, match="is not a readable ONNX file"):
        lint(tmp_path / "x.onnx", Release.tensorrt_rtx())


def test_a_file_for_a_newer_tensorrt_is_named_as_such(tmp_path: Path) -> None:
    (found,) = lint(saved(Case(unary("Relu", opset=24)), tmp_path), Release(Version("10.3")))
    assert (
        str(found)
        == "the file: TensorRT 10.3 supports opsets up to 21, this is 24; export it for TensorRT 10.3."
    )


def test_what_was_not_checked_is_not_reported_as_good(tiny_bundle: Bundle, run) -> None:
    """Files for ONNX Runtime: for a target that does not run them, nothing is said of them."""
    for wanted in (["--target", "jetson-orin"], ["--tensorrt", "11.4"], ["--sm", "87"]):
        done = run("lint", tiny_bundle.folder, *wanted)
        assert done.code == 3
        assert done.out.endswith("Nothing was checked: none of 6 files is for TensorRT.\n")
        assert done.out.count("not checked: the file: it is for onnxruntime, not for TensorRT") == 6
        listed = run("lint", tiny_bundle.folder, *wanted, "--json")
        assert listed.code == 3
        found = json.loads(listed.out)
        assert {row["effect"] for rows in found.values() for row in rows} == {"not checked"}
    file = tiny_bundle.folder / "onnxruntime/fp32/decoder/decoder.onnx"
    alone = run("lint", file, "--target", "jetson-orin")
    assert alone.code == 1 and "GroupQueryAttention" in alone.out
    assert run("lint", tiny_bundle.folder).code == 0


def test_a_target_without_tensorrt_is_refused(tiny_bundle: Bundle, run) -> None:
    for target in ("iphone", "android", "cpu"):
        done = run("lint", tiny_bundle.folder, "--target", target)
        assert done.code == 2
        assert "lint checks files for TensorRT, which" in done.err and "jetson-agx-orin" in done.err


def test_files_of_both_kinds_are_counted_apart() -> None:
    fine: list[Finding] = []
    apart = [Finding("the file", "not-checked", "not checked", "it is for coreml", "export it")]
    bad = [Finding("x", "operator", "refused", "no", "do")]
    assert summarize_findings({Path("a"): fine, Path("b"): fine}) == "All 2 files keep the rules."
    assert (
        summarize_findings({Path("a"): fine, Path("b"): apart})
        == "1 files keep the rules, 1 more were not checked."
    )
    assert summarize_findings({Path("a"): fine, Path("b"): bad, Path("c"): apart}).startswith(
        "1 of 2 files break a rule"
    )
