"""OpenVINO on a CPU: every precision, planted faults, and files and devices that it cannot use."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsvl_export import export
from dsvl_export.audit import audit
from dsvl_export.parity_check import parity
from reference.checkpoint.checkpoint import open_checkpoint
from reference.tiny import HELDOUT
from runtimes.backends import openvino as backend
from runtimes.backends.openvino_cache import GrowingCache
from runtimes.backends.openvino_fixed import FixedShapeAsset
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.manifest import MANIFEST
from runtimes.errors import UserError
from runtimes.goldens.task import load_task
from runtimes.pipeline import Pipeline
from runtimes.session import SessionOptions
from tests.conftest import OraclePair
from tests.dsvl_export.parity_check.faults import rehash, scaled, swapped_halves, zeroed
from tests.grids import variants_by_precision
from tests.shared import shared_bundle

openvino = pytest.importorskip("openvino", reason="openvino is not installed here")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4", "int8-weights", "kv-int8")
PLANS = {
    "int4": "rules: [{layers: 'decoder.layers.*', kind: linear, precision: int4-g4}]",
    "kv-int8-bf16": "base: bf16\nkv_cache: int8",
}


@pytest.fixture(scope="module")
def bundle(openvino_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """Tiny in every precision; tests must not change it."""

    def make(folder: Path) -> None:
        shutil.copytree(openvino_bundle.folder, folder)
        export("tiny", folder, "openvino", PRECISIONS)

    yield from shared_bundle(tmp_path_factory, "openvino-all", make)


@pytest.fixture
def copy(openvino_bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(openvino_bundle.folder, tmp_path / "bundle"))


def needs(precision: str) -> None:
    """Skip a test where the processor does not compute in bf16."""
    capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision == "bf16" and "BF16" not in capabilities:
        pytest.skip("it would prove the numbers of bf16, which this processor does not compute in")


@pytest.mark.parametrize(
    ("fixture", "precision"),
    [
        ("openvino_bundle", "fp32"),
        ("openvino_bundle", "bf16"),
        *(pytest.param("bundle", name, marks=pytest.mark.full) for name in PRECISIONS[2:]),
    ],
)
def test_every_precision_passes_parity(request: pytest.FixtureRequest, fixture: str, precision: str) -> None:
    needs(precision)
    found = request.getfixturevalue(fixture)
    result = parity(found, "openvino", precision, task=load_task(HELDOUT)[::4], taps=True)
    assert str(result.execution) == f"ran on cpu with openvino {backend.release()}"
    assert result.passed, [stage for stage in result.stages if stage.state != "passed"]
    assert all(localization.first is None for localization in result.localizations)
    if precision == "fp32":
        assert all(stage.errors.relative_rms < 1e-5 for stage in result.stages if stage.errors)


@variants_by_precision(
    {"siglip": ("int4",), "hybrid": ("int8", "kv-int8")}, "fp32", "fp16", "bf16", "kv-int8-bf16"
)
def test_random_checkpoints_of_both_variants(pair: OraclePair, precision: str, tmp_path: Path) -> None:
    """Grouped queries and both vision towers; groups that divide their small widths."""
    needs(precision.rpartition("-")[2])
    if text := PLANS.get(precision):
        (tmp_path / "plan.yaml").write_text(text)
        precision = str(tmp_path / "plan.yaml")
    made = export(pair.checkpoint.folder, tmp_path / "b", "openvino", [precision], capacity=256)
    result = parity(made, taps=True)
    assert result.passed, [stage for stage in result.stages if stage.state != "passed"]


def test_the_audit_converts_again(copy: Path) -> None:
    source = open_checkpoint("tiny")
    assert audit(Bundle.open(copy), source, "openvino", "fp32").verdict == "passed"
    file = copy / "openvino/fp32/decoder/decoder.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    result = audit(Bundle.open(copy), source, "openvino", "fp32")
    assert [part.name for part in result.parts if part.differences] == ["openvino/fp32/decoder"]


def test_a_long_conversation_equals_a_fresh_one(openvino_bundle: Bundle) -> None:
    """The states move within their buffers where they get longer: in prefill, in steps, and of rows."""
    decoder = Pipeline.open(openvino_bundle, "openvino", "fp32", threads=1).chain.decoder
    embeds = np.random.default_rng(0).standard_normal((1, 600, 128)).astype(np.float32)
    whole = decoder.new_cache(1, 600)
    expected = decoder.decode(embeds, np.arange(600), whole)
    parts = decoder.new_cache(3, 1000)
    found = []
    for start, stop in ((0, 250), (250, 259), (259, 520), (520, 600)):
        decoder.decode(embeds[:, :5], np.array([4]), parts.row(2))
        parts.row(2).rewind(5)
        found.append(decoder.decode(embeds[:, start:stop], np.arange(stop - start), parts.row(1)))
    assert np.allclose(np.concatenate(found, 1), expected, rtol=0, atol=1e-3)
    parts.copy_prefix(1, 0, 300)
    again = decoder.decode(embeds[:, 300:320], np.arange(20), parts.row(0))
    assert np.allclose(again, expected[:, 300:320], rtol=0, atol=1e-3)
    for array, other in zip(parts.arrays, whole.arrays, strict=True):
        assert array.shape[2] == 1000
        assert np.allclose(array[1, :, :600], other[0], rtol=0, atol=1e-3)


# Fixed shapes, which an NPU needs; a CPU runs them as well.


@pytest.mark.parametrize("precision", ["fp32", pytest.param("kv-int8", marks=pytest.mark.full)])
def test_fixed_shapes_pass_parity(
    request: pytest.FixtureRequest, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With taps and single layers; this proves an NPU's sessions, but not its kernels."""
    monkeypatch.setattr(backend, "FIXED_SHAPE_DEVICES", ("cpu",))
    monkeypatch.delattr(backend, "OpenVinoDecoder")
    found = request.getfixturevalue("openvino_bundle" if precision == "fp32" else "bundle")
    result = parity(found, "openvino", precision, device="cpu", taps=True)
    assert result.passed, [stage for stage in result.stages if stage.state != "passed"]


