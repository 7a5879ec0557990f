"""Activations that ONNX Runtime rounds token by token, and the decoder's second graph for prompts."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from calibration.precision_plan import LayerPrecision as Precision
from calibration.precision_plan import PrecisionPlan, Rule
from calibration.quantized_program import trace_with_plan
from dsvl_export.compilers.lowering import Constant, QuantizedWeight
from dsvl_export.compilers.onnx.token_integers import widen_to_int8
from dsvl_export.compilers.onnxruntime import artifact_bytes
from dsvl_export.exporter.export import export
from dsvl_export.parity_check import parity
from dsvl_export.targets.options import CompileOptions, OnnxRuntimeOptions
from reference.checkpoint.checkpoint import open_checkpoint
from runtimes.backends import onnxruntime as backend
from runtimes.bundle.bundle import Bundle
from runtimes.errors import UserError
from runtimes.session import SessionOptions
from tests.dsvl_export.parity_check.faults import rehash

PRECISION = "8da4w-g128"


@pytest.fixture
def bundle(quantized_bundle: Bundle) -> Bundle:
    return quantized_bundle


def graphs(bundle: Bundle) -> tuple[Path, Path]:
    file = bundle.path(bundle.artifact("decoder", "onnxruntime", PRECISION).files[0])
    return file, backend.prefill_file(file)


def test_eight_bits_stand_for_four() -> None:
    """What the widening adds is small beside what four bits cost."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (24, 256), generator=generator, dtype=torch.int8)
    scale = torch.rand(24, 2, generator=generator) + 0.1
    codes[3], scale[4] = 0, 1e-20
    wide = widen_to_int8(
        QuantizedWeight(
            Constant("w", lambda: codes), Constant("s", lambda: scale), (24, 256), 4, np.dtype("int4"), 128
        )
    )
    assert (wide.bits, wide.group, wide.scale.load().shape) == (8, None, (24,))
    exact = codes.float() * scale.repeat_interleave(128, dim=1)
    error = wide.codes.load().float() * wide.scale.load()[:, None] - exact
    step = scale.amax(dim=1, keepdim=True)  # of four bits, where a row is largest
    assert float((error / step).square().mean().sqrt()) < 0.3 / 14
    assert not error[3].any()


def test_prompts_and_tokens_have_graphs_of_their_own(bundle: Bundle) -> None:
    tokens, prompts = (onnx.load(str(file)) for file in graphs(bundle))
    products = [
        [node for node in model.graph.node if node.op_type in ("MatMulNBits", "MatMulIntegerToFloat")]
        for model in (tokens, prompts)
    ]
    assert {node.op_type for node in products[0]} == {"MatMulNBits"}
    assert [node.name for node in products[1] if node.op_type == "MatMulNBits"] == ["head/linear"]
    levels = {item.i for node in products[0] for item in node.attribute if item.name == "accuracy_level"}
    assert levels == {4}
    # q, k and v read the same rounded tokens, gate and up as well.
    layers = open_checkpoint("tiny").config.decoder.layers
    assert sum(node.op_type == "QuantizeLinear" for node in prompts.graph.node) == 4 * layers


def test_a_prompt_runs_in_its_graph_and_speculative_tokens_do_not(bundle: Bundle) -> None:
    """Long calls give what the graph for prompts gives, short ones what the other gives, in one cache."""
    contract = bundle.manifest.contracts[PRECISION]["decoder"]
    file, prompts = graphs(bundle)
    decoder = backend.open_decoder(file, contract, SessionOptions())
    long = backend.PREFILL_FROM
    embeds = np.random.default_rng(0).normal(size=(1, long + 6, int(contract.inputs[0].shape[2])))
    embeds = embeds.astype(np.float32)

    def logits_of(session: backend.OrtDecoder) -> list[np.ndarray]:
        cache = session.new_cache(1, 64)
        pieces = ((0, long), (long, long + 4), (long + 4, long + 6))
        return [session.decode(embeds[:, start:end], np.arange(end - start), cache) for start, end in pieces]

    both = logits_of(decoder)
    alone = {
        name: logits_of(backend.OrtDecoder(backend._open(path, contract, SessionOptions()), contract))
        for name, path in (("tokens", file), ("prompts", prompts))
    }
    assert np.array_equal(both[0], alone["prompts"][0])
    assert not np.array_equal(both[0], alone["tokens"][0])
    for found, expected in zip(both[1:], alone["tokens"][1:], strict=True):
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert 0 < error < 0.1  # the same graph on a cache that the other one wrote


