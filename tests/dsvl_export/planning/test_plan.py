"""Plans: bytes equal the exported artifact's, counts equal those made by hand, the impossible is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from calibration.precision_plan import load_precision
from calibration.quantized_program import trace_with_plan
from dsvl_export.exporter.config import ExportConfig
from dsvl_export.planning.plan import Planner, Request
from dsvl_export.planning.workload import Workload, activation_bytes, activation_growth
from dsvl_export.targets.defects import load_defects, warnings_for
from dsvl_export.targets.targets import (
    LISTED_BITS,
    find_target,
    load_targets,
    measure_target,
    nearest_precision,
)
from reference.checkpoint.checkpoint import open_checkpoint
from reference.checkpoint.released import released_config
from reference.tiny import TINY
from reference.trace import TRACED_COMPONENTS, trace_component
from runtimes.bundle.bundle import Bundle
from runtimes.errors import UserError
from tests.conftest import OraclePair


@pytest.fixture(scope="module")
def planner() -> Planner:
    source = open_checkpoint("tiny")
    return Planner(source.config, source.embedding_bytes())


@pytest.fixture(scope="module")
def one_layer_planner() -> Planner:
    """Of a model whose towers and decoder have one layer: each precision is traced in a second."""
    config = open_checkpoint("tiny").config
    sam, vision = config.vision.sam, config.vision
    assert sam
    vision = replace(
        vision, siglip=replace(vision.siglip, layers=1), sam=replace(sam, layers=1, global_layers=(0,))
    )
    return Planner(replace(config, vision=vision, decoder=replace(config.decoder, layers=1)))


def assert_exact(planner: Planner, bundle: Bundle) -> None:
    for backend, precision in bundle.choices():
        plan = planner.plan(measure_target(find_target("cpu")), Request(backend, precision, 200))
        assert plan.exact
        for component in TRACED_COMPONENTS:
            files = bundle.artifact(component, backend, precision).files
            written = sum(bundle.manifest.files[path].bytes for path in files)
            assert plan.artifacts[component] == pytest.approx(written, rel=0.02), (component, precision)
        table = bundle.manifest.files[bundle.manifest.token_embedding].bytes
        assert plan.embedding_bytes == pytest.approx(table, rel=0.02)


def test_bytes_of_openvino(planner: Planner, openvino_bundle: Bundle) -> None:
    """Of tiny, a sixth is text that describes the graph, whose size is estimated."""
    for backend, precision in openvino_bundle.choices():
        plan = planner.plan(measure_target(find_target("cpu")), Request(backend, precision, 200))
        artifacts = [
            openvino_bundle.artifact(component, backend, precision) for component in TRACED_COMPONENTS
        ]
        written = sum(openvino_bundle.manifest.files[file].bytes for item in artifacts for file in item.files)
        assert sum(plan.artifacts.values()) == pytest.approx(written, rel=0.04), precision


def test_bytes_are_those_of_the_artifacts(planner: Planner, tiny_bundle: Bundle) -> None:
    assert_exact(planner, tiny_bundle)


def test_bytes_of_random_checkpoints(pair: OraclePair, random_bundle: Bundle) -> None:
    assert_exact(Planner(pair.checkpoint.config, pair.checkpoint.embedding_bytes()), random_bundle)


def test_kv_bytes_are_those_of_the_cache(planner: Planner, tiny_bundle: Bundle) -> None:
    from runtimes.pipeline import Pipeline

    for precision in ("fp32", "fp16"):
        cache = Pipeline.open(tiny_bundle, precision=precision).chain.decoder.new_cache(1, 300)
        assert planner.kv_bytes(Request("onnxruntime", precision, 300), 300) == sum(
            array.nbytes for array in cache.arrays
        )


def test_operations_are_those_that_torch_counts(pair: OraclePair) -> None:
    """Against torch's own counter, on the eager components."""
    config, model = pair.checkpoint.config, pair.model
    side = config.vision.image_size
    # Plain matrix products: the counter has no formula for the fused kernels of a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        features = model.vision_encoder(torch.zeros(1, 3, side, side))
    assert (
        Workload(trace_component(config, "vision_encoder", "fp32")).operations(batch=1)
        == counter.get_total_flops()
    )
    with FlopCounterMode(display=False) as counter:
        model.adaptor(*features)
    assert (
        Workload(trace_component(config, "adaptor", "fp32")).operations(batch=1) == counter.get_total_flops()
    )
    decoder = Workload(trace_component(config, "decoder", "fp32"))
    linear = [module for module in model.decoder.modules() if isinstance(module, torch.nn.Linear)]
    per_token = sum(2 * module.weight.numel() for module in linear[:-1])
    head = 2 * linear[-1].weight.numel()
    attention = 4 * config.decoder.layers * config.decoder.heads * config.decoder.head_dim
    sizes = {"batch": 1, "rows": 1, "capacity": 50}
    assert decoder.operations(sequence=7, **sizes) == 7 * per_token + head + 7 * 50 * attention


