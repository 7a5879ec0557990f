"""The audit: what differs from the checkpoint is named, whether or not the goldens would notice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

from calibration.quantized_program import trace_with_plan
from dsvl_export.audit import Audit, AuditedPart, audit
from dsvl_export.audit.onnx_file import compare_onnx
from dsvl_export.audit.reconverted import compare_reconverted
from dsvl_export.compilers.onnx.builder import Graph
from dsvl_export.compilers.onnx.dialect_ort import OrtDialect
from dsvl_export.compilers.onnx.lower import lower
from dsvl_export.compilers.onnx.writer import write_model
from dsvl_export.compilers.precisions import planned_weights
from dsvl_export.compilers.protocol import Compiled
from dsvl_export.exporter.export import export
from dsvl_export.parity_check import parity
from reference.checkpoint.checkpoint import open_checkpoint
from runtimes.backends.coreai import PROGRAM
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.files import read_json, write_json
from runtimes.bundle.manifest import MANIFEST
from runtimes.errors import UserError
from tests.dsvl_export.cli.command_line import refused
from tests.dsvl_export.compilers.package_faults import FAULTS
from tests.dsvl_export.compilers.package_faults import plant as plant_package
from tests.dsvl_export.parity_check.faults import Edit, attribute, node, plant, rehash, scaled, weight


def audited(bundle: Bundle | Path, backend: str = "onnxruntime", precision: str | None = None) -> Audit:
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    return audit(opened, open_checkpoint("tiny"), backend, precision)


def differences(result: Audit) -> dict[str, str]:
    """Part → the names of what differs, and the details."""
    return {part.name: "; ".join(map(str, part.differences)) for part in result.parts if part.differences}


def test_a_bundle_passes(run, tiny_bundle: Bundle) -> None:
    done = run("verify", tiny_bundle.folder, "--weights", "tiny", "--json")
    report = json.loads(done.out)["audit"]
    assert done.code == 0
    assert report["verdict"] == "passed"
    parts = {part["name"]: part for part in report["parts"]}
    assert parts["onnxruntime/fp32/decoder"]["tensors"] == 42
    assert parts["onnxruntime/fp16/decoder"]["nodes"] == 69
    assert parts["token_embedding"]["values"] == 512 * 128


def test_an_export_audits_what_it_has_written(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = tiny_bundle.manifest
    for item in manifest.artifacts:
        assert item.audited == {path: manifest.files[path].sha256 for path in item.files}

    def write(graph: Graph, file: Path, *rest: Any, **more: Any) -> list[Path]:
        written = write_model(graph, file, *rest, **more)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        return written

    monkeypatch.setattr("dsvl_export.compilers.onnxruntime.write_model", write)
    with pytest.raises(UserError, match="differ from the checkpoint .* run the same command again"):
        export("tiny", tmp_path / "bundle")
    assert not (tmp_path / "bundle" / MANIFEST).exists()


def test_parity_tells_a_file_that_was_changed_after_its_audit(bundle_copy: Path) -> None:
    """A single weight of the last bit, which no request tells from rounding."""
    path = "onnxruntime/fp16/decoder/decoder.onnx"
    model = onnx.load(str(bundle_copy / path))
    (tensor,) = [item for item in model.graph.initializer if item.name == "norm.weight"]
    values = numpy_helper.to_array(tensor).copy()
    values[7] = np.nextafter(values[7], np.float16(0))
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, str(bundle_copy / path))
    bundle = Bundle.open(bundle_copy)
    audited_hashes = [dict(item.audited) for item in bundle.manifest.artifacts]
    rehash(bundle_copy, path)
    result = parity(bundle_copy, precision="fp16")
    assert (result.verdict, result.stage("audit").state) == ("passed", "not run")
    assert "run verify --weights" in result.stage("audit").detail
    changed = Bundle.open(bundle_copy)
    for item, hashes in zip(changed.manifest.artifacts, audited_hashes, strict=True):
        item.audited.update(hashes)
    result = parity(changed, precision="fp16")
    assert [stage.name for stage in result.stages if stage.state == "failed"] == ["audit"]
    assert path in result.stage("audit").detail
    assert parity(changed, precision="fp32").stage("audit").state == "passed"
    for item in changed.manifest.artifacts:
        item.audited.pop(path, None)
    assert (
        parity(changed, precision="fp16").stage("audit").state == "not run"
    )  # one of its files is not known


@pytest.mark.parametrize("precision", ["int8", "8da4w"])
def test_quantized_bundles_pass(quantized_bundle: Bundle, precision: str) -> None:
    assert audited(quantized_bundle, precision=precision).verdict == "passed"


def swapped_columns(values: np.ndarray) -> np.ndarray:
    values[..., [3, 4]] = values[..., [4, 3]]
    return values


def zeroed_row(row: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values[row] = 0
        return values

    return change


def all_epsilons(model: onnx.ModelProto) -> None:
    for item in model.graph.node:
        for field in item.attribute:
            if field.name == "epsilon":
                field.f = 1e-3


def without_a_node(model: onnx.ModelProto) -> None:
    del model.graph.node[5]


def reordered(model: onnx.ModelProto) -> None:
    first, second = model.graph.node[0], model.graph.node[1]
    kept = onnx.NodeProto()
    kept.CopyFrom(first)
    first.CopyFrom(second)
    second.CopyFrom(kept)


# Faults that the goldens of tiny do not show in some precision, and what must be named.
HIDDEN: list[tuple[str, str, str, Edit, str]] = [
    ("fp16", "vision_encoder", "all epsilons", all_epsilons, "has epsilon 0.001"),
    ("fp32", "decoder", "a RoPE row beyond the goldens", weight("cos", zeroed_row(790)),
     "cos: 0 at [790, 0]"),
    ("fp32", "decoder", "a window", node("layers.2.self_attn/cached_attention",
     attribute("local_window_size", 400)), "has local_window_size 400, expected none"),
    ("fp16", "decoder", "swapped channels", weight("layers.1.self_attn.k_proj.weight_transposed",
     swapped_columns), "layers.1.self_attn.k_proj.weight_transposed"),
    ("fp16", "adaptor", "a bias off by a rounding", weight("layers.1.bias", scaled(1.001)), "layers.1.bias"),
    ("fp32", "adaptor", "a missing node", without_a_node, "is missing"),
    ("fp32", "adaptor", "another order", reordered, "the order of its nodes"),
    ("int8", "decoder", "a scale off by 1.3", weight("layers.1.mlp.up_proj/to_folded_4_of_codes",
     scaled(1.3)), "layers.1.mlp.up_proj/to_folded_4_of_codes"),
    ("8da4w", "decoder", "codes of a row", weight("layers.0.mlp.down_proj/quantize_per_channel_group_folded",
     zeroed_row(3)), "layers.0.mlp.down_proj/quantize_per_channel_group_folded"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("precision", "component", "what", "edit", "named"),
    HIDDEN,
    ids=lambda v: v[:30] if isinstance(v, str) else "edit",
)
def test_hidden_faults_are_named(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    precision: str,
    component: str,
    what: str,
    edit: Edit,
    named: str,
) -> None:
    source = request.getfixturevalue("tiny_bundle" if precision in ("fp32", "fp16") else "quantized_bundle")
    copy = Path(shutil.copytree(source.folder, tmp_path / "bundle"))
    result = audited(plant(copy, precision, component, edit), precision=precision)
    assert result.exit_code == 1
    found = differences(result)
    assert list(found) == [f"onnxruntime/{precision}/{component}"], what
    assert named in found[f"onnxruntime/{precision}/{component}"]


def test_rows_of_the_token_table_are_compared(run, bundle_copy: Path) -> None:
    file = bundle_copy / "token_embedding/token_embedding.safetensors"
    (table,) = load_file(file).values()
    table = table.copy()
    table[500] = 0
    save_file({"token_embedding": table}, file)
    rehash(bundle_copy, "token_embedding/token_embedding.safetensors")
    done = run("verify", bundle_copy, "--weights", "tiny", "--precision", "fp32")
    assert done.code == 1
    assert "token_embedding differs: token_embedding, rows 0 to 511: 0 at [500, 0], expected" in done.out
    assert "128 of 65536 values differ" in done.out


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("preprocessing", "mean"), [0.5, 0.5, 0.4]),
        (("prompt", "system_prompt"), "Answer in French."),
        (("prompt", "eos_ids"), [7]),
        (("model", "decoder", "rope_theta"), 1.0),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)
def test_settings_of_the_manifest_are_compared(
    bundle_copy: Path, path: tuple[str, ...], value: object
) -> None:
    raw = read_json(bundle_copy / MANIFEST)
    *folders, last = path
    place = raw
    for name in folders:
        place = place[name]
    place[last] = value
    write_json(bundle_copy / MANIFEST, raw)
    found = differences(audited(bundle_copy, precision="fp32"))
    assert list(found) == ["manifest"]
    assert found["manifest"].startswith(".".join(path))


def test_a_tokenizer_that_decodes_differently_is_named(bundle_copy: Path) -> None:
    file = bundle_copy / "tokenizer/tokenizer.json"
    file.write_text(
        file.read_text(encoding="utf-8").replace('"type": "ByteLevel"', '"type": "Fuse"', 1), encoding="utf-8"
    )
    rehash(bundle_copy, "tokenizer/tokenizer.json")
    assert list(differences(audited(bundle_copy, precision="fp32"))) == ["tokenizer"]


def test_weights_beside_a_graph_are_read_where_they_lie(tmp_path: Path, quantized_bundle: Bundle) -> None:
    """Files above 64 MB have them there."""
    weights = planned_weights(open_checkpoint("tiny"), quantized_bundle.folder, "8da4w")
    traced = trace_with_plan(weights.source.config, "decoder", weights.plan)
    graph = lower(traced, lambda name: weights.load(f"decoder.{name}"), OrtDialect())
    file, data = write_model(graph, tmp_path / "decoder.onnx", lambda count: None, external_above=0)

    def compared() -> AuditedPart:
        part = AuditedPart("decoder")
        compare_onnx(graph, file, part, lambda count: None)
        return part

    assert compared().state == "passed"
    model = onnx.load(str(file), load_external_data=False)
    tensor = next(item for item in model.graph.initializer if item.external_data)
    offset = int(tensor.external_data[1].value)
    with data.open("r+b") as handle:
        handle.seek(offset + 5)
        handle.write(b"\x7f")
    assert [item.name for item in compared().differences] == [tensor.name]
    with data.open("r+b") as handle:
        handle.truncate(offset + 5)
    assert "is stored beyond the end" in compared().differences[0].detail
    tensor.external_data[0].value = "../decoder.onnx.data"
    onnx.save(model, str(file))
    assert "which is not a file next to" in compared().differences[0].detail


def test_another_checkpoint_is_refused(run, pair, tiny_bundle: Bundle) -> None:
    assert refused(run("verify", tiny_bundle.folder, "--precision", "fp16"), "pass --weights CHECKPOINT too")
    done = run("verify", tiny_bundle.folder, "--weights", pair.checkpoint.folder)
    assert refused(done, "is not the checkpoint that")


PACKAGE_FAULTS = [fault for fault in FAULTS if fault.precision == "fp16"][::6]


@pytest.mark.parametrize("fault", PACKAGE_FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_faults_in_core_ml_packages_are_named(apple_bundle: Bundle, tmp_path: Path, fault) -> None:
    copy = Path(shutil.copytree(apple_bundle.folder, tmp_path / "bundle"))
    found = differences(audited(plant_package(copy, "fp16", fault.component, fault.edit), "coreml"))
    assert list(found) == [f"coreml/fp16/{fault.component}"]


@pytest.mark.full
def test_apples_formats_pass_and_their_weights_are_compared(apple_bundle: Bundle, tmp_path: Path) -> None:
    assert audited(apple_bundle, "coreml").verdict == "passed"
    copy = Path(shutil.copytree(apple_bundle.folder, tmp_path / "bundle"))
    assert audited(copy, "coreai").verdict == "passed"
    path = f"coreai/fp32/adaptor/adaptor.aimodel/{PROGRAM}"
    content = bytearray((copy / path).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / path).write_bytes(content)
    found = differences(audited(rehash(copy, path), "coreai"))
    assert list(found) == ["coreai/fp32/adaptor"]
    assert "main.mlirb, weights" in found["coreai/fp32/adaptor"]


def test_the_listing_for_apps_is_compared(apple_bundle: Bundle, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(apple_bundle.folder, tmp_path / "bundle"))
    (path,) = (path for path in Bundle.open(copy).manifest.files if path.startswith("coreml/fp16/listing/"))
    text = (copy / path).read_text(encoding="utf-8")
    (copy / path).write_text(text.replace("128", "129", 1), encoding="utf-8")
    assert list(differences(audited(rehash(copy, path), "coreml"))) == ["coreml/fp16/listing"]


@pytest.mark.parametrize(
    ("tools", "strict", "state"),
    [({"a": "1"}, True, "failed"), ({"a": "2"}, True, "not audited"), ({"a": "1"}, False, "not audited")],
)
def test_what_cannot_be_told_is_not_passed(
    tmp_path: Path, tools: dict[str, str], strict: bool, state: str
) -> None:
    """Files that differ fail where the same tool is known to write the same bytes, and there alone."""
    stage, folder = tmp_path / "stage", tmp_path / "again"
    stage.mkdir()
    folder.mkdir()
    (stage / "model.bin").write_bytes(b"abd")

    def compile_into(folder: Path) -> Compiled:
        (folder / "model.bin").write_bytes(b"abc")
        return Compiled((folder / "model.bin",), "cpu", "none", {"a": "1"})

    part = AuditedPart("a part")
    compare_reconverted(compile_into, folder, stage, tools, part, strict)
    assert part.state == state
    (stage / "model.bin").write_bytes(b"abc")
    part = AuditedPart("a part")
    compare_reconverted(compile_into, folder, stage, tools, part, strict)
    assert part.state == "passed"


@pytest.mark.full
def test_engines_are_not_passed(rtx: Bundle) -> None:
    result = audited(rtx, "tensorrt_rtx", "fp16")
    assert result.exit_code == 3
    assert {part.state for part in result.parts if part.name.startswith("tensorrt_rtx")} == {"not audited"}


def test_a_backend_that_is_not_there_is_refused(tiny_bundle: Bundle) -> None:
    with pytest.raises(UserError, match="holds no coreml"):
        audited(tiny_bundle, "coreml")
