"""Mixes: components of several backends and precisions that are exported, judged and run as one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsvl_export import ExportConfig, export, export_bundle
from dsvl_export.exporter.drop import drop_choices
from dsvl_export.parity_check import compare, parity
from dsvl_export.parity_check.report.record import record_verdict
from dsvl_export.serving.models import ModelOptions, Models, runnable_models
from reference.tiny import HELDOUT
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.files import read_json, write_json
from runtimes.bundle.manifest import MANIFEST
from runtimes.bundle.mixes import COMPONENTS, Mix, device_of
from runtimes.errors import UserError
from runtimes.goldens.task import load_task
from runtimes.pipeline import Pipeline
from tests.conftest import OraclePair
from tests.dsvl_export.parity_check.faults import plant, rehash, scaled, weight
from tests.shared import shared_bundle

pytest.importorskip("openvino", reason="openvino is not installed here")
NAME = "openvino-fp32+onnxruntime-8da4w-g128"
MIX = ("mixed", NAME)
CHOSEN = {"vision_encoder": "openvino:fp32", "decoder": "onnxruntime:8da4w-g128"}
IMAGE = HELDOUT.parent / "images"


@pytest.fixture(scope="module")
def mixed_bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """Tiny: OpenVINO's vision encoder and adaptor, ONNX Runtime's decoder; tests must not change it."""
    yield from shared_bundle(
        tmp_path_factory, "mixed", lambda folder: export("tiny", folder, components=CHOSEN)
    )


@pytest.fixture
def copy(mixed_bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mixed_bundle.folder, tmp_path / "bundle"))


def test_a_mix_is_judged_as_one(copy: Path, run) -> None:
    """Every component by the tolerance of its own precision."""
    done = run("parity", copy, "--taps", "--json")
    assert done.code == 0, done.err
    (report,) = json.loads(done.out)
    assert report["verdict"] == "passed"
    assert {stage["state"] for stage in report["stages"] if stage["name"] != "audit"} == {"passed"}
    assert all(item["taps"] and item["first"] is None for item in report["localizations"])
    assert "openvino" in report["execution"]["by"] and "onnxruntime" in report["execution"]["by"]
    tolerances = report["tolerances"]
    assert tolerances["vision_encoder"] == tolerances["adaptor"] != tolerances["decoder"]
    assert tolerances["vision_encoder"]["factor"] == 100  # of fp32
    assert Bundle.open(copy).manifest.parity[f"mixed/{NAME}"]["verdict"] == "passed"
    assert (copy / f"reports/parity-mixed-{NAME}.html").exists()


def test_a_new_file_of_a_component_drops_its_verdict(copy: Path) -> None:
    """Also where the verdict is that of a mix; and a mix that does not fit any more is left out."""
    plan = copy.parent / "mine.yaml"
    plan.write_text("rules: [{layers: 'decoder.*', kind: linear, precision: int8-weights}]\n")
    chosen = {"vision_encoder": "openvino:fp32", "decoder": f"onnxruntime:{plan}"}
    export("tiny", copy, components=chosen)
    name = "openvino-fp32+onnxruntime-mine"
    bundle = Bundle.open(copy)
    record_verdict(bundle, parity(bundle, "mixed", name))
    assert Bundle.open(copy).manifest.parity[f"mixed/{name}"]["verdict"] == "passed"
    plan.write_text("rules: [{layers: 'decoder.layers.1.*', kind: linear, precision: int8-weights}]\n")
    export("tiny", copy, precisions=[str(plan)])
    bundle = Bundle.open(copy)
    assert f"mixed/{name}" not in bundle.manifest.parity and ("mixed", name) in bundle.choices()
    assert parity(bundle, "mixed", name).passed
    plan.write_text("base: fp16\nrules: [{layers: 'decoder.*', kind: linear, precision: int8-weights}]\n")
    export("tiny", copy, precisions=[str(plan)])
    assert Bundle.open(copy).choices() == [("onnxruntime", "mine"), MIX]


def test_its_files_are_those_of_whole_exports(
    mixed_bundle: Bundle, openvino_bundle: Bundle, quantized_bundle: Bundle
) -> None:
    for other, stage in (
        (openvino_bundle, "openvino/fp32/vision_encoder"),
        (openvino_bundle, "openvino/fp32/adaptor"),
        (quantized_bundle, "onnxruntime/8da4w-g128/decoder"),
    ):
        files = {path: entry for path, entry in other.manifest.files.items() if path.startswith(f"{stage}/")}
        assert files and files.items() <= mixed_bundle.manifest.files.items()
    stages = {item.stage for item in mixed_bundle.manifest.artifacts}
    assert len(stages) == 3  # and nothing else was compiled


def test_what_the_precision_costs_is_measured_through_all_components(
    mixed_bundle: Bundle, quantized_bundle: Bundle
) -> None:
    """Vision in fp32 has no error; the decoder's is that of its own precision."""

    def rows(bundle: Bundle, name: str) -> list[dict[str, float]]:
        return list(read_json(bundle.path(f"quantization_error/{name}/quantization_error.json"))["goldens"])

    for mixed, whole in zip(rows(mixed_bundle, NAME), rows(quantized_bundle, "8da4w-g128"), strict=True):
        assert mixed["vision_encoder"] < 1e-6 < whole["vision_encoder"]
        assert mixed["teacher_forced_logits"] == pytest.approx(whole["teacher_forced_logits"], rel=1e-6)
        assert mixed["chain_logits"] != whole["chain_logits"]
    long = "long/8da4w-g128/long.safetensors"
    assert mixed_bundle.manifest.files[long] == quantized_bundle.manifest.files[long]


