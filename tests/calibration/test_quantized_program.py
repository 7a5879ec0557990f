"""Quantized programs: what they compute, and that the exported files compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper

from calibration.planned_model import planned_chain, planned_model
from calibration.precision_plan import LayerPrecision, load_precision
from calibration.quantized_program import (
    dequantize_float8,
    fake_quantize,
    fake_quantize_weight,
    qd,
    quantize_float8,
    quantize_weight,
    trace_with_plan,
)
from calibration.quantized_weights import QuantizedWeights, find_weight_scale
from dsvl_export.compilers.onnx.dialect_ort import OrtDialect
from dsvl_export.compilers.onnx.dialect_standard import StandardDialect
from dsvl_export.compilers.onnx.lower import lower
from dsvl_export.compilers.onnx.writer import write_model
from reference.trace import TRACED_COMPONENTS, component_contract
from runtimes.backends import onnxruntime as backend
from runtimes.chain import Chain
from runtimes.errors import UserError
from runtimes.goldens.golden import relative_rms
from runtimes.session import SessionOptions
from tests.calibration.calibrated import Calibrated

OPERATORS = {  # of quantized_decomposed, which PyTorch registers in a private module
    "quantize_per_tensor": "input scale zero_point quant_min quant_max dtype",
    "dequantize_per_tensor": "input scale zero_point quant_min quant_max dtype out_dtype",
    "quantize_per_channel": "input scales zero_points axis quant_min quant_max dtype",
    "dequantize_per_channel": "input scales zero_points axis quant_min quant_max dtype out_dtype",
    "quantize_per_channel_group": "input scales zero_points quant_min quant_max dtype group_size",
    "dequantize_per_channel_group": "input scales zero_points quant_min quant_max dtype group_size output_dtype",
    "quantize_per_token": "input scales zero_points quant_min quant_max dtype",
    "dequantize_per_token": "input scales zero_points quant_min quant_max dtype output_dtype",
    "choose_qparams_per_token_asymmetric": "input dtype",
}
PLANS = {
    "int8": "rules: [{layers: '*', precision: int8}]",
    "fp8": "rules: [{layers: '*', precision: fp8}]",
    "weights": "rules: [{layers: '*', precision: int8-weights}, {layers: 'decoder.*', precision: int4-g32}]",
    "cache": "kv_cache: int8\nrules: [{layers: 'decoder.*mlp*', precision: int4-g16}]",
    "half": "base: fp16\nrules: [{layers: 'vision_encoder.*', precision: int8}, {layers: 'decoder.*', precision: int4-g32}]",
}
# Tiny is a hybrid.
SIGLIP_HERE = pytest.mark.parametrize(
    "random_calibrated", ["siglip", pytest.param("hybrid", marks=pytest.mark.full)], indirect=True
)


class BlockDialect(OrtDialect):
    """Weights of 4 and 8 bits behind standard DequantizeLinear, as TensorRT takes them."""

    weight_only_linear = StandardDialect.weight_only_linear


@pytest.mark.parametrize("operator", OPERATORS)
def test_pytorch_registers_the_operators(operator: str) -> None:
    """If this fails, PyTorch moved or changed them: change the import in ``calibration/quantized_program.py``."""
    schema = getattr(qd, operator).default._schema
    assert [argument.name for argument in schema.arguments] == OPERATORS[operator].split()


def exported(weights: QuantizedWeights, chain: Chain, folder: Path, dialect: OrtDialect) -> Chain:
    """The chain with its components replaced by ONNX Runtime on exported files."""
    folder.mkdir()
    for component in TRACED_COMPONENTS:
        traced = trace_with_plan(weights.source.config, component, weights.plan)
        graph = lower(traced, lambda name, c=component: weights.load(f"{c}.{name}"), dialect)  # type: ignore[misc]
        file, *_ = write_model(graph, folder / f"{component}.onnx", lambda count: None)
        start = backend.open_decoder if component == "decoder" else backend.open_component
        setattr(chain, component, start(file, traced.contract, SessionOptions(2)))
    return chain


def stage_errors(found: Chain, expected: Chain, seed: int = 0) -> dict[str, float]:
    """Relative RMS error of every stage, each fed with the expected chain's own input."""
    rng = np.random.default_rng(seed)
    (spec,) = expected.vision_encoder.contract.inputs
    side = int(spec.shape[-1])
    pixels = rng.random((2, 3, side, side), np.float32) * 2 - 1
    wanted, got = expected.encode_pixels(pixels), found.encode_pixels(pixels)
    errors = {name: relative_rms(got[name], array) for name, array in wanted.items()}
    features = {s.name: wanted[s.name].astype(s.dtype) for s in found.adaptor.contract.inputs}
    embeds = expected.adapt(wanted)
    errors["adaptor"] = relative_rms(found.adapt(features), embeds)
    text = expected.embed_tokens(rng.integers(3, 200, 20))
    prompt = np.concatenate([text, embeds[0], text])
    logits = []
    for chain in (expected, found):
        cache = chain.decoder.new_cache(1, len(prompt) + 4)
        dtype = chain.decoder.contract.inputs[0].dtype
        parts = [chain.decoder.decode(prompt[None, :-4].astype(dtype), np.arange(len(prompt) - 4), cache)]
        parts += [
            chain.decoder.decode(prompt[None, i : i + 1].astype(dtype), np.array([0]), cache)
            for i in range(-4, -1)
        ]
        logits.append(np.concatenate(parts, axis=1))
    errors["logits"] = relative_rms(logits[1], logits[0])
    return errors