@variants_by_precision({"siglip": ("kv-int8-fp16",), "hybrid": ()})
def test_fixed_shapes_of_a_model_with_few_positions(
    pair: OraclePair, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The padding of a chunk is longer than the model's table of positions."""
    made = export(pair.checkpoint.folder, tmp_path / "b", "openvino", [precision], capacity=256)
    assert made.manifest.model["decoder"]["max_positions"] < 512
    monkeypatch.setattr(backend, "FIXED_SHAPE_DEVICES", ("cpu",))
    result = parity(made, taps=True, device="cpu")
    assert result.passed, [stage for stage in result.stages if stage.state != "passed"]


def test_compiled_capacities(openvino_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A larger one serves smaller caches; prefill is padded up to the end; others are refused."""
    monkeypatch.setattr(backend, "FIXED_SHAPE_DEVICES", ("cpu",))
    fixed = Pipeline.open(openvino_bundle, "openvino", "fp32", threads=1).chain.decoder
    monkeypatch.undo()
    plain = Pipeline.open(openvino_bundle, "openvino", "fp32", threads=1).chain.decoder
    embeds = np.random.default_rng(0).standard_normal((1, 1000, 128)).astype(np.float32)
    small, large = fixed.new_cache(1, 1000), fixed.new_cache(1, 1500)
    assert (small.asset.capacity, large.asset.capacity) == (1024, 2048)
    assert fixed.new_cache(1, 500).asset is small.asset
    calls: list[str] = []
    plain_call = FixedShapeAsset.call

    def call(self: FixedShapeAsset, function: str, *rest: Any) -> Any:
        calls.append(function)
        return plain_call(self, function, *rest)

    monkeypatch.setattr(FixedShapeAsset, "call", call)
    expected = plain.decode(embeds, np.array([999]), plain.new_cache(1, 1000))
    for cache in (small, large):
        fixed.decode(embeds[:, :800], np.array([799]), cache)
        fixed.decode(embeds[:, 800:850] * 2, np.array([49]), cache)
        cache.rewind(50)  # its rows are overwritten, padding included
        found = fixed.decode(embeds[:, 800:], np.array([199]), cache)
        assert np.allclose(found, expected, rtol=0, atol=1e-3)
    assert set(calls) == {"prefill"} and len(calls) == 2 * (4 + 1 + 1)
    del small, cache
    again = fixed.new_cache(1, 600)
    assert again.asset.capacity == 2048  # the other one was freed
    other = Pipeline.open(openvino_bundle, "openvino", "fp32", threads=1).chain.decoder
    with pytest.raises(TypeError, match="a cache from its own new_cache, got a GrowingCache"):
        fixed.decode(embeds[:, :1], np.array([0]), other.new_cache(1, 10))


def test_no_shape_is_left_open(openvino_bundle: Bundle) -> None:
    """Of any operator, in a decoder that is compiled for fixed shapes."""
    contract = openvino_bundle.manifest.contracts["fp32"]["decoder"]
    file = openvino_bundle.path(openvino_bundle.artifact("decoder", "openvino", "fp32").files[0])
    sizes = {"batch": 1, "rows": 1, "capacity": 1024, "sequence": 256}
    fixed = backend.compile_file(file, contract, SessionOptions(), sizes)
    assert not fixed.get_runtime_model().is_dynamic()
    assert fixed.input("positions").shape == [1, 256]
    assert backend.compile_file(file, contract, SessionOptions()).get_runtime_model().is_dynamic()


def test_an_npu_needs_half_precision(openvino_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no other floats; the capabilities are those that OpenVINO's plugin gives for an NPU."""
    monkeypatch.setattr(backend, "devices", lambda: ["cpu", "npu"])
    monkeypatch.setattr(backend, "_computes", lambda device, element: element == backend.FLOAT16)
    artifact = openvino_bundle.artifact("decoder", "openvino", "int4")
    found = backend.execution(artifact, "npu")
    assert str(found) == "not run: this npu does not compute in fp32; use a precision with the base fp16"
    half = backend.execution(replace(artifact, base="fp16"), "npu")
    assert half.runnable and half.device == "npu"


# Faults, by the names of the operators, which are those of the ONNX files.


@dataclass(frozen=True)
class IrFault:
    """What is done to the values of a constant of a component, and the tap that must be named for it."""

    component: str
    tap: str
    constant: str
    change: Callable[[np.ndarray], np.ndarray]


FAULTS = [
    IrFault("vision_encoder", "high.blocks.2", "high.blocks.2.mlp.fc1.weight_transposed", zeroed(3)),
    IrFault("vision_encoder", "low.blocks.0", "low.blocks.0.attn.proj.weight_transposed", zeroed(7)),
    IrFault("vision_encoder", "high.patch_embed", "high.patch_embed.proj.weight", scaled(2)),
    IrFault("vision_encoder", "low.blocks.1", "low.blocks.1.norm2.weight", scaled(2)),
    IrFault("adaptor", "layers.1", "layers.1.weight_transposed", zeroed(5)),
    IrFault("decoder", "layers.1", "layers.1.self_attn.v_proj.weight_transposed", zeroed(3)),
    IrFault("decoder", "layers.2", "layers.2.self_attn.q_proj.weight_transposed", swapped_halves(32)),
    IrFault("decoder", "layers.0", "layers.0.post_attention_layernorm.weight", scaled(2)),
    IrFault("decoder", "norm", "norm.weight", scaled(0.5)),
    IrFault("decoder", "head", "head.weight_transposed", zeroed(40)),
]


def plant(folder: Path, precision: str, fault: IrFault) -> Bundle:
    """Change a constant of an IR and give the files their new hashes, so that only parity can notice."""
    path = f"openvino/{precision}/{fault.component}/{fault.component}"
    model = openvino.Core().read_model(folder / f"{path}.xml")
    (constant,) = (op for op in model.get_ops() if op.get_friendly_name() == fault.constant)
    values = fault.change(constant.get_data(dtype=np.float32).copy())
    changed = openvino.opset13.constant(np.ascontiguousarray(values), dtype=constant.get_element_type())
    for reader in constant.output(0).get_target_inputs():
        reader.replace_source_output(changed.output(0))
    openvino.save_model(model, folder / "spoiled.xml", compress_to_fp16=False)
    del model, constant, changed, reader  # they map the files
    for suffix in (".xml", ".bin"):
        (folder / f"spoiled{suffix}").replace(folder / f"{path}{suffix}")
        rehash(folder, f"{path}{suffix}")
    return Bundle.open(folder)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, id=fault.constant, marks=pytest.mark.full if place % 3 else ())
        for place, fault in enumerate(FAULTS)
    ],
)
def test_every_planted_fault_is_located(copy: Path, fault: IrFault) -> None:
    result = parity(plant(copy, "fp32", fault), "openvino", "fp32")
    assert result.verdict == "failed"
    assert [localization.component for localization in result.localizations] == [fault.component]
    assert result.localizations[0].first == fault.tap, str(result.localizations[0])