def test_a_fault_in_the_decoder(copy: Path) -> None:
    scales = "layers.1.mlp.down_proj/to_folded_2_of_blocks"
    result = parity(plant(copy, "8da4w-g128", "decoder", weight(scales, scaled(4))), *MIX)
    failed = [item.name for item in result.stages if item.state == "failed"]
    assert "teacher_forced_logits" in failed and "vision_encoder" not in failed
    assert [(item.component, item.first) for item in result.localizations] == [("decoder", "layers.1")]


def test_a_small_fault_in_the_vision_encoder(copy: Path) -> None:
    """A change of 10 millionths would be within the tolerance of the decoder's precision."""
    path = "openvino/fp32/vision_encoder/vision_encoder.bin"
    content = np.fromfile(copy / path, np.uint8)
    values = content[: len(content) // 4 * 4].view(np.float32)
    plausible = np.isfinite(values) & (np.abs(values) < 10) & (np.abs(values) > 1e-3)
    values[plausible] *= np.float32(1.00001)
    content.tofile(copy / path)
    result = parity(rehash(copy, path), *MIX)
    stage = result.stage("vision_encoder")
    assert stage.state == "failed" and stage.errors
    assert 1e-4 < stage.errors.relative_rms < result.bound("prefill_logits", None)
    assert "vision_encoder" in {item.component for item in result.localizations}


def test_it_answers_as_its_components_do(mixed_bundle: Bundle, quantized_bundle: Bundle) -> None:
    """The answers of a chain that was put together by hand, and 95 % of the held-out answers."""
    pipeline = Pipeline.open(mixed_bundle)
    by_hand = Pipeline.open(quantized_bundle, precision="8da4w-g128")
    by_hand.chain.vision_encoder = pipeline.chain.vision_encoder
    by_hand.chain.adaptor = pipeline.chain.adaptor
    right = 0
    for item in load_task(HELDOUT)[::25]:
        answer = pipeline.chat(item.messages, item.images)
        assert answer.tokens == by_hand.chat(item.messages, item.images).tokens
        right += item.expected in answer.text
    assert right >= 18


def test_all_commands_take_a_mix(copy: Path, tmp_path: Path, run) -> None:
    image = load_task(HELDOUT)[0].images[0]
    ask = ("run", copy, "-i", image, "-p", "What color is the circle?", "--max-new-tokens", "4")
    assert run(*ask, "--backend", "mixed").code == 0
    assert run(*ask, "--precision", NAME, "--device", "vision_encoder=cpu,decoder=cpu").code == 0
    done = run("bench", copy, "--tokens", "2", "--repeats", "1", "--json")
    result = json.loads(done.out)
    assert (result["backend"], result["precision"]) == MIX
    sizes = {item.component: item for item in Bundle.open(copy).manifest.artifacts}
    for component, item in sizes.items():
        files = sum(Bundle.open(copy).manifest.files[path].bytes for path in item.files)
        assert files == pytest.approx(result["predicted"]["artifacts"][component], rel=0.05)
    assert run("verify", copy, "--weights", "tiny").code == 0
    shown = run("inspect", copy).out
    assert "Mixes" in shown and "openvino fp32" in shown
    assert run("compare", copy, copy, "--backend-a", "mixed", "--backend-b", "mixed").code == 2  # itself


def test_a_comparison_with_a_mix(mixed_bundle: Bundle, quantized_bundle: Bundle) -> None:
    result = compare(quantized_bundle, mixed_bundle, ("onnxruntime", "fp32"), MIX)
    assert result.passed, [stage for stage in result.stages if stage.state == "failed"]


def test_the_server_has_it_as_a_model(mixed_bundle: Bundle) -> None:
    assert runnable_models(mixed_bundle, None) == [f"mixed/{NAME}"]
    models = Models(mixed_bundle, ModelOptions(capacity=256, slots=2))
    try:
        model = models.lease(f"mixed/{NAME}")
        assert model is not None and model.pipeline.chat("Hello").text
    finally:
        models.close()


# Beside other artifacts.


def test_a_mix_beside_whole_exports(copy: Path) -> None:
    """It uses their files, and they may come and go."""
    export("tiny", copy, "openvino", ["fp32"])
    export("tiny", copy, precisions=["8da4w-g128"])
    bundle = Bundle.open(copy)
    assert bundle.choices() == [("openvino", "fp32"), ("onnxruntime", "8da4w-g128"), MIX]
    assert bundle.select(None, None) == ("openvino", "fp32") and bundle.select("mixed", None) == MIX
    smaller = drop_choices(copy, [("openvino", "fp32"), ("onnxruntime", "8da4w-g128")])
    assert smaller.choices() == [MIX] and not smaller.problems()
    assert {item.stage for item in smaller.manifest.artifacts} == {
        "openvino/fp32/vision_encoder", "openvino/fp32/adaptor", "onnxruntime/8da4w-g128/decoder",
    }  # fmt: skip
    assert not (copy / "openvino/fp32/decoder").exists() and not (copy / "configs/openvino").exists()
    kept = {path for path in map(str, smaller.folder.rglob("*")) if "/.staging" not in path}
    assert not [path for path in kept if Path(path).is_dir() and not any(Path(path).iterdir())]
    assert parity(smaller).passed


def test_a_bundle_that_lost_its_record_keeps_the_mix(copy: Path) -> None:
    shutil.rmtree(copy / ".staging")
    export("tiny", copy, precisions=["fp32"])
    assert Bundle.open(copy).choices() == [("onnxruntime", "fp32"), MIX]
    assert parity(copy, *MIX).passed


def test_it_is_exported_again_by_its_config(mixed_bundle: Bundle, tmp_path: Path) -> None:
    """With a plan of one's own, which the bundle keeps."""
    plan = tmp_path / "mine.yaml"
    plan.write_text("rules: [{layers: 'decoder.*', kind: linear, precision: int8-weights}]\n")
    config = tmp_path / "export.yaml"
    config.write_text(
        "checkpoint: tiny\ngoldens: false\ncomponents: {vision_encoder: 'openvino:fp32', decoder: 'onnxruntime:mine.yaml'}\n"
    )
    first = export_bundle(ExportConfig.read(config), tmp_path / "a")
    plan.unlink()
    name = "openvino-fp32+onnxruntime-mine"
    kept = ExportConfig.read(first.folder / f"configs/mixed/{name}/export.yaml")
    assert kept.components.chosen().keys() == set(COMPONENTS)
    second = export_bundle(kept, tmp_path / "b")
    assert second.choices() == [("mixed", name)]

    def artifacts(bundle: Bundle) -> dict[str, str]:
        files = bundle.manifest.files
        return {path: files[path].sha256 for item in bundle.manifest.artifacts for path in item.files}

    assert artifacts(first) == artifacts(second)


def test_switchable_adapters_of_its_decoder(decoder_adapters: dict[str, Path], tmp_path: Path) -> None:
    chosen = {"vision_encoder": "openvino:fp32", "decoder": "onnxruntime:fp32"}
    named = [f"all={decoder_adapters['all']}"]
    bundle = export("tiny", tmp_path / "b", components=chosen, switchable_adapters=named, goldens=False)
    plain, adapted = (Pipeline.open(bundle, adapter=name) for name in (None, "all"))
    whole = export("tiny", tmp_path / "w", switchable_adapters=named, goldens=False)
    expected = Pipeline.open(whole, adapter="all").chat("Hello").tokens
    assert adapted.chat("Hello").tokens == expected != plain.chat("Hello").tokens


def test_apples_backends_feed_each_other(pair: OraclePair, tmp_path: Path) -> None:
    pytest.importorskip("coreai_torch", reason="coreai-torch is not installed here")
    chosen = {"vision_encoder": "coreml:fp16", "decoder": "coreai:fp16"}
    bundle = export(pair.checkpoint.folder, tmp_path / "b", components=chosen, capacity=256, goldens=False)
    assert {item.backend for item in bundle.artifacts(*bundle.choices()[0]).values()} == {"coreml", "coreai"}
    chain = Pipeline.open(bundle).chain
    (spec,) = chain.vision_encoder.contract.inputs
    pixels = np.random.default_rng(0).random((1, *map(int, spec.shape[1:])), dtype=np.float32)
    embeds = chain.adapt(chain.encode_pixels(pixels))
    logits = chain.decoder.decode(embeds[:, :1], np.array([0]), chain.decoder.new_cache(1, 8))
    assert np.isfinite(logits).all() and logits.std() > 0


# What cannot be mixed.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vision_encoder=openvino:fp16", "decoder=onnxruntime:fp32"],
         r"The adaptor \(openvino:fp16\) returns float16, but the decoder \(onnxruntime:fp32\) reads float32;"),
        (["vision_encoder=openvino:fp32"], "has no decoder; add --component decoder=BACKEND:PRECISION"),
        (["decoder=openvino:fp32"], "has no vision_encoder; add --component vision_encoder="),
        (["decoder=executorch:fp32", "vision_encoder=openvino:fp32"], "executorch writes all components into one"),
        (["decoder=executorch", "vision_encoder=openvino:fp32"], "'executorch' is not BACKEND:PRECISION"),
        (["head=openvino:fp32"], "the components are vision_encoder, adaptor, decoder"),
        (["decoder=openvino:fp32", "decoder=openvino:fp32"], "names the decoder twice"),
        (["decoder=openvino:fp8", "vision_encoder=openvino:fp32"], "openvino cannot compute .* in fp8"),
        (["decoder=nothing:fp32", "vision_encoder=openvino:fp32"], "There is no backend 'nothing'"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_before_any_work(
    tmp_path: Path, run, arguments: list[str], message: str
) -> None:
    options = [text for argument in arguments for text in ("--component", argument)]
    done = run("export", "tiny", *options, "-o", tmp_path / "b")
    assert done.code == 2 and not (tmp_path / "b").exists()
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(" ".join(done.err.split()))


@pytest.mark.parametrize(
    ("components", "message"),
    [
        ({"head": "openvino:fp32"}, "There is no component 'head'; the components are vision_encoder"),
        ({"decoder": ("openvino", "fp32")}, r"must map a component to 'BACKEND:PRECISION', such as"),
        ("decoder=openvino:fp32", r"must map a component to 'BACKEND:PRECISION', such as"),
        ({"decoder": "openvino:zzz"}, "There is no precision 'zzz'"),
    ],
)
def test_mistakes_in_python(tmp_path: Path, components: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        export("tiny", tmp_path / "b", components=components)
    assert not list(tmp_path.iterdir())


def test_a_backend_beside_all_components_is_refused(mixed_bundle: Bundle, tmp_path: Path, run) -> None:
    """The kept config names all of them, so that the option would have no effect."""
    config = mixed_bundle.folder / f"configs/mixed/{NAME}/export.yaml"
    done = run("export", "--config", config, "--precision", "int8", "-o", tmp_path / "b")
    assert done.code == 2 and "The mix names all components" in done.err


def test_two_plans_of_one_name(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "my.yaml").write_text(f"base: {'fp32' if folder == 'a' else 'bf16'}\n")
    chosen = {"vision_encoder": f"openvino:{tmp_path}/a/my.yaml", "decoder": f"openvino:{tmp_path}/b/my.yaml"}
    with pytest.raises(UserError, match="Two precision plans are called 'my'; rename one of the files"):
        export("tiny", tmp_path / "bundle", components=chosen)


def test_a_mix_has_one_precision_for_the_rest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one precision for all components that it does not name"):
        export("tiny", tmp_path / "b", precisions=["fp32", "fp16"], components=CHOSEN)


def test_the_rest_has_the_backend_and_the_precision(tmp_path: Path) -> None:
    made = export(
        "tiny", tmp_path / "b", "openvino", components={"decoder": "onnxruntime:fp32"}, goldens=False
    )
    assert made.choices() == [("mixed", "openvino-fp32+onnxruntime-fp32")]
    same = export(
        "tiny", tmp_path / "s", components=dict.fromkeys(COMPONENTS, "openvino:fp32"), goldens=False
    )
    assert same.choices() == [("openvino", "fp32")]  # which is no mix


@pytest.mark.parametrize("command", ["run", "parity", "bench", "serve"])
def test_a_manifest_without_a_component(copy: Path, run, command: str) -> None:
    raw = read_json(copy / MANIFEST)
    raw["artifacts"] = [item for item in raw["artifacts"] if item["component"] != "decoder"]
    write_json(copy / MANIFEST, raw)
    done = run(command, copy, *(["-p", "Hello"] if command == "run" else []))
    assert done.code == 2
    assert f"the mix {NAME} without its decoder (onnxruntime 8da4w-g128); export it again" in done.err


def test_a_manifest_without_the_mix(copy: Path, run) -> None:
    raw = read_json(copy / MANIFEST)
    write_json(copy / MANIFEST, {**raw, "mixes": raw["mixes"] * 2})
    done = run("inspect", copy)
    assert done.code == 2 and "has a mix twice" in done.err
    write_json(copy / MANIFEST, {**raw, "mixes": []})
    done = run("run", copy, "-p", "Hello")
    assert done.code == 2 and "has no artifacts of all components; export it again" in " ".join(
        done.err.split()
    )


def test_a_manifest_with_borders_that_do_not_fit(copy: Path, run) -> None:
    raw = read_json(copy / MANIFEST)
    for contract in raw["contracts"]["8da4w-g128"].values():
        for spec in contract["inputs"] + contract["outputs"]:
            spec["dtype"] = (
                spec["dtype"].replace("float32", "float16") if spec["name"] != "logits" else "float32"
            )
    write_json(copy / MANIFEST, raw)
    done = run("run", copy, "-p", "Hello")
    assert done.code == 2 and "returns float32, but the decoder" in " ".join(done.err.split())


def test_devices_of_components() -> None:
    assert device_of(None, "decoder") is None and device_of("gpu", "adaptor") == "gpu"
    assert device_of("vision_encoder=gpu,decoder=cpu", "decoder") == "cpu"
    assert device_of("vision_encoder=gpu", "adaptor") is None
    for wrong in ("decoder=", "head=cpu", "decoder=cpu,gpu", "decoder=cpu,decoder=gpu"):
        with pytest.raises(UserError, match="is not a device, or COMPONENT=DEVICE for some of"):
            device_of(wrong, "decoder")


def test_names_tell_mixes_apart() -> None:
    one, two = ("openvino", "int8"), ("onnxruntime", "fp32")
    names = {
        Mix(*pairs).name for pairs in ((one, one, two), (one, two, two), (two, one, two), (two, two, one))
    }
    assert len(names) == 4
