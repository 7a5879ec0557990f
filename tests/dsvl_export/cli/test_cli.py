"""The command line: every command, its JSON, its help, and one sentence with exit code 2 for bad input."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from dsvl_export.cli.display import describe_verdict
from dsvl_export.parity_check.tolerances import load_tolerances
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.manifest import MANIFEST
from runtimes.memory import available_memory, required_memory
from runtimes.units import size
from tests.dsvl_export.cli.command_line import refused
from tests.dsvl_export.parity_check.faults import plant, scaled, weight

COMMANDS = (
    "demo", "export", "run", "chat", "inspect", "verify", "parity", "compare", "doctor", "targets", "plan",
    "calibrate", "sensitivity", "plan-precision", "lint", "build-engine", "bench", "serve",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(run, command: str) -> None:
    done = run(command, "--help")
    assert done.code == 0
    assert "Usage: dsvl-export " + command in " ".join(done.out.split())
    assert command in run("--help").out
    assert run("--version").out.startswith("dsvl-export 0.")


def test_run_streams_and_gives_json(run, tiny_bundle: Bundle, pictures: list[Path]) -> None:
    question = ("run", tiny_bundle.folder, "--image", pictures[0], "--prompt", "Describe the picture.")
    plain = run(*question)
    assert plain.code == 0
    assert plain.out.startswith("The ")
    assert "tokens (eos)" in plain.err
    machine = json.loads(run(*question, "--json", "--precision", "fp16", "--threads", "1").out)
    assert machine["finish_reason"] == "eos"
    assert machine["text"].startswith("The ")
    assert machine["prompt_tokens"] > 64
    assert (
        run(*question, "--max-new-tokens", "2", "--stop", "zzz", "--temperature", "1", "--seed", "3").code
        == 0
    )


def test_chat_remembers_the_image(
    run, tiny_bundle: Bundle, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["Count the shapes in the picture.", "Describe the picture.", "/reset", "/image nowhere.png",
             f"/image {pictures[1]}", "Describe the picture.", "<image_placeholder>?",
             f"/image {pictures[0]}", 2 * "<image_placeholder>", "/odd", "/quit"]  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    done = run("chat", tiny_bundle.folder, "--image", pictures[0])
    assert done.code == 0
    assert done.out.count("Model: ") == 4
    assert done.out.count("The ") == 3
    assert "The image file nowhere.png does not exist" in done.err
    assert "have 2 <image_placeholder> but 1 images were passed" in done.err
    monkeypatch.setattr(sys, "stdin", io.StringIO("Count the shapes in the picture.\nHello\n"))
    machine = run("chat", tiny_bundle.folder, "--image", pictures[0], "--json")
    assert [json.loads(line)["finish_reason"] for line in machine.out.splitlines()] == ["eos", "eos"]


def test_parity_tables_json_and_exit_codes(run, bundle_copy: Path, tmp_path: Path) -> None:
    done = run("parity", bundle_copy)
    assert done.code == 0
    for name in ("vision_encoder", "greedy_tokens", "fp32", "fp16", "passed", "99.2% exact", "ran on cpu"):
        assert name in done.out
    assert done.err.count("Report: ") == 2
    assert (
        json.loads((bundle_copy / MANIFEST).read_text())["parity"]["onnxruntime/fp16"]["verdict"] == "passed"
    )
    rows = [{"image": str(file), "prompt": "Describe the picture.", "expected": "no"}
            for file in sorted((bundle_copy / "goldens/images").glob("0*.png"))[:2]]  # fmt: skip
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, rows)))
    quick = ("parity", bundle_copy, "--json", "--task")
    assert len(json.loads(run(*quick, "none", "--backend", "onnxruntime").out)) == 2
    (result,) = json.loads(run(*quick, tmp_path / "task.jsonl", "--precision", "fp32").out)
    assert result["verdict"] == "passed"
    assert (result["task"]["questions"], result["task"]["right"], result["task"]["baseline"]) == (2, 0, None)
    assert result["task"]["by_kind"] == {"all": 0.0}
    unjudged = run(*quick, tmp_path / "task.jsonl")  # fp32 answers nothing correctly
    assert unjudged.code == 3
    assert [row["verdict"] for row in json.loads(unjudged.out)] == ["passed", "not judged"]
    # Another adaptor's file in its place.
    shutil.copyfile(
        bundle_copy / "onnxruntime/fp16/adaptor/adaptor.onnx",
        bundle_copy / "onnxruntime/fp32/adaptor/adaptor.onnx",
    )
    assert refused(run("parity", bundle_copy, "--precision", "fp32"), "adaptor.onnx has")


def test_parity_and_export_exit_with_1_where_something_differs(
    run, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(bundle_copy, "fp32", "adaptor", weight("layers.1.weight_transposed", scaled(1.01)))
    done = run("parity", bundle_copy, "--task", "none")
    assert done.code == 1
    assert "failed" in done.out
    assert "Localization in the adaptor: layers.1 is the first tap beyond its bound" in done.out
    assert Bundle.open(bundle_copy).manifest.parity["onnxruntime/fp32"]["verdict"] == "failed"
    strict = {name: replace(row, factor=1e-6) for name, row in load_tolerances().items()}
    monkeypatch.setattr("dsvl_export.parity_check.against_reference.load_tolerances", lambda: strict)
    assert run("export", "tiny", "--output", bundle_copy).code == 1


def test_parity_options(run, bundle_copy: Path, tmp_path: Path) -> None:
    """A report elsewhere leaves the bundle as it was; tolerances and taps come from the command line."""
    before = (bundle_copy / MANIFEST).read_text()
    (tmp_path / "t.yaml").write_text("fp32: {stages: {vision_encoder: 1.0e-9}}")
    ask = (
        "parity",
        bundle_copy,
        "--precision",
        "fp32",
        "--task",
        "none",
        "--report",
        tmp_path / "r",
        "--json",
    )
    done = run(*ask, "--tolerances", tmp_path / "t.yaml", "--taps", "--threads", "1")
    assert done.code == 1
    (document,) = json.loads(done.out)
    assert document["tolerances"]["vision_encoder"]["stages"] == {"vision_encoder": 1e-9}
    assert [row["component"] for row in document["localizations"]] == ["vision_encoder", "adaptor", "decoder"]
    assert (bundle_copy / MANIFEST).read_text() == before
    assert not (bundle_copy / "reports").exists()
    assert {file.name for file in (tmp_path / "r").iterdir()} == {
        "parity-onnxruntime-fp32.json", "parity-onnxruntime-fp32.html"
    }  # fmt: skip
    live = run("parity", bundle_copy, "--precision", "fp32", "--task", "none", "--live", "tiny", "--json")
    assert json.loads(live.out)[0]["reference"] == "torch fp32, live from tiny"
    (tmp_path / "t.yaml").write_text("fp32: {bound: 1}")
    assert refused(run(*ask, "--tolerances", tmp_path / "t.yaml"), "unknown keys for fp32: bound")
    (tmp_path / "file").write_text("")
    refused(run(*ask[:-2], tmp_path / "file"), "The report cannot be written to")


def test_compare_command(run, tiny_bundle: Bundle, tmp_path: Path) -> None:
    ask = ("compare", tiny_bundle.folder, tiny_bundle.folder, "--precision-b", "fp16", "--task", "none")
    done = run(*ask, "--report", tmp_path)
    assert done.code == 0
    assert "Parity of onnxruntime fp16" in done.out
    assert (tmp_path / "compare.html").exists()
    document = json.loads(run(*ask, "--json").out)
    assert document["reference"] == f"{tiny_bundle.folder} onnxruntime fp32"
    assert refused(run(*ask, "--precision-a", "int8"), "holds no int8")


@pytest.mark.parametrize(
    ("kept", "shown"),
    [
        ({}, "not run"),
        ({"verdict": "passed", "execution": "ran on cpu with onnxruntime 1.32.0"}, "passed"),
        ({"verdict": "passed", "execution": "simulated by X 1.2"}, "passed (simulated by X 1.2)"),
        ({"verdict": "failed", "execution": "simulated by X 1.2"}, "failed (simulated by X 1.2)"),
        (
            {"verdict": "passed", "execution": "built by A, numerics by B"},
            "passed (built by A, numerics by B)",
        ),
        ({"verdict": "not judged", "execution": "not run: no GPU"}, "not judged"),
        ({"verdict": "passed"}, "passed (execution not recorded)"),
        (
            {"verdict": "passed", "execution": "ran on cpu with x 1", "tolerances": "overridden"},
            "passed (with overridden tolerances)",
        ),
    ],
)
def test_a_bare_passed_is_for_what_ran(bundle_copy: Path, run, kept: dict, shown: str) -> None:
    assert describe_verdict(kept) == shown
    manifest = bundle_copy / "manifest.json"
    raw = json.loads(manifest.read_text())
    rows = {"goldens": 1, "report": "reports/x.json", **kept}
    raw["parity"] = {"onnxruntime/fp32": rows, "onnxruntime/fp16": rows} if kept else {}
    manifest.write_text(json.dumps(raw))
    rows = [line for line in run("inspect", bundle_copy).out.splitlines() if "onnxruntime" in line]
    assert len(rows) == 6
    assert all(line.rstrip("│ ").endswith(shown) for line in rows), rows


def test_inspect_and_verify(run, bundle_copy: Path) -> None:
    shown = run("inspect", bundle_copy)
    assert shown.code == 0
    for text in ("SAM + SigLIP", "128 px → 64 tokens", "key_cache_0", "batch, 4, capacity, 32", "not run"):
        assert text in shown.out
    assert json.loads(run("inspect", bundle_copy, "--json").out)["schema_version"] == 1
    assert "files of" in run("verify", bundle_copy).out
    assert json.loads(run("verify", bundle_copy, "--json").out)["problems"] == []


def test_export_command(run, tmp_path: Path) -> None:
    done = run("export", "tiny", "--output", tmp_path / "b")
    assert done.code == 0
    assert "Parity of onnxruntime fp32" in done.out
    assert "Wrote" in done.out
    again = run("export", "tiny", "--output", tmp_path / "b", "--no-parity", "--json")
    assert json.loads(again.out)["parity"] == []
    assert again.err.count("unchanged, reused") == 8


@pytest.mark.full
def test_demo_ends_with_what_to_try_next(run, tmp_path: Path) -> None:
    """The story, which goes to stderr where stdout has the document for machines."""
    done = run("demo", "--output", tmp_path / "demo", "--json")
    assert done.code == 0
    assert done.err.count("Model: ") == 12
    stages = [line.strip() for line in done.err.splitlines() if line.startswith("   onnxruntime/fp")]
    assert len(stages) == 6
    assert "sizes of" not in done.err
    proofs = 3 if find_spec("tensorrt_rtx") else 2
    audited = 2  # the files of ONNX Runtime; engines are not
    assert done.err.count("passed") == proofs * (1 + 11) + audited
    assert done.err.count("Report: ") == proofs
    assert "dsvl-export run" in done.err.split("Next")[1]
    assert len(list((tmp_path / "demo/pictures").glob("*.png"))) == 3
    machine = json.loads(done.out)
    assert len(machine["answers"]) == 12
    assert [result["verdict"] for result in machine["parity"]] == ["passed"] * proofs


def test_bad_bundles(run, bundle_copy: Path, tmp_path: Path) -> None:
    assert refused(run("inspect", tmp_path / "absent"), "There is no bundle folder")
    (tmp_path / "empty").mkdir()
    assert refused(run("verify", tmp_path / "empty"), "has no manifest.json: it is not a bundle")
    assert refused(
        run("run", bundle_copy, "--prompt", "x", "--backend", "tpu"), "holds no tpu; it has onnxruntime fp32"
    )
    assert refused(run("run", bundle_copy, "--prompt", "x", "--precision", "int8"), "holds no int8")
    text = (bundle_copy / MANIFEST).read_text()
    for broken, sentence in (
        ("{", "is not valid JSON"),
        (text.replace('"schema_version": 1', '"schema_version": 99'), "schema version 99"),
        (text.replace('"prompt":', '"prompts":'), "is not a valid manifest"),
        (text.replace('"image_size":', '"image_sizes":'), "is not a valid manifest: data.preprocessing"),
        (text.replace('"meaning":', '"sense":'), "is not a valid manifest: data.contracts"),
        (text.replace("tokenizer/tokenizer.json", "../../etc/passwd"), "is not a valid manifest: data.files"),
        (text.replace("tokenizer/tokenizer.json", "/etc/passwd"), "is not a valid manifest: data.files"),
        (text.replace("onnxruntime/fp32/decoder/decoder.onnx", "../decoder.onnx"), "is not a valid manifest"),
        (
            text.replace('"default_capacity": ', '"default_capacity": "many", "was": '),
            "is not a valid manifest",
        ),
        (text.replace('"fp16": {', '"fp17": {', 1), "has fp16 artifacts but no contracts"),
        (text.replace('"token_embedding": "', '"token_embedding": "un'), "no size and hash"),
    ):
        assert broken != text
        (bundle_copy / MANIFEST).write_text(broken)
        assert refused(run("run", bundle_copy, "--prompt", "x"), sentence)
    (bundle_copy / MANIFEST).write_text(text)
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (bundle_copy / "tokenizer/tokenizer.json").unlink()
    (bundle_copy / "tokenizer/tokenizer.json").symlink_to(secret)
    assert refused(run("verify", bundle_copy), "tokenizer/tokenizer.json has 2 bytes, expected")


def test_bad_checkpoints(run, tiny_copy: Path, tmp_path: Path) -> None:
    """Through the command line; tests/reference/checkpoint/test_checkpoint.py has every case."""
    export = ("export", tiny_copy, "--output", tmp_path / "b")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert refused(
        run("export", tiny_copy, "--output", tmp_path / "mine"), "is not empty and holds no bundle"
    )
    weights = tiny_copy / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    assert refused(run(*export), "model.safetensors is damaged or cut short")
    weights.unlink()
    assert refused(run(*export), "holds no weights")
    index = tiny_copy / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-00001.safetensors"}}')
    assert refused(run(*export), "model-00001.safetensors is missing")
    index.unlink()
    weights.write_bytes(content)
    (tiny_copy / "config.json").write_text('{"model_type": "llava"}')
    assert refused(run(*export), "which is not a DeepSeek-VL or Janus model")
    (tiny_copy / "config.json").write_text("{")
    assert refused(run(*export), "is not valid JSON")
    assert not (tmp_path / "b").exists()


def test_damaged_files_are_found_before_they_are_loaded(run, bundle_copy: Path, pictures: list[Path]) -> None:
    file = bundle_copy / "onnxruntime/fp32/decoder/decoder.onnx"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    question = ("run", bundle_copy, "--prompt", "x", "--image", pictures[0])
    assert refused(run(*question), "decoder.onnx has a wrong SHA-256")
    assert refused(run("verify", bundle_copy), "decoder.onnx has a wrong SHA-256")
    assert run("verify", bundle_copy, "--json").code == 2
    file.write_bytes(content[:1000])
    assert refused(run(*question), "decoder.onnx has 1000 bytes, expected")
    assert refused(run(*question, "--no-verify"), "ONNX Runtime cannot load")
    file.unlink()
    assert refused(run(*question), "decoder.onnx is missing")


def test_bad_requests(run, tiny_bundle: Bundle, pictures: list[Path], tmp_path: Path) -> None:
    ask = ("run", tiny_bundle.folder, "--prompt")
    (tmp_path / "text.png").write_text("hello")
    assert refused(run(*ask, "x", "--image", tmp_path / "text.png"), "is not a readable image")
    assert refused(run(*ask, "x", "--image", tmp_path / "none.png"), "does not exist")
    two = "<image_placeholder><image_placeholder>"
    assert refused(run(*ask, two, "--image", pictures[0]), "2 <image_placeholder> but 1 images")
    assert refused(run(*ask, "word " * 500, "--capacity", "200"), "tokens but the KV cache holds 200")
    assert refused(run(*ask, "x", "--top-p", "0"), "Top_p must be in (0, 1]")
    assert refused(run(*ask, "x", "--seed", "-1"), "Seed must not be negative")
    assert refused(run(*ask, "x\udcff"), "not valid UTF-8")
    assert refused(run(*ask, "x", "--capacity", "5000"), "between 1 and the model's 1024")
    assert refused(run("export", tmp_path / "absent", "--output", tmp_path / "b"), "does not exist")
    assert refused(
        run("export", "tiny", "--output", tmp_path / "b", "--precision", "fp7"), "no precision 'fp7'"
    )
    assert refused(run("parity", tiny_bundle.folder, "--task", tmp_path / "none.jsonl"), "cannot be read")
    (tmp_path / "bad.jsonl").write_text('{"image": "x.png"}')
    assert refused(run("parity", tiny_bundle.folder, "--task", tmp_path / "bad.jsonl"), "Line 1 of")
    assert not (tmp_path / "b").exists()
    assert run("run", tiny_bundle.folder).code == 2
    assert run("nonsense").code == 2


def test_a_missing_backend_names_its_extra(run, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert refused(run("run", tiny_bundle.folder, "--prompt", "x"), "pip install 'dsvl-export[onnxruntime]'")


def test_what_cannot_fit_is_refused_before_it_is_loaded(
    run, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half precision counts double: ONNX Runtime widens it on a CPU."""
    free = 5_000_000
    assert free > tiny_bundle.manifest.files["onnxruntime/fp16/vision_encoder/vision_encoder.onnx"].bytes
    monkeypatch.setattr("runtimes.backends.onnxruntime.available_memory", lambda: free)
    ask = ("run", tiny_bundle.folder, "--prompt", "x", "--precision", "fp16")
    assert refused(run(*ask), "vision_encoder into ONNX Runtime on a CPU takes at least 0.0 GB")
    monkeypatch.undo()
    assert run(*ask, "--max-new-tokens", "1").code == 0
    assert available_memory() > 1 << 28