def export_errors(calibrated: Calibrated, text: str, folder: Path, dialect: OrtDialect) -> dict[str, float]:
    """How far exported files lie from the program that they were exported from, stage by stage."""
    (folder / "plan.yaml").write_text(text)
    weights = QuantizedWeights(calibrated.source, load_precision(str(folder / "plan.yaml")), calibrated.table)
    weights.check()
    chains = [planned_chain(weights, calibrated.embedding) for _ in range(2)]
    return stage_errors(exported(weights, chains[0], folder / "files", dialect), chains[1])


@pytest.mark.parametrize("name", ["weights", "cache"])
def test_tiny_exports_what_the_program_computes(
    tiny_calibrated: Calibrated, name: str, tmp_path: Path
) -> None:
    errors = export_errors(tiny_calibrated, PLANS[name], tmp_path, OrtDialect())
    assert max(errors.values()) < 1e-5, errors


@SIGLIP_HERE
@pytest.mark.parametrize("name", ["weights", "cache"])
def test_random_models_export_what_the_program_computes(
    random_calibrated: Calibrated, name: str, tmp_path: Path
) -> None:
    errors = export_errors(random_calibrated, PLANS[name], tmp_path, OrtDialect())
    assert max(errors.values()) < (1e-5 if name == "weights" else 1e-3), errors


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_tiny_rounds_activations_as_the_program_does(
    tiny_calibrated: Calibrated, kind: str, tmp_path: Path
) -> None:
    check_rounding(tiny_calibrated, kind, tmp_path)


@SIGLIP_HERE
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_random_models_round_activations_as_the_program_does(
    random_calibrated: Calibrated, kind: str, tmp_path: Path
) -> None:
    check_rounding(random_calibrated, kind, tmp_path)


def check_rounding(calibrated: Calibrated, kind: str, tmp_path: Path) -> None:
    """Where codes are those of the file, the program computes the same to 1e-5; its own codes differ from
    them by one step in one of ten thousand.

    Without that a code which falls the other way, since sums are rounded in another order, grows in the
    layers behind it up to the noise of the precision.
    """
    errors = export_errors(calibrated, PLANS[kind], tmp_path, OrtDialect())
    assert max(errors["adaptor"], errors["logits"]) < 1e-3, errors
    weights = QuantizedWeights(
        calibrated.source, load_precision(str(tmp_path / "plan.yaml")), calibrated.table
    )
    file = tmp_path / "files/vision_encoder.onnx"
    pixels = np.random.default_rng(0).random(
        (1, 3, *[calibrated.source.config.vision.image_size] * 2), np.float32
    )
    outputs, codes = run_with_codes(file, pixels)
    encoder = planned_model(weights).vision_encoder
    differing, total = [], 0
    for path, layer in encoder.named_modules():
        if not hasattr(layer, "input_scale"):
            continue
        total += sum(array.size for array in codes[path])

        calls = iter(codes[path])

        def operands(x: torch.Tensor, layer: Any = layer, calls: Any = calls) -> Any:
            scale, given = layer.input_scale, torch.from_numpy(next(calls))
            own = fake_quantize(x, scale, layer.precision) / scale
            step = 1.001 if kind == "int8" else given.abs() / 7.9 + 2.0**-8  # E4M3 has three bits of mantissa
            differing.append(int((own - given).abs().gt(1e-3).sum()))
            assert ((own - given).abs() <= step).all(), layer
            return given * scale, fake_quantize_weight(layer.weight, layer.weight_scale, layer.precision)

        layer.quantized_operands = operands
    with torch.inference_mode():
        expected = encoder(torch.from_numpy(pixels))
    for name, tensor in zip(
        [s.name for s in component_contract(calibrated.source.config, "vision_encoder", "fp32").outputs],
        expected,
        strict=True,
    ):
        assert relative_rms(outputs[name], tensor.numpy()) < 1e-5
    assert sum(differing) <= 1e-4 * total + 2