FAINT = "layers.1.self_attn.v_proj.weight_transposed"  # within the rounding of its layer; the logits show it
LINEAR_FAULTS = [fault for fault in FAULTS if fault.constant.endswith("weight_transposed")]


@pytest.mark.full
@pytest.mark.parametrize("fault", LINEAR_FAULTS, ids=lambda fault: fault.constant)
def test_faults_in_bfloat16_are_named_by_the_layers(copy: Path, fault: IrFault) -> None:
    """The bounds of taps are wide there; single layers are compared with what the plan computes."""
    needs("bf16")
    result = parity(plant(copy, "bf16", fault), "openvino", "bf16")
    assert result.verdict == "failed"
    named = result.stage("layers").detail.startswith(f"{fault.component}: {fault.tap} is wrong")
    assert named == (fault.constant != FAINT)


# What cannot be used.


def test_a_device_that_is_not_there(openvino_bundle: Bundle, run) -> None:
    """OpenVINO's own choice, AUTO, is no device either."""
    available = ", ".join(backend.devices())
    for device in ("npu", "auto"):
        done = run("run", openvino_bundle.folder, "-p", "Hello", "--device", device)
        assert done.code == 2 and f"OpenVINO finds no {device} here, only {available}" in done.err
        result = parity(openvino_bundle, device=device)
        assert str(result.execution) == f"not run: OpenVINO finds no {device} here, only {available}"


