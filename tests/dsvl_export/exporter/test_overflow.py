"""Numbers beyond half precision are a verdict: exit code 1, what overflows, and what to export instead."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from calibration.precision_plan import PrecisionPlan, load_precision
from dsvl_export.compilers.registry import load_compiler
from dsvl_export.exporter.export import export
from dsvl_export.exporter.job import Part, Variant
from dsvl_export.exporter.overflow import overflow_remedy
from runtimes.bundle.bundle import Bundle
from runtimes.errors import PrecisionOverflowError, UserError

DOWN = "language_model.model.layers.0.mlp.down_proj.weight"


def spoil(checkpoint: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    file = checkpoint / "model.safetensors"
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(file).items()}
    edit(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("name", "place", "parameter"),
    [
        (DOWN, (0, 0), "decoder.layers.0.mlp.down_proj.weight"),
        ("language_model.model.embed_tokens.weight", (3, 0), "token_embedding.weight"),
        ("language_model.model.norm.weight", (0,), "decoder.norm.weight"),
    ],
)
def test_weights_beyond_half_precision(
    tiny_copy: Path, tmp_path: Path, run, name: str, place: tuple[int, ...], parameter: str
) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name][place] = -1e5

    spoil(tiny_copy, edit)
    done = run("export", tiny_copy, "--precision", "fp16", "--output", tmp_path / "b", "--no-goldens")
    assert done.code == 1
    assert f"fp16 cannot hold the tensor {parameter}" in done.err
    assert "its largest magnitude is 9.984e+04, but fp16 holds at most 65504" in done.err
    assert "export with --precision fp32" in done.err
    assert not (tmp_path / "b").exists()
    with pytest.raises(
        PrecisionOverflowError, match=r"int8-fp16 cannot hold.*export with --precision int8-fp32"
    ):
        export(tiny_copy, tmp_path / "b", precisions=["int8-fp16"], goldens=False)


def test_a_checkpoint_with_nan_is_refused_in_every_precision(tiny_copy: Path, tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["language_model.model.layers.0.input_layernorm.weight"][0] = float("inf")

    spoil(tiny_copy, edit)
    with pytest.raises(
        UserError, match=r"decoder.layers.0.input_layernorm.weight of .* NaN or infinity"
    ) as caught:
        export(tiny_copy, tmp_path / "b", goldens=False)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "b").exists()


def test_activations_beyond_half_precision(tiny_copy: Path, tmp_path: Path, run) -> None:
    """The weights fit, a channel of the residual stream does not; nothing was compiled then."""

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[DOWN][5] *= 2e5

    spoil(tiny_copy, edit)
    done = run("export", tiny_copy, "--precision", "fp16", "--output", tmp_path / "b")
    assert done.code == 1
    sentence = "decoder.layers.0 overflows in fp16: it gives NaN or infinity on the golden of 0002.png"
    assert f"{sentence}; export with --precision fp32." in " ".join(done.err.split())
    assert not (tmp_path / "b/onnxruntime").exists()
    bundle = export(tiny_copy, tmp_path / "b", precisions=["fp32"])  # with the goldens that are there
    assert {item.precision for item in bundle.manifest.artifacts} == {"fp32"}
    again = run("export", tiny_copy, "--precision", "fp16", "--capacity", 500, "--output", tmp_path / "b")
    assert again.code == 1
    assert Bundle.open(tmp_path / "b").choices() == [("onnxruntime", "fp32")]  # it stays a bundle
    blind = export(tiny_copy, tmp_path / "blind", precisions=["fp16"], goldens=False)
    done = run("parity", export(tiny_copy, blind.folder, precisions=["fp32"]).folder, "--precision", "fp16")
    assert done.code == 1  # its quantization error was not measured
    assert "quantization_error/fp16/quantization_error.json" not in Bundle.open(blind.folder).manifest.files
    report = json.loads((blind.folder / "reports/parity-onnxruntime-fp16.json").read_text())
    (detail,) = [stage["detail"] for stage in report["stages"] if stage["name"] == "prefill_logits"]
    assert detail.startswith(
        "NaN or infinity in logits of golden 0; if it overflows, export with another base"
    )
    assert [row["first"] for row in report["localizations"] if row["component"] == "decoder"] == ["layers.0"]


@pytest.mark.parametrize(
    ("backend", "plan", "remedy"),
    [
        ("tensorrt", load_precision("fp16"), "export with --precision bf16 or fp32"),
        ("tensorrt", load_precision("int8-fp16"), "export with --precision int8-bf16 or int8-fp32"),
        ("onnxruntime", PrecisionPlan("mine", "fp16", "int8"), "set the base of the plan mine to fp32"),
        ("coreml", load_precision("fp16"), "coreml has no wider base than fp16: export for onnxruntime in fp32"),
    ],
)  # fmt: skip
def test_the_remedy_is_what_the_backend_has(backend: str, plan: PrecisionPlan, remedy: str) -> None:
    part = Part(backend, load_compiler(backend), plan, plan.name)
    assert overflow_remedy(Variant(backend, plan.name, (part,))) == remedy