def run_with_codes(
    file: Path, pixels: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, list[np.ndarray]]]:
    """Outputs of an exported vision encoder, and the codes of every layer's inputs as numbers."""
    model = onnx.load(str(file))
    names = [node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    for name in names:
        model.graph.node.append(
            helper.make_node("Cast", [name], [f"codes:{name}"], to=onnx.TensorProto.FLOAT)
        )
        model.graph.output.append(
            helper.make_tensor_value_info(f"codes:{name}", onnx.TensorProto.FLOAT, None)
        )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = [value.name for value in session.get_outputs()]
    found = dict(zip(wanted, session.run(wanted, {"pixel_values": pixels}), strict=True))
    codes: dict[str, list[np.ndarray]] = {}
    for name in wanted:
        if name.startswith("codes:"):  # SAM's last convolutions run twice
            codes.setdefault(name.removeprefix("codes:").rpartition("/")[0], []).append(found.pop(name))
    return found, codes


def test_standard_operators_compute_the_same(tiny_calibrated: Calibrated, tmp_path: Path) -> None:
    errors = export_errors(tiny_calibrated, PLANS["weights"], tmp_path, BlockDialect())
    assert max(errors.values()) < 1e-5, errors


def test_a_base_of_half_precision(tiny_calibrated: Calibrated, tmp_path: Path) -> None:
    """Its own rounding is all that differs; in the towers, up to the noise of their INT8."""
    errors = export_errors(tiny_calibrated, PLANS["half"], tmp_path, OrtDialect())
    assert max(errors["adaptor"], errors["logits"]) < 2e-3, errors
    assert max(errors.values()) < 5e-2, errors


def test_a_float8_cache_in_the_program(tiny_calibrated: Calibrated, tmp_path: Path) -> None:
    """No backend of this release has one; in PyTorch it costs more than int8 does, and little."""
    (tmp_path / "cache.yaml").write_text("kv_cache: fp8")
    errors = {}
    exact = planned_chain(
        QuantizedWeights(tiny_calibrated.source, load_precision("fp32")), tiny_calibrated.embedding
    )
    for name in ("kv-int8", str(tmp_path / "cache.yaml")):
        weights = QuantizedWeights(tiny_calibrated.source, load_precision(name), tiny_calibrated.table)
        chain = planned_chain(weights, tiny_calibrated.embedding)
        errors[Path(name).stem] = stage_errors(chain, exact)["logits"]
    assert 1e-4 < errors["kv-int8"] < errors["cache"] < 0.1, errors


def test_float8_is_e4m3(tmp_path: Path) -> None:
    """Against ml_dtypes: rounding to nearest even, saturated instead of NaN."""
    x = torch.cat([torch.linspace(-600, 600, 4001), 2.0 ** torch.arange(-12, 9).float()])
    codes = quantize_float8(x, torch.tensor(0.5))
    expected = np.clip(x.numpy() / 0.5, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(codes.float().numpy(), expected.astype(np.float32))
    assert torch.equal(dequantize_float8(codes, torch.tensor(0.5), torch.float32), codes.float() * 0.5)
    channels = torch.tensor([1.0, 2.0])
    assert quantize_float8(torch.full((2, 3), 4.0), channels).float()[:, 0].tolist() == [4.0, 2.0]


@pytest.mark.parametrize("text", ["int8", "fp8", "int8-weights", "int4-g32"])
def test_codes_are_the_nearest(text: str) -> None:
    """No other code is nearer, and a scale covers the weight unless clipping pays."""
    precision = LayerPrecision.parse(text)
    weight = (
        torch.randn(24, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, 24)[:, None]
    )
    scale = find_weight_scale(weight, precision)
    assert (scale > 0).all()
    error = (fake_quantize_weight(weight, scale, precision) - weight).abs()
    if precision.kind == "fp8":
        assert (error <= weight.abs() / 16 + scale[:, None] * 2.0**-10).all()
    elif precision.kind == "int4":
        wide = scale.repeat_interleave(32, dim=1)
        inside = weight.abs() <= 7 * wide
        assert (error[inside] <= 0.5001 * wide[inside]).all()
        plain = weight.reshape(24, 2, 32).abs().amax(-1) / 7
        worse = (fake_quantize_weight(weight, plain, precision) - weight).square().sum()
        assert error.square().sum() < worse
        codes = quantize_weight(weight, scale, precision)
        assert (codes.min(), codes.max()) >= (-8, 7) and codes.max() <= 7
    else:
        assert (error <= 0.5001 * scale[:, None]).all()


def test_nothing_comes_of_broken_weights() -> None:
    weight = torch.zeros(4, 32)
    assert torch.isfinite(find_weight_scale(weight, LayerPrecision("int8"))).all()
    weight[1, 2] = float("nan")
    with pytest.raises(UserError, match="The weight of decoder.head holds NaN"):
        find_weight_scale(weight, LayerPrecision("int8"), "decoder.head")
