"""``calibrate``, ``sensitivity``, ``plan-precision`` and ``lint`` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import onnx

from calibration.precision_plan import component_layers, load_precision
from reference.checkpoint.checkpoint import open_checkpoint
from reference.trace import TRACED_COMPONENTS
from runtimes.bundle.bundle import Bundle
from tests.dsvl_export.cli.command_line import refused


def test_calibrate_in_parts_and_export(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    common = ("--samples", 6, "--rows", 16)
    for part in ("1/2", "2/2"):
        done = run("calibrate", "tiny", "--output", tmp_path / part[0], "--part", part, *common)
        assert done.code == 0, done.err
    done = run(
        "calibrate",
        "tiny",
        "-o",
        tmp_path / "m",
        "--merge",
        tmp_path / "1",
        "--merge",
        tmp_path / "2",
        "--json",
    )
    assert json.loads(done.out)["samples"] == 6
    done = run("calibrate", "tiny", "-o", tmp_path / "w", *common)
    assert "scales of 68 layers from 6 samples" in done.out
    assert (tmp_path / "w/scales.json").read_text() == (tmp_path / "m/scales.json").read_text()
    done = run(
        "export",
        "tiny",
        "--precision",
        "int8",
        "--scales",
        tmp_path / "m",
        "-o",
        tmp_path / "b",
        "--no-goldens",
    )
    assert done.code == 0, done.err
    assert Bundle.open(tmp_path / "b").choices() == [("onnxruntime", "int8")]
    done = run("lint", tmp_path / "b")
    assert (done.code, done.out) == (0, "All 3 files keep the rules.\n")
    file = tmp_path / "b/onnxruntime/int8/adaptor/adaptor.onnx"
    model = onnx.load(str(file))
    scale = next(node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear")
    (tensor,) = [item for item in model.graph.initializer if item.name == scale]
    tensor.CopyFrom(onnx.helper.make_tensor(scale, onnx.TensorProto.FLOAT, [], [-1.0]))
    onnx.save(model, str(file))
    done = run("lint", file)
    assert done.code == 1
    assert "must be positive and finite" in done.out
    assert run("lint", file, "--json").code == 1


def test_tuning_on_the_command_line(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    done = run("calibrate", "tiny", "-o", tmp_path / "s", "--samples", 4, "--tune", "int4", "--json")
    found = json.loads(done.out)
    assert len(found["tuned"]) == 29
    assert set(found["tuned"].values()) == {"int4-g32"}
    assert found["smoothed"]
    for arguments, sentence in (
        (("--data", tmp_path / "nowhere"), "There is no calibration data"),
        (("--method", "entropy"), "There is no method 'entropy'; use one of minmax, percentile, mse"),
        (("--part", "x"), "--part must have the form I/N, for example 1/4, not 'x'"),
        (("--percentile", "0"), "The percentile must lie between 0 and 100, got 0"),
        (("--tune", "int3"), "There is no precision 'int3'"),
        (("--tune", "int4", "--rows", "0"), "Tuning needs rows of the activations"),
        (("--merge", tmp_path / "nowhere"), "is not a readable file of calibration statistics"),
    ):
        assert refused(run("calibrate", "tiny", "-o", tmp_path / "bad", *arguments), sentence)


def test_from_sensitivities_to_a_plan(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """One candidate, few samples: the way through, not the numbers."""
    done = run("sensitivity", "tiny", "-o", tmp_path / "s", "--samples", 2, "--candidate", "int8-weights")
    assert done.code == 0, done.err
    assert "The 20 most sensitive of 68" in done.out
    assert (tmp_path / "s/sensitivity.svg").read_text().startswith("<?xml")
    common = ("plan-precision", "tiny", tmp_path / "s", "--samples", 4)
    done = run(*common, "--budget", "bytes=5M", "-o", tmp_path / "p.yaml", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["chosen"]["bytes"] <= 5e6
    assert [row["name"] for row in found["uniform"]] == ["all int8-weights"]
    assert (tmp_path / "p.svg").exists()
    plan, config = load_precision(str(tmp_path / "p.yaml")), open_checkpoint("tiny").config
    kinds = [
        plan.precision_of(layer).kind
        for name in TRACED_COMPONENTS
        for layer in component_layers(config, name)
    ]
    assert {"float", "int8-weights"} == set(kinds)
    assert "KL predicted" in run(*common, "--budget", "kl=0.1", "-o", tmp_path / "q.yaml", "--no-front").out
    for arguments, sentence in (
        (("--budget", "size=1", "-o", tmp_path / "x.yaml"), "The budget 'size=1' is not valid"),
        (("--budget", "kl=1", "-o", tmp_path / "x.txt"), "must end in .yaml"),
        (("--budget", "bytes=1", "-o", tmp_path / "x.yaml"), "The smallest plan takes"),
    ):
        assert refused(run(*common, *arguments), sentence)
    assert not (tmp_path / "x.yaml").exists()
    missing = ("plan-precision", "tiny", tmp_path, "--budget", "kl=1", "-o", tmp_path / "x.yaml")
    assert refused(run(*missing), "make it with 'dsvl-export sensitivity'")
