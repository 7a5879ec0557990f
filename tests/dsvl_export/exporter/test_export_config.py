"""The config of an export: its YAML file, what overrides it, and the copy that a bundle keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from dsvl_export import ExportConfig, UserError, export, export_bundle
from dsvl_export.cli import app
from dsvl_export.exporter.staging import dependencies
from dsvl_export.parity_check.quantization_error import read_quantization_error
from dsvl_export.targets.options import ExecuTorchOptions, OnnxRuntimeOptions, TensorRTOptions
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.files import read_json, write_json
from runtimes.bundle.manifest import MANIFEST
from runtimes.errors import PrecisionOverflowError

FULL = ExportConfig(
    checkpoint="tiny",
    backend="tensorrt_rtx",
    precisions=("fp16", "int8"),
    target="h100",
    capacity=256,
    goldens=False,
    onnxruntime=OnnxRuntimeOptions(prefill=False),
    tensorrt=TensorRTOptions("10.3", (86, 89)),
    executorch=ExecuTorchOptions("coreml"),
)
PLAN = "base: fp32\nrules:\n- {layers: 'decoder.*', precision: int8-weights, kind: linear}\n"


def write(folder: Path, raw: Any) -> Path:
    file = folder / "export.yaml"
    file.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw))
    return file


@pytest.mark.parametrize("config", [FULL, ExportConfig("tiny"), ExportConfig("org/name", capacity=8)])
def test_a_config_round_trips(config: ExportConfig, tmp_path: Path) -> None:
    file = tmp_path / "export.yaml"
    config.save(file)
    assert ExportConfig.read(file) == config


def test_defaults_are_not_written() -> None:
    assert ExportConfig("tiny").to_dict() == {"checkpoint": "tiny"}
    assert ExportConfig("tiny", tensorrt=TensorRTOptions("10.3")).to_dict() == {
        "checkpoint": "tiny",
        "tensorrt": {"version": "10.3"},
    }


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    raw = {"checkpoint": "weights", "precisions": ["plans/half.yaml", "int8"], "scales": "scales"}
    config = ExportConfig.read(write(tmp_path, raw))
    assert config.checkpoint == str(tmp_path / "weights")
    assert config.precisions == (str(tmp_path / "plans/half.yaml"), "int8")
    assert config.scales == str(tmp_path / "scales")
    hub = ExportConfig.read(write(tmp_path, {"checkpoint": "org/name", "scales": "/data/scales"}))
    assert (hub.checkpoint, hub.scales) == ("org/name", "/data/scales")


@pytest.mark.parametrize(("raw", "sentence"), [
    ({"precision": "fp16"}, "has the unknown key 'precision'; the keys are checkpoint, backend, precisions, components"),
    ({"tensorrt": {"sm": [89]}}, r"has the unknown key 'tensorrt\.sm'; the keys are version, capabilities\."),
    ({1: 2}, "has the unknown key '1'"),
    ({"capacity": "many"}, "the key 'capacity' must be a whole number, got 'many'"),
    ({"capacity": True}, "the key 'capacity' must be a whole number, got True"),
    ({"capacity": 0}, "the key 'capacity' must be at least 1, got 0"),
    ({"goldens": "yes"}, "the key 'goldens' must be true or false, got 'yes'"),
    ({"goldens": None}, "the key 'goldens' must be true or false, got None"),
    ({"precisions": "fp16"}, "the key 'precisions' must be a list, each item text, got 'fp16'"),
    ({"precisions": ["int3"]}, "the key 'precisions' has a wrong value. There is no precision 'int3'"),
    ({"tensorrt": {"version": 10.3}}, r"the key 'tensorrt\.version' must be text, got 10\.3; write it in quotes"),
    ({"tensorrt": {"version": "ten"}}, r"'tensorrt\.version' has a wrong value. 'ten' is not a version of TensorRT"),
    ({"tensorrt": {"capabilities": [0]}}, "'tensorrt.capabilities' must hold positive numbers, got 0"),
    ({"tensorrt": {"capabilities": ["89"]}}, "must be a list, each item a whole number"),
    ({"tensorrt": "10.3"}, "the key 'tensorrt' must be a mapping of version, capabilities"),
    ({"executorch": {"delegate": "metal"}}, "must be one of xnnpack, coreml, vulkan, got 'metal'"),
    ({"backend": "quantum"}, "the key 'backend' must be one of coreai, coreml, .*, got 'quantum'"),
    ({"target": "toaster"}, "the key 'target' has a wrong value. There is no target 'toaster'"),
    ({"target": ""}, "the key 'target' is empty; give it a value or remove it"),
    ({"checkpoint": ""}, "the key 'checkpoint' is empty"),
    ({"tensorrt": {"version": ""}}, r"the key 'tensorrt\.version' is empty"),
    ({"precisions": ["fp16", ""]}, "the key 'precisions' has an empty item; remove it"),
    ({"chat_template": "own"}, "the key 'chat_template' must be one of checkpoint, built-in, got 'own'"),
    ("- tiny\n", "is not an export config: it must be a mapping of checkpoint, backend"),
    ("checkpoint: [\n", "is not valid YAML"),
    ("backend: coreml\n", "has no key 'checkpoint'; add it"),
    ("", "has no key 'checkpoint'; add it"),
])  # fmt: skip
def test_mistakes_are_one_sentence_with_file_and_key(raw: Any, sentence: str, tmp_path: Path) -> None:
    raw = {"checkpoint": "tiny", **raw} if isinstance(raw, dict) else raw
    with pytest.raises(UserError, match=sentence) as refused:
        ExportConfig.read(write(tmp_path, raw))
    assert str(tmp_path / "export.yaml") in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="export.yaml"):
        ExportConfig.read(tmp_path / "export.yaml")


def test_values_override_the_file() -> None:
    changed = FULL.override(
        {"capacity": 64, "tensorrt.version": "11.4", "backend": None, "precisions": (), "goldens": False}
    )
    assert (changed.capacity, changed.backend, changed.precisions) == (64, "tensorrt_rtx", ("fp16", "int8"))
    assert changed.tensorrt == TensorRTOptions("11.4", (86, 89))
    assert ExportConfig("tiny").override({"goldens": False, "onnxruntime.prefill": False}) == ExportConfig(
        "tiny", goldens=False, onnxruntime=OnnxRuntimeOptions(prefill=False)
    )


def test_defaults_follow_target_and_backend() -> None:
    assert ExportConfig("tiny").with_defaults() == ExportConfig("tiny", "onnxruntime", ("fp32",))
    apple = ExportConfig("tiny", target="iphone").with_defaults()
    assert (apple.backend, apple.precisions) == ("coreml", ("fp16",))
    assert FULL.override({"backend": "coreml"}).with_defaults().precisions == ("fp16", "int8")


def test_empty_and_repeated_values() -> None:
    for values in ({"target": ""}, {"scales": ""}, {"precisions": ("fp32", "")}, {"adapters": ("",)}):
        with pytest.raises(UserError, match=f"The export's {next(iter(values))} is empty; give a value"):
            ExportConfig("tiny").override(values).with_defaults()
    repeated = ExportConfig("tiny", precisions=("fp16", "fp32", "fp16")).with_defaults()
    assert repeated.precisions == ("fp16", "fp32")


def test_flags_override_the_file_and_the_file_the_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    asked: list[ExportConfig] = []

    def record(config: ExportConfig, output: Path, report: object) -> None:
        asked.append(config)
        raise Stop

    monkeypatch.setattr("dsvl_export.exporter.export.export_bundle", record)
    raw = {"checkpoint": "tiny", "precisions": ["int8"], "capacity": 64, "goldens": False}
    file = write(tmp_path, raw)

    def run(*arguments: str) -> ExportConfig:
        CliRunner().invoke(app, ["export", "--output", str(tmp_path / "b"), *arguments])
        return asked.pop()

    plain = ExportConfig("tiny", "onnxruntime", ("int8",), capacity=64, goldens=False)
    assert run("--config", str(file)) == plain
    flags = ("--capacity", "32", "--precision", "fp16", "--precision", "8da4w", "--goldens", "--no-prefill")
    assert run("--config", str(file), *flags) == ExportConfig(
        "tiny", "onnxruntime", ("fp16", "8da4w"), capacity=32, onnxruntime=OnnxRuntimeOptions(prefill=False)
    )
    assert run("elsewhere", "--config", str(file)).checkpoint == "elsewhere"
    assert run("tiny") == ExportConfig("tiny", "onnxruntime", ("fp32",))


def test_an_export_needs_a_checkpoint(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["export", "--output", str(tmp_path / "b")])
    assert done.exit_code != 0
    assert "give CHECKPOINT or --config" in str(done.exception)


def files_of(bundle: Bundle) -> dict[str, str]:
    return {path: entry.sha256 for path, entry in bundle.manifest.files.items()}


def test_the_bundles_config_exports_the_same_files(tmp_path: Path) -> None:
    """With a plan and scales of the user's that are gone by then, and a capacity that was the default."""
    plan = tmp_path / "half.yaml"
    plan.write_text(PLAN)
    config = ExportConfig("tiny", precisions=(str(plan), "fp16"), goldens=False)
    bundle = export_bundle(config, tmp_path / "b")
    plan.unlink()
    again = None
    for precision in ("half", "fp16"):
        file = bundle.folder / f"configs/onnxruntime/{precision}/export.yaml"
        assert str(file.relative_to(bundle.folder)) in bundle.manifest.files
        read = ExportConfig.read(file)
        assert read.capacity == bundle.manifest.default_capacity
        again = export_bundle(read, tmp_path / "again")
    assert again and files_of(again) == files_of(bundle)