def test_a_fault_in_the_graph_for_prompts_fails_parity(bundle: Bundle, tmp_path: Path) -> None:
    copy = Bundle.open(copytree(bundle.folder, tmp_path / "bundle"))
    _, prompts = graphs(copy)
    model = onnx.load(str(prompts))
    (product,) = (node for node in model.graph.node if node.name == "layers.1.mlp.up_proj/linear_product")
    (scale,) = (item for item in model.graph.initializer if item.name == product.input[3])
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * 4, scale.name))
    onnx.save(model, str(prompts))
    result = parity(rehash(copy.folder, str(prompts.relative_to(copy.folder))), precision=PRECISION)
    assert result.stage("prefill_logits").state == "failed"
    assert [(localization.component, localization.first) for localization in result.localizations] == [
        ("decoder", "layers.1")
    ]


def test_without_the_second_graph(bundle: Bundle, tmp_path: Path) -> None:
    lean = export("tiny", tmp_path / "lean", precisions=(PRECISION,), prefill=False)
    files = lean.artifact("decoder", "onnxruntime", PRECISION).files
    assert [Path(name).name for name in files] == ["decoder.onnx"]
    assert parity(lean, precision=PRECISION).passed
    config = open_checkpoint("tiny").config
    plan = PrecisionPlan("p", rules=(Rule("*", Precision.parse("8da4w-g128"), "linear"),))
    for made, options in (
        (bundle, CompileOptions()),
        (lean, CompileOptions(onnxruntime=OnnxRuntimeOptions(prefill=False))),
    ):
        names = made.artifact("decoder", "onnxruntime", PRECISION).files
        found = sum(made.manifest.files[name].bytes for name in names)
        predicted = artifact_bytes(trace_with_plan(config, "decoder", plan), options)
        assert predicted == pytest.approx(found, rel=0.02)


def test_weights_of_both_graphs_are_written_once(bundle: Bundle, tmp_path: Path) -> None:
    """Above 64 MB: the second graph reads the head and the norms from the first one's file."""
    from dsvl_export.compilers.onnx.dialect_ort import OrtDialect, OrtPrefillDialect
    from dsvl_export.compilers.onnx.lower import lower
    from dsvl_export.compilers.onnx.writer import Places, write_model
    from dsvl_export.compilers.precisions import planned_weights

    source = open_checkpoint("tiny")
    weights = planned_weights(source, bundle.folder, PRECISION)
    traced = trace_with_plan(source.config, "decoder", weights.plan)
    places: Places = {}
    sizes = []
    for name, dialect in (("decoder", OrtDialect()), ("decoder_prefill", OrtPrefillDialect())):
        graph = lower(traced, lambda parameter: weights.load(f"decoder.{parameter}"), dialect)
        _, data = write_model(graph, tmp_path / f"{name}.onnx", lambda count: None, 0, places)
        sizes.append((data.stat().st_size, sum(item.nbytes for item in graph.initializers.values())))
    read = {
        entry.value
        for item in onnx.load(
            str(tmp_path / "decoder_prefill.onnx"), load_external_data=False
        ).graph.initializer
        for entry in item.external_data
        if entry.key == "location"
    }
    assert read == {"decoder.onnx.data", "decoder_prefill.onnx.data"}
    assert sizes[1][0] < 0.9 * sizes[1][1]
    for file in (tmp_path / "decoder.onnx", tmp_path / "decoder_prefill.onnx"):
        onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def test_half_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="8da8w only on a base of fp32, 8da4w-fp16 has fp16"):
        export("tiny", tmp_path / "b", precisions=["8da4w-fp16"])
    assert not (tmp_path / "b").exists()
