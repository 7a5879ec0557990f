"""The stage ``long_context``: what is wrong behind the other goldens' length is seen, at any position."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

from dsvl_export.exporter.export import export
from dsvl_export.parity_check import compare, parity
from dsvl_export.parity_check.result import ParityResult
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.files import write_json
from runtimes.bundle.manifest import MANIFEST
from runtimes.errors import UserError
from runtimes.goldens.long_context import LONG_GOLDEN, LongGolden
from tests.dsvl_export.parity_check.faults import Edit, attribute, node, plant, rehash

WINDOW = "layers.{}.self_attn/cached_attention"


def rope_without(row: int, *names: str) -> Edit:
    """One row of the RoPE tables is lost."""

    def edit(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            if tensor.name in names:
                values = numpy_helper.to_array(tensor).copy()
                values[row] = 0
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    return edit


def windows(size: int, *layers: int) -> Edit:
    """Layers see the last ``size`` tokens alone."""
    edits = [node(WINDOW.format(layer), attribute("local_window_size", size)) for layer in layers]

    def edit(model: onnx.ModelProto) -> None:
        for each in edits:
            each(model)

    return edit


@pytest.fixture(scope="module")
def few_goldens(quantized_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny with two of the numbered goldens."""
    folder = Path(shutil.copytree(quantized_bundle.folder, tmp_path_factory.mktemp("few") / "bundle"))
    bundle = Bundle.open(folder)
    for number in range(2, 10):
        del bundle.manifest.files[f"goldens/{number:02}.safetensors"]
    write_json(folder / MANIFEST, bundle.manifest.to_dict())
    return folder


@pytest.fixture
def spoiled(few_goldens: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(few_goldens, tmp_path / "bundle"))


def failed(result: ParityResult) -> set[str]:
    return {stage.name for stage in result.stages if stage.state == "failed"}


def test_an_artifact_computes_what_its_plan_computes(few_goldens: Path) -> None:
    """Also in int8, which lies far from fp32."""
    for precision in ("fp32", "fp16", "int8"):
        result = parity(few_goldens, precision=precision)
        errors = result.stage("long_context").errors
        assert result.passed
        assert errors
        assert errors.relative_rms < {"fp32": 1e-5, "fp16": 1e-2, "int8": 5e-3}[precision]
    assert errors.quantization_error
    assert errors.quantization_error > 10 * errors.relative_rms


@pytest.mark.parametrize(
    ("precision", "position", "tables"),
    [("fp32", 389, ("cos", "sin")), ("fp16", 1023, ("sin",)), ("int8", 790, ("cos",))],
)
def test_a_lost_row_of_rope_fails(
    spoiled: Path, precision: str, position: int, tables: tuple[str, ...]
) -> None:
    edit = rope_without(position, *tables)
    result = parity(plant(spoiled, precision, "decoder", edit), precision=precision)
    assert failed(result) == {"long_context"}
    detail = result.stage("long_context").detail
    assert detail.startswith("keys of decoder layer 0: error")
    assert f"at position {position}, bound" in detail
    assert result.exit_code == 1


@pytest.mark.parametrize(
    ("precision", "layers", "tensor"),
    [("fp32", (2,), "keys of decoder layer 3"), ("fp16", (0, 1, 2, 3), "keys of decoder layer 1"),
     ("int8", (2,), "keys of decoder layer 3"), ("fp32", (3,), "logits")],
)  # fmt: skip
def test_an_attention_window_fails(
    spoiled: Path, precision: str, layers: tuple[int, ...], tensor: str
) -> None:
    """Also in a single layer of int8, whose own error is larger than what the window changes."""
    result = parity(plant(spoiled, precision, "decoder", windows(400, *layers)), precision=precision)
    assert failed(result) == {"long_context"}
    assert result.stage("long_context").detail.startswith(tensor)


def test_another_default_capacity_fails(few_goldens: Path) -> None:
    bundle = Bundle.open(few_goldens)
    bundle.manifest = replace(bundle.manifest, default_capacity=500)
    result = parity(bundle, precision="fp32")
    assert failed(result) == {"long_context"}
    assert (
        "default_capacity is 500, the goldens were recorded for 1024" in result.stage("long_context").detail
    )


def test_a_short_cache_is_judged_to_its_end(few_goldens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtimes.pipeline.compiled_capacity", lambda decoder, device: 300)
    stage = parity(few_goldens, precision="fp32").stage("long_context")
    assert (stage.state, stage.detail) == ("passed", "judged up to position 300 of 1024")


def test_bundles_are_compared_there_too(few_goldens: Path, spoiled: Path) -> None:
    bundle = Bundle.open(few_goldens)
    assert compare(bundle, bundle, ("onnxruntime", "fp32"), ("onnxruntime", "int8")).passed
    other = plant(spoiled, "fp16", "decoder", rope_without(790, "cos", "sin"))
    result = compare(bundle, other, ("onnxruntime", "fp32"), ("onnxruntime", "fp16"))
    assert failed(result) == {"long_context"}


def test_an_older_bundle_is_not_passed(spoiled: Path) -> None:
    bundle = Bundle.open(spoiled)
    for path in ("goldens/text.json", f"goldens/{LONG_GOLDEN}", f"long/fp16/{LONG_GOLDEN}"):
        del bundle.manifest.files[path]
    result = parity(bundle, precision="fp16")
    assert (result.verdict, result.exit_code) == ("not judged", 3)
    states = {stage.name: stage.state for stage in result.stages}
    assert (states["text"], states["long_context"]) == ("not run", "not run")
    assert "has no text goldens; export it again" in result.stage("text").detail
    assert "has no long golden; export it again" in result.stage("long_context").detail


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda golden: replace(golden, checkpoint="f" * 64), "recorded from the checkpoint ffffffffffff"),
        (lambda golden: replace(golden, tokens=golden.tokens[::-1]), "are of different texts"),
        (lambda golden: replace(golden, logits=golden.logits[:, :5]), "does not fit the bundle's contracts"),
    ],
)
def test_a_long_golden_of_something_else(
    spoiled: Path, change: Callable[[LongGolden], LongGolden], message: str
) -> None:
    path = f"long/fp16/{LONG_GOLDEN}"
    change(LongGolden.load(spoiled / path)).save(spoiled / path)
    with pytest.raises(UserError, match=message):
        parity(rehash(spoiled, path), precision="fp16")


def test_it_follows_the_capacity(bundle_copy: Path) -> None:
    """Recorded again where the default capacity changes, and only then."""
    file = bundle_copy / "goldens" / LONG_GOLDEN
    stages: list[str] = []
    export("tiny", bundle_copy, precisions=["fp32"], report=lambda progress: stages.append(progress.stage))
    assert len(LongGolden.load(file).tokens) == 1024
    assert "long golden" not in stages
    states: dict[str, str] = {}
    export(
        "tiny",
        bundle_copy,
        precisions=["fp32"],
        capacity=200,
        report=lambda progress: states.update({progress.stage: progress.state}),
    )
    assert (states["quantization_error/fp16"], states["long/fp16"]) == ("reused", "finished")
    assert len(LongGolden.load(file).tokens) == 200
    assert LongGolden.load(bundle_copy / "long/fp16" / LONG_GOLDEN).capacity == 200
    assert parity(bundle_copy, precision="fp16").passed
    assert LongGolden.load(file).rows[-2:].tolist() == [198, 199]