@pytest.mark.parametrize(("command", "spare", "said"), [
    (("run", "--prompt", "Describe the picture.", "--max-new-tokens", "1"), -1, True),
    (("run", "--prompt", "Describe the picture.", "--max-new-tokens", "1"), 0, False),
    (("bench", "--context", "30", "--tokens", "1", "--repeats", "1"), -1, True),
    (("parity",), -1, True),
])  # fmt: skip
def test_short_memory_is_said_with_both_figures(
    run, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], spare: int, said: bool
) -> None:
    """The bundle runs all the same: the system may still find room."""
    free = required_memory(Bundle.open(bundle_copy), "onnxruntime", "fp32", None) + spare
    monkeypatch.setattr("runtimes.memory.available_memory", lambda: free)
    done = run(command[0], bundle_copy, *command[1:], "--precision", "fp32")
    assert done.code == 0
    sentence = rf"Low memory: onnxruntime fp32 needs [\d.]+ MB .*, but only {size(free)} are free"
    assert bool(re.search(sentence, done.err.replace("\n", " "))) == said


def test_a_device_that_is_not_there_is_refused(tiny_bundle: Bundle) -> None:
    """ONNX Runtime itself would go on without a word on the CPU."""
    from runtimes.errors import UserError
    from runtimes.pipeline import Pipeline

    with pytest.raises(UserError, match="cannot run here: this ONNX Runtime has no cuda, only cpu"):
        Pipeline.open(tiny_bundle, device="cuda")


def test_an_interrupted_command_goes_on(tmp_path: Path) -> None:
    """A real Ctrl-C in a real process, then the same command again."""
    command = [
        sys.executable,
        "-m",
        "dsvl_export.cli",
        "export",
        "tiny",
        "--output",
        str(tmp_path / "b"),
        "--no-parity",
    ]
    # Background jobs of a shell, such as this test may be part of, ignore SIGINT unless told otherwise.
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    record = tmp_path / "b/.staging/stages.json"
    while time.monotonic() < deadline and not (record.exists() and "tokenizer" in record.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    said = [line for line in errors.splitlines() if line]
    assert said[-2:] == ["Run the same command again: the export resumes.", "Interrupted."]
    assert "Traceback" not in errors
    assert not (tmp_path / "b" / MANIFEST).exists()
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "reused" in again.stderr
    assert Bundle.open(tmp_path / "b").problems() == []