def test_each_backend_and_precision_keeps_its_config(tmp_path: Path) -> None:
    """A later export of the same pair replaces it; the hash in the manifest guards it."""
    folder = tmp_path / "b"
    export("tiny", folder, goldens=False, capacity=64)
    export("tiny", folder, "tensorrt", ["fp16"], goldens=False, tensorrt="10.3", capacity=64)
    paths = {"onnxruntime/fp32", "tensorrt/fp16"}
    configs = {name: ExportConfig.read(folder / f"configs/{name}/export.yaml") for name in paths}
    assert configs["onnxruntime/fp32"] == ExportConfig(
        "tiny", "onnxruntime", ("fp32",), goldens=False, capacity=64
    )
    assert configs["tensorrt/fp16"].tensorrt.version == "10.3"
    before = (folder / "configs/onnxruntime/fp32/export.yaml").read_bytes()
    bundle = export("tiny", folder, "tensorrt", ["fp16"], goldens=False, tensorrt="11.4", capacity=64)
    assert ExportConfig.read(folder / "configs/tensorrt/fp16/export.yaml").tensorrt.version == "11.4"
    assert (folder / "configs/onnxruntime/fp32/export.yaml").read_bytes() == before
    (folder / "configs/onnxruntime/fp32/export.yaml").write_text("checkpoint: other\n")
    assert any("configs/onnxruntime/fp32/export.yaml" in problem for problem in bundle.problems())


