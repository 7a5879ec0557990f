"""Export: bundles of both variants, resume, interruption, full disks, foreign folders."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest

from dsvl_export import export, parity
from dsvl_export.compilers.registry import check_options
from dsvl_export.exporter.stages import ExportProgress
from dsvl_export.exporter.staging import Staging
from dsvl_export.parity_check.report.record import record_verdict
from dsvl_export.targets.options import CompileOptions, ExecuTorchOptions
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.manifest import MANIFEST
from runtimes.errors import UserError
from tests.conftest import OraclePair

SCHEMA = json.loads((Path(__file__).parents[3] / "runtimes/bundle/manifest.schema.json").read_text())


class Recorder:
    """Which stages ran and which were reused."""

    def __init__(self, fail_at: str = "") -> None:
        self.states: dict[str, str] = {}
        self.fail_at = fail_at

    def __call__(self, progress: ExportProgress) -> None:
        if progress.stage == self.fail_at:
            raise KeyboardInterrupt
        if progress.stage.startswith(("sizes of", "hash of", "range of")):  # no stages of the bundle
            return
        self.states[progress.stage] = progress.state

    def count(self) -> Counter[str]:
        return Counter(self.states.values())


def test_manifests_of_random_checkpoints_fit_the_schema(random_bundle: Bundle) -> None:
    """That their artifacts pass is tested in ``test_localization``."""
    jsonschema.validate(json.loads(json.dumps(random_bundle.manifest.to_dict())), SCHEMA)
    jsonschema.validate(json.loads((random_bundle.folder / MANIFEST).read_text()), SCHEMA)


def test_manifest_round_trips_and_fits_its_schema(tiny_bundle: Bundle) -> None:
    raw = json.loads((tiny_bundle.folder / MANIFEST).read_text())
    jsonschema.validate(raw, SCHEMA)
    again = json.loads(json.dumps(Bundle.open(tiny_bundle.folder).manifest.to_dict()))
    assert again == raw
    on_disk = {
        str(file.relative_to(tiny_bundle.folder))
        for file in tiny_bundle.folder.rglob("*")
        if file.is_file() and ".staging" not in file.parts
    }
    assert on_disk == {MANIFEST, *tiny_bundle.manifest.files}
    assert tiny_bundle.problems() == []


def test_a_second_run_reuses_everything(bundle_copy: Path) -> None:
    recorder = Recorder()
    export("tiny", bundle_copy, precisions=("fp32", "fp16"), report=recorder)
    assert recorder.count() == {"reused": 15}


def test_adding_a_precision(tmp_path: Path) -> None:
    export("tiny", tmp_path / "b", precisions=["fp32"], goldens=False)
    recorder = Recorder()
    bundle = export("tiny", tmp_path / "b", precisions=["fp16"], goldens=False, report=recorder)
    assert recorder.count() == {"reused": 2, "finished": 3}
    assert bundle.choices() == [("onnxruntime", "fp32"), ("onnxruntime", "fp16")]
    with pytest.raises(UserError, match="has no goldens"):
        parity(bundle)


def test_an_interrupted_export_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "b"
    with pytest.raises(KeyboardInterrupt):
        export("tiny", folder, goldens=False, report=Recorder(fail_at="onnxruntime/fp32/decoder"))
    assert not (folder / MANIFEST).exists()
    with pytest.raises(UserError, match="the export was interrupted; run it again"):
        Bundle.open(folder)
    recorder = Recorder()
    bundle = export("tiny", folder, goldens=False, report=recorder)
    assert recorder.count() == {"reused": 4, "finished": 1}
    assert bundle.problems() == []


def test_a_precision_that_was_interrupted_is_no_choice(tmp_path: Path) -> None:
    """Half of fp16 is there when fp32 is finished: the bundle must open, and fp16 can be finished later."""
    with pytest.raises(KeyboardInterrupt):
        export(
            "tiny",
            tmp_path / "b",
            precisions=["fp16"],
            goldens=False,
            report=Recorder("onnxruntime/fp16/adaptor"),
        )
    bundle = export("tiny", tmp_path / "b", goldens=False)
    assert bundle.choices() == [("onnxruntime", "fp32")]
    assert not any("fp16" in path for path in bundle.manifest.files)
    recorder = Recorder()
    bundle = export("tiny", tmp_path / "b", precisions=["fp16"], goldens=False, report=recorder)
    assert recorder.states["onnxruntime/fp16/vision_encoder"] == "reused"
    assert sorted(bundle.choices()) == [("onnxruntime", "fp16"), ("onnxruntime", "fp32")]


def test_a_stage_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsvl_export.compilers.onnx import check

    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "check_contract", fail)
    with pytest.raises(KeyboardInterrupt):
        export("tiny", tmp_path / "b", goldens=False)
    left = {str(file.relative_to(tmp_path / "b")) for file in (tmp_path / "b").rglob("*") if file.is_file()}
    assert left == {".staging/stages.json", "token_embedding/token_embedding.safetensors",
                    "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"}  # fmt: skip


def test_a_file_that_changed_is_made_again(bundle_copy: Path) -> None:
    (bundle_copy / "onnxruntime/fp16/adaptor/adaptor.onnx").unlink()
    recorder = Recorder()
    bundle = export("tiny", bundle_copy, precisions=("fp32", "fp16"), report=recorder)
    assert recorder.states["onnxruntime/fp16/adaptor"] == "finished"
    assert recorder.count() == {"reused": 14, "finished": 1}
    assert bundle.problems() == []


def test_foreign_folders_are_left_alone(tmp_path: Path, bundle_copy: Path, pair: OraclePair) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not empty and holds no bundle"):
        export("tiny", tmp_path / "mine")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match="is a file; give a folder"):
        export("tiny", tmp_path / "mine" / "thesis.txt")
    with pytest.raises(UserError, match="a bundle of another checkpoint"):
        export(pair.checkpoint.folder, bundle_copy)
    assert Bundle.open(bundle_copy).problems() == []


def test_a_foreign_manifest_is_no_bundle(tmp_path: Path) -> None:
    """A web application has a manifest.json too; its files must survive."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "thesis.txt").write_text("years of work")
    (tmp_path / MANIFEST).write_text('{"name": "an app"}')
    with pytest.raises(UserError, match="schema version None"):
        export("tiny", tmp_path)
    assert (tmp_path / "tokenizer" / "thesis.txt").read_text() == "years of work"
    assert not (tmp_path / ".staging").exists()