def test_a_processor_without_bfloat16(openvino_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not computed in another precision instead."""
    monkeypatch.setattr(backend, "_computes", lambda device, element: element == backend.FLOAT32)
    result = parity(openvino_bundle, "openvino", "bf16")
    sentence = "this cpu does not compute in bf16; use a precision with the base fp32 or fp16"
    assert str(result.execution) == f"not run: {sentence}"
    artifact = openvino_bundle.artifact("adaptor", "openvino", "bf16")
    contract = openvino_bundle.manifest.contracts["bf16"]["adaptor"]
    with pytest.raises(UserError, match=f"adaptor.xml cannot run: {sentence}"):
        backend.open_component(openvino_bundle.path(artifact.files[0]), contract, SessionOptions())


@pytest.mark.parametrize(
    ("built", "runs"), [("2026.4.1", True), ("2026.4.9", True), ("2025.1.0", True), ("2026.5.0", False), ("2027.0.0", False)]
)  # fmt: skip
def test_files_of_a_newer_release(
    openvino_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, built: str, runs: bool
) -> None:
    monkeypatch.setattr(backend, "release", lambda: "2026.4.1")
    artifact = openvino_bundle.artifact("adaptor", "openvino", "fp32")
    monkeypatch.setitem(artifact.tools, "openvino", built)
    found = backend.execution(artifact)
    assert found.runnable == runs
    if not runs:
        assert found.by == (
            f"it was built by OpenVINO {built}, but 2026.4.1 is installed; run: pip install -U openvino"
        )


@pytest.mark.parametrize(
    ("suffix", "keep"), [(".bin", 0.5), (".bin", 0.0), (".xml", 0.5), (".xml", 0.0)], ids=str
)
def test_damaged_files(copy: Path, suffix: str, keep: float, run) -> None:
    file = copy / f"openvino/fp32/decoder/decoder{suffix}"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content))])
    done = run("run", copy, "-p", "Hello", "--precision", "fp32")
    assert done.code == 2 and f"decoder{suffix} has {int(keep * len(content))} bytes, expected" in done.err
    done = run("run", copy, "-p", "Hello", "--precision", "fp32", "--no-verify")
    assert done.code == 2, done.out
    assert "OpenVINO cannot load" in done.err and "Traceback" not in done.err


def test_activations_stay_floats(openvino_bundle: Bundle) -> None:
    """OpenVINO rounds the activations of layers with 4-bit weights to int8, unless it is told not to."""
    contract = openvino_bundle.manifest.contracts["int4"]["decoder"]
    file = openvino_bundle.path(openvino_bundle.artifact("decoder", "openvino", "int4").files[0])
    compiled = backend.compile_file(file, contract, SessionOptions(threads=1))
    properties = {
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32",
    }  # fmt: skip
    for name, value in properties.items():
        found = compiled.get_property(name)
        assert (found.to_string() if hasattr(found, "to_string") else found) == value


def test_it_is_not_installed(openvino_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    backend._core.cache_clear()
    monkeypatch.setitem(sys.modules, "openvino", None)
    found = backend.execution(openvino_bundle.artifact("adaptor", "openvino", "fp32"))
    assert str(found) == (
        "not run: The backend openvino is not installed; run: pip install 'dsvl-export[openvino]'"
    )


def test_a_full_disk_and_an_export_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO does not notice a full disk by itself: the written file is read again."""
    whole = openvino.save_model

    def cut(model: Any, file: Path, **options: Any) -> None:
        whole(model, file, **options)
        content = file.with_suffix(".bin").read_bytes()
        file.with_suffix(".bin").write_bytes(content[: len(content) // 2])

    def full(model: Any, file: Path, **options: Any) -> None:
        raise RuntimeError("Exception from src/core.cpp:1:\nCan't open bin file")

    for save, sentence in (
        (cut, "cannot read vision_encoder.xml: Incorrect weights"),
        (full, "Can't open bin file"),
    ):
        monkeypatch.setattr(openvino, "save_model", save)
        with pytest.raises(UserError, match=sentence):
            export("tiny", tmp_path / "b", "openvino", goldens=False)
        assert not (tmp_path / "b" / MANIFEST).exists()
    monkeypatch.setattr(openvino, "save_model", whole)
    made = export("tiny", tmp_path / "b", "openvino", goldens=False)
    assert made.problems() == []
    assert {Path(file).suffix for file in made.manifest.files if file.startswith("openvino/")} == {
        ".xml",
        ".bin",
    }


def test_states_get_shorter_and_an_interruption_keeps_them(openvino_bundle: Bundle) -> None:
    cache = GrowingCache(openvino_bundle.manifest.contracts["fp32"]["decoder"].states, 2, 2000)
    cache.lengths[:] = 1500, 0
    for array in cache.states():
        array[:] = 1
    assert {array.shape[2] for array in cache.states()} == {1536}
    cache.row(1).append(10)
    cache.row(0).rewind(1400)
    assert {array.shape[2] for array in cache.row(1).states()} == {1536}
    assert {array.shape[2] for array in cache.row(1).states(begins=True)} == {256}
    assert all(array[0, :, :256].all() for array in cache.states())
    cache._memory.arrays[3] = np.zeros_like(cache._memory.arrays[3][:, :, :0])  # interrupted before this one
    cache.row(0).append(300)
    assert {array.shape[2] for array in cache.states()} == {512}
    assert not cache.states()[0][0, :, 256:].any()  # nothing of other rows is in new slots
    cache.reset()
    assert {array.shape[2] for array in cache.states(begins=True)} == {0}
    assert {array.shape[2] for array in cache.arrays} == {2000}