def test_an_export_that_overflows_leaves_the_earlier_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflow(*arguments: object) -> None:
        raise PrecisionOverflowError("too large")

    export("tiny", tmp_path / "b", "coreml", ["fp16"], goldens=False, capacity=64)
    monkeypatch.setattr("dsvl_export.exporter.export.check_ranges", overflow)
    with pytest.raises(PrecisionOverflowError):
        export("tiny", tmp_path / "b", "coreml", ["fp16"], goldens=False, capacity=128)
    file = tmp_path / "b/configs/coreml/fp16/export.yaml"
    assert ExportConfig.read(file).capacity == 64
    assert Bundle.open(tmp_path / "b").problems() == []


def test_bundles_of_0_4_have_no_config_and_can_be_extended(bundle_copy: Path) -> None:
    manifest = read_json(bundle_copy / MANIFEST)
    manifest["files"] = {
        path: entry for path, entry in manifest["files"].items() if not path.startswith("configs/")
    }
    write_json(bundle_copy / MANIFEST, manifest)
    stages = bundle_copy / ".staging/stages.json"
    write_json(stages, {n: s for n, s in read_json(stages).items() if not n.startswith("configs/")})
    for file in (bundle_copy / "configs").rglob("*.yaml"):
        file.unlink()
    assert Bundle.open(bundle_copy).problems() == []
    bundle = export("tiny", bundle_copy, precisions=["fp16"])
    kept = [path for path in bundle.manifest.files if path.startswith("configs/")]
    assert kept == ["configs/onnxruntime/fp16/export.yaml"]


def test_bundles_of_0_4_keep_their_quantization_errors_until_they_are_measured_again(
    bundle_copy: Path,
) -> None:
    old, new = "noise/fp16/noise.json", "quantization_error/fp16/quantization_error.json"
    errors = read_quantization_error(Bundle.open(bundle_copy), "fp16")
    (bundle_copy / old).parent.mkdir(parents=True)
    (bundle_copy / new).rename(bundle_copy / old)
    for name in (MANIFEST, ".staging/stages.json"):
        text = (bundle_copy / name).read_text()
        text = text.replace(new, old).replace("quantization_error/fp16", "noise/fp16")
        (bundle_copy / name).write_text(text.replace('"depends_on"', '"rests_on"'))
    bundle = Bundle.open(bundle_copy)
    assert (new in bundle.manifest.files, bundle.problems()) == (False, [])
    assert errors.goldens
    assert read_quantization_error(bundle, "fp16") == errors
    bundle = export("tiny", bundle_copy, precisions=["fp16"])
    assert (old in bundle.manifest.files, bundle.problems()) == (False, [])
    assert not (bundle_copy / "noise/fp16").exists()
    assert read_quantization_error(bundle, "fp16") == errors


def test_artifacts_of_0_4_state_what_they_depend_on() -> None:
    assert dependencies({"rests_on": {"int8.yaml": "1"}}) == {"int8.yaml": "1"}
    assert dependencies({"depends_on": {"int8.yaml": "2"}}) == {"int8.yaml": "2"}
    assert dependencies({}) == {}


def test_a_plan_that_is_named_twice_is_exported_once(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(PLAN)
    names = [str(tmp_path / "own.yaml"), f"{tmp_path}/./own.yaml", "fp32", "fp32"]
    bundle = export("tiny", tmp_path / "bundle", precisions=names, goldens=False)
    assert {artifact.precision for artifact in bundle.manifest.artifacts} == {"own", "fp32"}
    assert len(bundle.manifest.artifacts) == 6


def test_a_wrong_capability_is_refused_before_any_work(tmp_path: Path) -> None:
    """Not when the engine is built, after an hour of other stages."""
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(UserError, match=r"builds no engines for SM 12; it supports 75, 80"):
        export("tiny", tmp_path / "bundle", "tensorrt_rtx", ["fp16"], capabilities=[89, 12])
    assert not (tmp_path / "bundle").exists()