def test_a_bundle_that_lost_its_record_is_extended(bundle_copy: Path, pair: OraclePair) -> None:
    """Copied without dot files: nothing is lost, and it still knows its checkpoint."""
    shutil.rmtree(bundle_copy / ".staging")
    with pytest.raises(UserError, match="a bundle of another checkpoint"):
        export(pair.checkpoint.folder, bundle_copy)
    shutil.rmtree(bundle_copy / ".staging")
    bundle = export("tiny", bundle_copy, precisions=["fp16"])
    assert bundle.choices() == [("onnxruntime", "fp32"), ("onnxruntime", "fp16")]
    assert bundle.problems() == []


def test_damage_of_the_same_size_is_repaired(bundle_copy: Path) -> None:
    file = bundle_copy / "onnxruntime/fp32/adaptor/adaptor.onnx"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    assert Bundle.open(bundle_copy).problems() == [
        "onnxruntime/fp32/adaptor/adaptor.onnx has a wrong SHA-256"
    ]
    recorder = Recorder()
    bundle = export("tiny", bundle_copy, precisions=("fp32", "fp16"), report=recorder)
    assert recorder.count() == {"reused": 14, "finished": 1}
    assert bundle.problems() == []


def test_an_interrupted_repair_is_no_bundle_until_it_is_done(bundle_copy: Path) -> None:
    """Files that the old manifest names are being replaced, so it must not vouch for them."""
    record_verdict(Bundle.open(bundle_copy), parity(bundle_copy, precision="fp16"))
    (bundle_copy / "onnxruntime/fp32/adaptor/adaptor.onnx").write_bytes(b"")
    with pytest.raises(KeyboardInterrupt):
        export("tiny", bundle_copy, report=Recorder(fail_at="onnxruntime/fp32/decoder"))
    with pytest.raises(UserError, match="interrupted"):
        Bundle.open(bundle_copy)
    bundle = export("tiny", bundle_copy)
    assert bundle.problems() == []
    assert len(bundle.choices()) == 2
    assert bundle.manifest.parity.keys() == {"onnxruntime/fp16"}