def test_activations_grow_with_what_is_alive(planner: Planner) -> None:
    """The widest moment of tiny's decoder: MLP tensors of 384, and scores over the whole cache."""
    decoder = planner.workload("decoder", "fp32")
    small = decoder.activation_bytes(batch=1, sequence=1, rows=1, capacity=64)
    assert small >= 4 * (2 * 384 + 128)  # gate, up and the residual
    assert small < 40_000
    large = decoder.activation_bytes(batch=1, sequence=512, rows=1, capacity=1024)
    scores = 2 * 4 * 4 * 512 * 1024
    assert scores < large < 2 * scores
    assert decoder.activation_bytes(batch=2, sequence=512, rows=1, capacity=1024) == 2 * large


def test_the_scores_of_sam_are_there_in_blocks() -> None:
    """ONNX Runtime's encoder grows by 0.51 GB while it runs at full size; whole scores and bias are 2.4 GB."""
    sam = Workload(trace_component(released_config("7b"), "vision_encoder", "fp32"))
    assert activation_bytes(sam, "onnxruntime", 640, 2048) / 1e9 == pytest.approx(0.51, rel=0.3)
    assert activation_bytes(sam, "tensorrt", 640, 2048) / 1e9 == pytest.approx(2.5, rel=0.1)


@pytest.mark.parametrize("capacity", [512, 600, 800, 1024])
def test_activations_grow_along_a_line(planner: Planner, capacity: int) -> None:
    """With the capacity; the line that a bundle keeps lies above, and near."""
    decoder = planner.workload("decoder", "fp32")
    constant, slope = activation_growth(decoder, "onnxruntime", 1024)
    planned = activation_bytes(decoder, "onnxruntime", 512, capacity)
    assert planned <= constant + slope * capacity <= 1.02 * planned + 512


def test_weights_of_a_quantized_program_are_no_activations(planner: Planner) -> None:
    """What is unpacked from codes follows from weights alone; rounding x keeps a copy or two of it."""
    config = planner.config
    plan = load_precision("int4")
    quantized = Workload(trace_with_plan(config, "decoder", plan))
    floats = planner.workload("decoder", "fp32")
    sizes = {"batch": 1, "sequence": 512, "rows": 1, "capacity": 1024}
    assert quantized.activation_bytes(**sizes) == floats.activation_bytes(**sizes)


def test_what_rounds_activations_is_bound_by_integers(one_layer_planner: Planner) -> None:
    planner = one_layer_planner
    slow_floats = replace(find_target("cpu"), tops={"fp32": 1e-3, "int8": 1.0}, bandwidth_gbs=1e9)
    seconds = {
        precision: planner.plan(slow_floats, Request("onnxruntime", precision, 512)).first_token_seconds
        for precision in ("int4", "8da4w")
    }
    assert seconds["int4"] == pytest.approx(1000 * seconds["8da4w"], rel=0.01)


@pytest.mark.full
def test_released_sizes_are_what_is_known_of_them() -> None:
    """1.3B: 2.9 GB of fp16 decoder; 7B: 13 GB; int4 takes a bit more than a quarter."""
    for size, gigabytes in (("1.3b", 2.89), ("7b", 12.99)):
        decoder = Workload(trace_component(released_config(size), "decoder", "fp16"))
        half = decoder.weight_bytes("fp16")
        assert half / 1e9 == pytest.approx(gigabytes, abs=0.01)
        assert 0.25 < decoder.weight_bytes("int4") / half < 0.27
        assert 0.5 < decoder.weight_bytes("int8") / half < 0.505


def test_every_target_is_complete() -> None:
    table = load_targets()
    assert {"jetson-orin-nano", "jetson-orin-nx", "jetson-agx-orin", "jetson-thor", "l4", "a100", "h100", "b200",
            "rtx-4090", "iphone", "mac", "android", "xeon", "core-ultra", "core-ultra-npu", "arc-b580",
            "cpu"} == set(table)  # fmt: skip
    for name, target in table.items():
        assert target.backends
        for backend, precisions in target.backends.items():
            assert set(precisions) <= set(LISTED_BITS)
            has_fp8 = (name, backend) == ("cpu", "onnxruntime") or (target.sm or 0) >= 89
            assert ("fp8" in precisions) == has_fp8
            assert len(set(precisions)) == len(precisions)
        if name != "cpu":
            assert target.sources
            assert 0 < target.usable_gb < target.memory_gb
            assert target.tops["fp32"] <= target.tops["fp16"] <= target.tops["int8"]
    here = measure_target(find_target("cpu"))
    assert measure_target(find_target("l4")) == find_target("l4")
    assert here.usable_gb > 0.2
    assert here.bandwidth_gbs > 0.5
    assert here.operations("fp16") == here.operations("fp32") > 1e9
    assert here.operations("int8") > 1e9