def test_one_export_at_a_time(bundle_copy: Path) -> None:
    first = Staging(bundle_copy)
    first.open()
    with pytest.raises(UserError, match="Another export is writing"):
        export("tiny", bundle_copy)
    first.close()
    export("tiny", bundle_copy)


def test_a_refused_export_leaves_the_running_one_alone(tmp_path: Path) -> None:
    """Of a new folder, and of a bundle whose manifest is away while it is extended."""
    running = Staging(tmp_path / "new")
    running.open()
    (tmp_path / "new/.staging/half").mkdir()
    with pytest.raises(UserError, match="Another export is writing"):
        export("tiny", tmp_path / "new", goldens=False)
    assert (tmp_path / "new/.staging/half").is_dir()
    running.close()
    assert not (tmp_path / "new").exists()

    export("tiny", tmp_path / "b", goldens=False)
    (tmp_path / "b" / MANIFEST).rename(tmp_path / "b/.staging/previous.json")
    (tmp_path / "b/.staging/stages.json").write_text("{}")
    running = Staging(tmp_path / "b")
    running.open()
    with pytest.raises(UserError, match="Another export is writing"):
        export("tiny", tmp_path / "b", goldens=False)
    running.close()
    assert (tmp_path / "b/.staging/previous.json").exists()


@pytest.mark.parametrize("name", ["stages.json", "previous.json"])
def test_a_damaged_record_is_kept_for_who_is_to_delete_it(tmp_path: Path, name: str) -> None:
    export("tiny", tmp_path / "b", goldens=False)
    (tmp_path / "b" / MANIFEST).unlink()
    (tmp_path / "b/.staging/stages.json").write_text("{}")
    (tmp_path / "b/.staging" / name).write_text('{"tokenizer": 3}')
    with pytest.raises(UserError):
        export("tiny", tmp_path / "b", goldens=False)
    assert (tmp_path / "b/.staging" / name).exists()


def test_leftovers_of_a_killed_export_go(tmp_path: Path) -> None:
    export("tiny", tmp_path / "b", goldens=False)
    leftover = tmp_path / "b/.staging/onnxruntime_fp16_decoder"
    leftover.mkdir()
    (leftover / "half.onnx").write_bytes(b"x" * 1000)
    export("tiny", tmp_path / "b", goldens=False)
    assert not leftover.exists()
    (tmp_path / "b/.staging/stages.json").write_text('{"tokenizer": 3}')
    with pytest.raises(UserError, match="stages.json is damaged; delete it"):
        export("tiny", tmp_path / "b")
    (tmp_path / "b/.staging/stages.json").unlink()
    (tmp_path / "b" / MANIFEST).unlink()
    assert export("tiny", tmp_path / "b", goldens=False).problems() == []


def test_bad_requests_write_nothing(tmp_path: Path) -> None:
    for backend, precision, sentence in (
        (
            "onnxruntime",
            "int3",
            "no precision 'int3'; there are fp32, fp16, bf16, 8da4w, 8da4w-g128, 8da8w, fp8",
        ),
        ("quantum", "fp32", "no backend 'quantum'"),
    ):
        with pytest.raises(UserError, match=sentence):
            export("tiny", tmp_path / "b", backend, [precision])
    with pytest.raises(UserError, match="does not exist"):
        export(tmp_path / "absent", tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(("backend", "option", "flag"), [
    ("onnxruntime", {"delegate": "coreml"}, "--delegate"),
    ("onnxruntime", {"tensorrt": "11.4"}, "--tensorrt"),
    ("coreml", {"prefill": False}, "--no-prefill"),
    ("tensorrt_rtx", {"tensorrt": "11.4"}, "--tensorrt"),
    ("tensorrt", {"capabilities": (89,)}, "--sm"),
])  # fmt: skip
def test_options_that_would_change_nothing_are_refused(
    tmp_path: Path, backend: str, option: dict[str, Any], flag: str
) -> None:
    with pytest.raises(UserError, match=f"{backend} has no {flag};"):
        export("tiny", tmp_path / "b", backend, ["fp16"], **option)
    assert not (tmp_path / "b").exists()


def test_a_second_decoder_is_left_out_where_there_is_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no second decoder for prompts in fp32 and int4; leave out --no-p"):
        export("tiny", tmp_path / "b", precisions=["fp32", "int4"], prefill=False)
    bundle = export("tiny", tmp_path / "b", precisions=["fp32", "8da4w"], prefill=False, goldens=False)
    assert not any("prefill" in path for path in bundle.manifest.files)


def test_a_third_partys_compiler_may_know_no_options() -> None:
    unknown: Any = SimpleNamespace()
    check_options({"theirs": unknown}, CompileOptions(executorch=ExecuTorchOptions("coreml")))


@pytest.fixture(params=[1, 6])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A real file system, too small for the embedding, or for the encoder."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = f"size={request.param}m"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=False).returncode:
        pytest.skip("this machine does not allow mounting")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_disk_that_is_too_small_is_refused_before_any_work(small_disk: Path) -> None:
    recorder = Recorder()
    with pytest.raises(UserError, match=r"takes 11\.\d MB in .*/b, but only \d\.\d MB are free there"):
        export("tiny", small_disk / "b", goldens=False, report=recorder)
    assert not recorder.states
    assert list(small_disk.iterdir()) == []
    (small_disk / "b").mkdir()
    with pytest.raises(UserError, match="are free there"):
        export("tiny", small_disk / "b", goldens=False)
    assert list((small_disk / "b").iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_disk_that_fills_up_is_one_sentence_and_then_goes_on(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where something else writes to it meanwhile."""
    with monkeypatch.context() as patch:
        patch.setattr(
            "dsvl_export.exporter.stages.shutil.disk_usage", lambda folder: SimpleNamespace(free=1 << 40)
        )
        with pytest.raises(UserError, match=r"The export stopped: .*[Nn]o space"):
            export("tiny", small_disk / "b", goldens=False)
    assert not (small_disk / "b" / MANIFEST).exists()
    subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
    recorder = Recorder()
    assert export("tiny", small_disk / "b", goldens=False, report=recorder).problems() == []


def test_what_is_finished_needs_no_disk_again(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(free=0)
    monkeypatch.setattr("dsvl_export.exporter.stages.shutil.disk_usage", lambda folder: usage)
    precisions = list(Bundle.open(bundle_copy).manifest.contracts)
    export("tiny", bundle_copy, precisions=precisions)
    with pytest.raises(UserError, match="0 B are free there"):
        export("tiny", bundle_copy, precisions=[*precisions, "int8-weights"])
    assert Bundle.open(bundle_copy).problems() == []


def test_checkpoints_do_not_mix(bundle_copy: Path, tiny_copy: Path) -> None:
    """A changed config is another checkpoint, even with the same weights."""
    config = tiny_copy / "config.json"
    config.write_text(
        config.read_text().replace('"max_position_embeddings": 1024', '"max_position_embeddings": 999')
    )
    with pytest.raises(UserError, match="another checkpoint"):
        export(tiny_copy, bundle_copy)
    shutil.rmtree(tiny_copy)


def test_quantization_errors_follow_the_goldens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is measured for every half precision that the bundle has, whenever it has goldens."""
    from reference.goldens import record as goldens

    file = tmp_path / "b/quantization_error/fp16/quantization_error.json"
    export("tiny", tmp_path / "b", precisions=["fp16"], goldens=False)
    assert not file.exists()
    export("tiny", tmp_path / "b", precisions=["fp32"])
    first = json.loads(file.read_text())
    assert len(first["goldens"]) == 10
    assert parity(tmp_path / "b", precision="fp16").passed
    requests = goldens.golden_requests
    monkeypatch.setattr("reference.goldens.record.golden_requests", lambda *prompt: requests(*prompt)[::-1])
    monkeypatch.setattr("dsvl_export.exporter.job.__version__", "0.0.1")
    export("tiny", tmp_path / "b", precisions=["fp32"])
    # The goldens are decoded together, so their order shows in the last bits.
    for found, expected in zip(json.loads(file.read_text())["goldens"], first["goldens"][::-1], strict=True):
        assert found == pytest.approx(expected, rel=0.01)
    assert parity(tmp_path / "b", precision="fp16").passed