@pytest.mark.parametrize(
    ("target", "backend", "precision", "sentence"),
    [
        ("jetson-agx-orin", "tensorrt", "fp8", r"cannot run fp8 with tensorrt \(FP8 needs SM 89, this is SM 87\). The nearest precision is int8"),
        ("a100", "tensorrt", "fp8", "The nearest precision is int8"),
        ("iphone", "coreml", "fp32", "cannot run fp32 with coreml. The nearest precision is fp16"),
        ("iphone", "coreml", "bf16", "The nearest precision is fp16"),
        ("iphone", "tensorrt", "fp16", "does not support the backend 'tensorrt'; it supports coreml, coreai."),
        ("l4", "tensorrt", "int3", "no precision 'int3'; use one of fp32, fp16"),
        ("watch", "coreml", "int8", "no target 'watch'; use one of jetson-orin-nano"),
    ],
)  # fmt: skip
def test_impossible_requests_name_the_nearest(
    target: str, backend: str, precision: str, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        find_target(target).check(backend, precision)


def test_a_base_that_the_target_does_not_compute(run) -> None:
    """Recipes get a base that it computes; other plans are refused."""
    for precision, sentence in (
        ("fp32", "cannot run fp32 with openvino. The nearest precision is fp16, of"),
        ("int4-fp32", "does not compute in fp32, the base of int4; use a precision with the base fp16."),
    ):
        done = run("plan", "tiny", "--target", "core-ultra-npu", "--precision", precision)
        assert done.code == 2 and sentence in done.err, done.err
    for precision in ("kv-int8", "int4"):
        done = run("plan", "tiny", "--target", "core-ultra-npu", "--precision", precision)
        assert done.code == 0 and f"{precision}-fp16 with openvino" in done.out


def test_the_default_precision_of_a_target() -> None:
    config = ExportConfig("tiny", target="core-ultra-npu").with_defaults()
    assert (config.backend, config.precisions) == ("openvino", ("fp16",))


def test_nearest() -> None:
    assert nearest_precision("int4", ["fp32", "fp16"]) == "fp16"
    assert nearest_precision("fp32", ["fp16", "int8"]) == "fp16"
    assert nearest_precision("fp32", ["fp16", "kv-int8", "int8"]) == "fp16"
    assert nearest_precision("fp8", ["fp32", "int8", "int4"]) == "int8"


def test_contexts_and_prompts_that_cannot_be(planner: Planner) -> None:
    cpu = measure_target(find_target("cpu"))
    with pytest.raises(
        UserError,
        match="A context of 5000 tokens is too long: the model has 1024 positions. Use a context of at most 1024",
    ):
        planner.plan(cpu, Request("onnxruntime", "fp32", 5000))
    with pytest.raises(UserError, match="3 images and 100 text tokens make a prompt of 292 tokens"):
        planner.plan(cpu, Request("onnxruntime", "fp32", 200, images=3))
    with pytest.raises(
        UserError, match="make a prompt of 6500 tokens, but the model has only 1024 positions"
    ):
        planner.plan(cpu, Request("onnxruntime", "fp32", 200, images=100))


@pytest.mark.full
def test_what_fits(one_layer_planner: Planner) -> None:
    """A device with just enough memory for some context, and one with too little for the weights."""
    planner = one_layer_planner
    request = Request("tensorrt", "fp32", 1000)
    l4 = find_target("l4")
    plenty = planner.plan(l4, request)
    assert plenty.fits
    assert plenty.largest_context == 1024
    assert plenty.peak_bytes == (
        plenty.weight_bytes + plenty.kv_bytes + plenty.activation_bytes + plenty.runtime_bytes
    )
    small = replace(l4, usable_gb=(plenty.peak_bytes - 500_000) / 1e9)
    tight = planner.plan(small, request)
    assert not tight.fits
    assert tight.prompt_tokens < tight.largest_context < 1000
    at_limit = planner.plan(small, replace(request, context=tight.largest_context))
    assert at_limit.fits
    assert not planner.plan(small, replace(request, context=tight.largest_context + 1)).fits
    assert planner.nearest_fit(small, request) == "fp16"
    none = planner.plan(replace(l4, usable_gb=0.001), request)
    assert (none.fits, none.largest_context) == (False, 0)
    assert planner.nearest_fit(replace(l4, usable_gb=0.001), request) is None


def test_rooflines(planner: Planner) -> None:
    """With no limit on operations a step takes its bytes; with no limit on bytes, its operations."""
    request = Request("tensorrt", "fp16", 512)
    l4 = find_target("l4")
    slow_memory = planner.plan(replace(l4, tops={"fp32": 1e9, "fp16": 1e9}, bandwidth_gbs=1), request)
    decoder = planner.workload("decoder", "fp16").weight_bytes("fp16")
    assert slow_memory.tokens_per_second == pytest.approx(1e9 / (decoder + slow_memory.kv_bytes))
    slow_math = planner.plan(replace(l4, tops={"fp32": 1e-3, "fp16": 1e-3}, bandwidth_gbs=1e9), request)
    operations = planner.workload("decoder", "fp16").operations(batch=1, sequence=1, rows=1, capacity=512)
    assert slow_math.tokens_per_second == pytest.approx(1e9 / operations)
    assert slow_math.prefill_seconds > 100 / slow_math.tokens_per_second


def test_defects_are_data_with_links() -> None:
    known = {backend for target in load_targets().values() for backend in target.backends}
    for defect in load_defects():
        assert defect.what
        assert defect.what.endswith(".") or defect.what.endswith(").")
        assert (defect.link or "").startswith("https://") or defect.seen, defect.id
        assert set(defect.backends) <= known
        assert set(defect.targets) <= set(load_targets())
    assert len({defect.id for defect in load_defects()}) == len(load_defects()) >= 15


def test_warnings_fit_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def ids(*request: object) -> set[str]:
        return {defect.id for defect in warnings_for(*request)}  # type: ignore[arg-type]

    assert ids("onnxruntime", "fp16", "cpu", 4096) == set()
    assert "coreml-palette-states" in ids("coreml", "palette4", "iphone", 1024)
    assert "coreml-palette-states" not in ids("coreml", "int8", "iphone", 1024)
    assert "coreai-pipelined-kv" in ids("coreai", "fp16", "iphone", 2048)
    assert "coreai-pipelined-kv" not in ids("coreai", "fp16", "iphone", 1024)
    assert "coreai-pipelined-kv" not in ids("coreai", "fp16", "mac", 4096)
    assert "onnxruntime-silent-cpu" not in ids("onnxruntime", "fp32", "cpu", 100)  # handled
    # Before a target is chosen, all of them count; installed versions without the defect do not have it.
    assert "coreml-palette-states" in ids("coreml", "palette4")
    monkeypatch.setattr("dsvl_export.targets.defects.package_versions", lambda: {"coremltools": "8.3"})
    assert "coreml-palette-states" not in ids("coreml", "palette4")
    monkeypatch.setattr("dsvl_export.targets.defects.package_versions", lambda: {"tensorrt": "11.1.0"})
    assert "tensorrt-jetson-11" in ids("tensorrt", "fp16", "jetson-thor")
    assert "tensorrt-jetson-11" not in ids("tensorrt", "fp16", "l4")


def test_a_plan_needs_the_config_alone(tmp_path: Path) -> None:
    """No weights, no tokenizer; the token table is taken for half precision then."""
    config = (TINY / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    source = open_checkpoint(str(tmp_path), weights=False)
    assert source.embedding_bytes() is None
    plan = Planner(source.config).plan(find_target("android"), Request("executorch", "8da8w", 500))
    assert plan.embedding_bytes == 512 * 128 * 2
    without = Planner(source.config).plan(
        find_target("android"), Request("executorch", "8da8w", 500, images=0)
    )
    assert without.vision_seconds == 0
    assert without.prompt_tokens == 100


def test_recipes_and_plans_are_planned(one_layer_planner: Planner, tmp_path: Path) -> None:
    """By the layers that they quantize; a target must support each of their precisions."""
    planner = one_layer_planner
    (tmp_path / "mine.yaml").write_text(
        "base: fp16\nrules: [{layers: 'decoder.*', precision: int4-g64}, {layers: 'adaptor.*', precision: fp8}]"
    )
    mine = str(tmp_path / "mine.yaml")
    l4, orin = find_target("l4"), find_target("jetson-agx-orin")
    predicted = planner.plan(l4, Request("tensorrt", mine, 500))
    half, four = (planner.plan(l4, Request("tensorrt", name, 500)) for name in ("fp16", "int4"))
    assert predicted.exact
    assert predicted.artifacts["vision_encoder"] == half.artifacts["vision_encoder"]
    # Groups of 64 need half the scales of the recipe's groups of 32.
    assert predicted.artifacts["decoder"] < four.artifacts["decoder"] < 0.4 * half.artifacts["decoder"]
    with pytest.raises(UserError, match="FP8 needs SM 89"):
        planner.plan(orin, Request("tensorrt", mine, 500))
    mixed = planner.plan(measure_target(find_target("cpu")), Request("onnxruntime", "int8-int4", 500))
    assert mixed.exact
    assert planner.plan(orin, Request("tensorrt", "int8-int4", 500)).weight_bytes < half.weight_bytes
    with pytest.raises(UserError, match="no precision 'int3'"):
        planner.plan(l4, Request("tensorrt", "int3", 500))
