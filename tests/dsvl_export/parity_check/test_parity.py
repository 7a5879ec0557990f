"""The parity check passes correct artifacts and fails faulty ones, stage by stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import jsonschema
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dsvl_export.exporter.export import export
from dsvl_export.parity_check import compare, parity
from dsvl_export.parity_check.report.document import make_document, schema
from dsvl_export.parity_check.report.record import record_verdict
from dsvl_export.parity_check.result import ParityResult
from reference.tiny import HELDOUT
from runtimes.backends import onnxruntime
from runtimes.bundle.bundle import Bundle
from runtimes.errors import UserError
from runtimes.goldens.task import load_task
from runtimes.session import Execution
from tests.dsvl_export.parity_check.faults import plant, rehash, scaled, weight, zeroed

FP32, FP16 = ("onnxruntime", "fp32"), ("onnxruntime", "fp16")


def failed(result: ParityResult) -> set[str]:
    return {stage.name for stage in result.stages if stage.state == "failed"}


def test_both_precisions_pass(tiny_bundle: Bundle) -> None:
    fp32, fp16 = (parity(tiny_bundle, precision=precision) for precision in ("fp32", "fp16"))
    assert fp32.passed
    assert fp16.passed
    assert (fp32.exit_code, fp32.execution.kind, fp32.goldens) == (0, "ran", 10)
    for stage in fp32.stages[1:7]:
        assert stage.errors
        assert stage.errors.relative_rms <= 1e-5
        assert stage.errors.snr_db > 100
        assert not stage.detail
    for stage in fp16.stages[2:7]:
        assert stage.errors
        assert 1e-6 < stage.errors.relative_rms < stage.errors.bound
        assert stage.errors.quantization_error
    assert len(fp32.tokens) == 10
    assert all(row.actual == row.expected for row in fp32.tokens)
    assert fp32.stage("task_accuracy").state == "not run"
    logits = fp16.stage("teacher_forced_logits").logits
    assert logits
    assert (logits.rows, logits.flips) == (10 * (32 + 8), 0)  # at once, and eight single steps
    assert 0 < logits.kl_mean < 1e-4


@pytest.mark.parametrize(
    ("component", "name", "stages"),
    [
        ("vision_encoder", "high.blocks.2.mlp.fc1.weight_transposed", {"vision_encoder"}),
        ("adaptor", "layers.1.weight_transposed", {"adaptor"}),
        ("decoder", "layers.1.self_attn.v_proj.weight_transposed",
         {"prefill_logits", "teacher_forced_logits"}),
    ],
)  # fmt: skip
def test_one_zeroed_row_fails_its_own_rung(
    bundle_copy: Path, component: str, name: str, stages: set[str]
) -> None:
    result = parity(plant(bundle_copy, "fp32", component, weight(name, zeroed(3))), precision="fp32")
    assert result.verdict == "failed"
    assert result.exit_code == 1
    also = {"greedy_tokens", "long_context", "entry_points"}  # the last compares the stored prefix
    assert stages | {"layers"} <= failed(result) <= stages | {"layers"} | also


def test_changed_goldens_are_noticed(bundle_copy: Path) -> None:
    path = "goldens/03.safetensors"
    (bundle_copy / path).write_bytes(b"broken" + (bundle_copy / path).read_bytes()[6:])
    with pytest.raises(UserError, match=r"goldens/03.safetensors has a wrong SHA-256"):
        parity(bundle_copy)
    with pytest.raises(UserError, match="is not a readable golden"):
        parity(rehash(bundle_copy, path))


def respoil(bundle: Path, index: int, texts: dict[str, str], arrays: dict[str, np.ndarray]) -> Bundle:
    """Change texts and arrays of a golden and give it its new hash."""
    path = bundle / "goldens" / f"{index:02}.safetensors"
    with safe_open(path, "np") as handle:
        metadata = handle.metadata()
    tensors = load_file(path)
    save_file({**tensors, **arrays}, path, {**metadata, **texts})
    return rehash(bundle, f"goldens/{index:02}.safetensors")


def test_goldens_that_nothing_can_be_compared_with(bundle_copy: Path, tmp_path: Path) -> None:
    bundle = respoil(bundle_copy, 2, {"checkpoint": "f" * 64}, {})
    with pytest.raises(UserError, match="recorded from the checkpoint ffffffffffff, not from 82a51146e622"):
        parity(bundle)
    logits = load_file(bundle_copy / "goldens/02.safetensors")["logits"]
    logits[3, 5] = np.inf
    digest = bundle.manifest.checkpoint["sha256"]
    bundle = respoil(bundle_copy, 2, {"checkpoint": digest}, {"logits": logits})
    with pytest.raises(UserError, match=r"02.safetensors holds NaN or infinity in logits"):
        parity(bundle)
    bare = export("tiny", tmp_path / "bare", goldens=False)
    with pytest.raises(UserError, match="has no goldens; export it again with goldens"):
        parity(bare)
    assert parity(bare, live="tiny").passed


def test_changed_preprocessing_fails(bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    spec = replace(bundle.manifest.preprocessing, background=(0, 0, 0), rescale_factor=1 / 254)
    bundle.manifest = replace(bundle.manifest, preprocessing=spec)
    result = parity(bundle, precision="fp32")
    assert "vision_encoder" in failed(result)
    assert "preprocess" in failed(result)  # chelsea.png is no square


def test_wrong_tokens_fail_and_near_ties_do_not(bundle_copy: Path) -> None:
    """The recorded tokens are changed to the runner-up; then its logit is raised to a near tie."""
    tensors = load_file(bundle_copy / "goldens/00.safetensors")
    best = int(tensors["greedy_tokens"][0])
    runner_up = int(np.argsort(tensors["logits"][0])[-2])
    tensors["greedy_tokens"][0] = runner_up
    tensors["logits"][0, runner_up] = tensors["logits"][0, best] + 5
    result = parity(respoil(bundle_copy, 0, {}, tensors), precision="fp32")
    assert result.stage("greedy_tokens").state == "failed"
    assert result.stage("greedy_tokens").detail == "golden 0 differs at token 0 (margin 5)"
    assert (result.tokens[0].diverges_at, result.tokens[0].near_tie) == (0, False)
    tensors["logits"][0, runner_up] = tensors["logits"][0, best] + 1e-6
    result = parity(respoil(bundle_copy, 0, {}, tensors), precision="fp32")
    assert result.stage("greedy_tokens").state == "passed"
    assert "near tie at token 0" in result.stage("greedy_tokens").detail
    assert result.tokens[0].near_tie


def test_nan_in_an_artifact_fails(bundle_copy: Path) -> None:
    bundle = plant(
        bundle_copy, "fp16", "decoder", weight("layers.1.mlp.up_proj.weight_transposed", scaled(np.nan))
    )
    result = parity(bundle, precision="fp16")
    assert result.verdict == "failed"
    assert "NaN or infinity in logits" in result.stage("prefill_logits").detail
    assert result.localizations[0].first == "layers.1"
    jsonschema.validate(json.loads(json.dumps(make_document(bundle, result), allow_nan=False)), schema())


def test_live_recomputes_the_reference(tiny_bundle: Bundle, siglip_pair) -> None:
    live = parity(tiny_bundle, precision="fp32", live="tiny")
    assert live.passed
    assert live.reference == "torch fp32, live from tiny"
    with pytest.raises(UserError, match="is not the checkpoint that"):
        parity(tiny_bundle, live=str(siglip_pair.checkpoint.folder))


def test_task_is_held_against_the_recorded_answers(tiny_bundle: Bundle, bundle_copy: Path) -> None:
    items = load_task(HELDOUT)[:60]
    result = parity(tiny_bundle, precision="fp16", task=items)
    assert result.passed
    assert result.task
    assert (result.task.baseline, result.task.questions) == ("the recorded reference", 60)
    assert result.task.accuracy_ratio == pytest.approx(1, abs=0.02)
    assert result.task.length_ratio == pytest.approx(1, abs=0.02)
    assert "MLPerf's 99.9 % is met" in result.stage("task_accuracy").detail
    bundle = plant(bundle_copy, "fp16", "decoder", weight("norm.weight", scaled(-1)))
    worse = parity(bundle, precision="fp16", task=items)
    assert worse.stage("task_accuracy").state == "failed"
    assert worse.task
    assert len(worse.task.wrong) == 20


def test_task_without_recorded_answers(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """fp32 artifacts or the live reference answer instead; without either nothing is judged."""
    items = [replace(item, reference=None, reference_tokens=None) for item in load_task(HELDOUT)[:12]]
    alone = parity(tiny_bundle, precision="fp32", task=items)
    assert alone.stage("task_accuracy").state == "measured"
    assert alone.passed
    beside = parity(tiny_bundle, precision="fp16", task=items)
    assert beside.task
    assert beside.task.baseline == "onnxruntime fp32"
    assert beside.passed
    live = parity(tiny_bundle, precision="fp16", task=items, live="tiny")
    assert live.task
    assert live.task.baseline == "the torch reference"
    assert live.passed
    single = export("tiny", tmp_path / "single", precisions=["fp16"])
    unjudged = parity(single, task=items)
    assert (unjudged.verdict, unjudged.exit_code) == ("not judged", 3)
    assert "no fp32 answers to compare with" in unjudged.stage("task_accuracy").detail
    hopeless = [replace(item, expected="?", reference="!", reference_tokens=2) for item in items]
    assert "no accuracy to compare with" in parity(single, task=hopeless).stage("task_accuracy").detail


def fake_backend(execution: Execution) -> ModuleType:
    """ONNX Runtime under another name, which says of itself what a backend on other hardware would."""
    module = ModuleType("fake")
    module.__dict__.update(vars(onnxruntime), execution=lambda artifact, device=None: execution)
    return module


@pytest.mark.parametrize(
    ("execution", "verdict", "code"),
    [
        (Execution("simulated", "an interpreter"), "passed", 0),
        (Execution("built only", "no GPU here"), "not judged", 3),
        (Execution("not run", "engine of another machine"), "not judged", 3),
    ],
)
def test_words_for_what_did_not_run(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, execution: Execution, verdict: str, code: int
) -> None:
    for module in ("runtimes.execution", "runtimes.pipeline"):
        monkeypatch.setattr(f"{module}.load_backend", lambda name: fake_backend(execution))
    result = parity(tiny_bundle, precision="fp32")
    assert (result.verdict, result.exit_code) == (verdict, code)
    assert str(result.execution).startswith(execution.kind)
    document = make_document(tiny_bundle, result)
    jsonschema.validate(document, schema())
    assert document["execution"] == asdict(execution)
    if code == 3:
        assert {stage.state for stage in result.stages} == {"not run"}
        assert compare(tiny_bundle, tiny_bundle, FP32, FP16).exit_code == 3


def test_artifacts_of_other_machines_are_not_judged(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(bundle_copy)

    def said(**changes: str) -> str:
        artifacts = tuple(replace(item, **changes) for item in bundle.manifest.artifacts)
        other = Bundle(bundle.folder, replace(bundle.manifest, artifacts=artifacts))
        result = parity(other)
        assert result.exit_code == 3
        return str(result.execution)

    assert said(target="cuda") == "not run: it was built for cuda, but only cpu is available"
    assert said(dialect="ort99") == "not run: its dialect is ort99, but this release runs ort"
    monkeypatch.setattr(onnxruntime, "_import", missing)
    assert "pip install 'dsvl-export[onnxruntime]'" in str(parity(bundle).execution)


def missing() -> None:
    raise UserError("The backend onnxruntime is not installed; run: pip install 'dsvl-export[onnxruntime]'.")


def test_compare_two_precisions_and_two_models(tiny_bundle: Bundle, bundle_copy: Path) -> None:
    result = compare(tiny_bundle, tiny_bundle, FP32, FP16, taps=True)
    assert result.passed
    assert result.bound("adaptor", None) == pytest.approx(7.1e-3)
    assert all(localization.taps and localization.first is None for localization in result.localizations)
    with pytest.raises(UserError, match="onnxruntime fp16 would be compared with itself; pass another"):
        compare(tiny_bundle, tiny_bundle, FP16, FP16)
    same = compare(tiny_bundle, Bundle.open(bundle_copy), FP16, FP16)
    assert same.stages[2].errors
    assert same.stages[2].errors.relative_rms == 0
    spoiled = plant(
        bundle_copy, "fp32", "decoder", weight("layers.2.mlp.down_proj.weight_transposed", scaled(2))
    )
    worse = compare(tiny_bundle, spoiled, FP32, FP32, task=load_task(HELDOUT)[:10])
    assert worse.exit_code == 1
    assert worse.localizations[0].first == "layers.2"
    assert worse.task
    assert worse.task.baseline == f"{tiny_bundle.folder} onnxruntime fp32"
    other = Bundle(spoiled.folder, replace(spoiled.manifest, model={**spoiled.manifest.model, "decoder": {}}))
    with pytest.raises(UserError, match="cannot be compared: their model differs"):
        compare(tiny_bundle, other, FP32, FP32)


def test_divergence_that_cannot_be_localized_says_why(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx

    path = "onnxruntime/fp32/adaptor/adaptor.onnx"
    bundle = plant(bundle_copy, "fp32", "adaptor", weight("layers.1.weight_transposed", scaled(2)))
    model = onnx.load(str(bundle_copy / path))
    del model.metadata_props[:]
    onnx.save(model, str(bundle_copy / path))
    bundle = rehash(bundle_copy, path)
    (localization,) = parity(bundle, precision="fp32").localizations
    assert localization.first is None
    assert "does not list its taps; export it again" in localization.note
    tensors = load_file(bundle_copy / "goldens/00.safetensors")
    with safe_open(bundle_copy / "goldens/00.safetensors", "np") as handle:
        metadata = handle.metadata()
    kept = {name: array for name, array in tensors.items() if not name.startswith("taps/")}
    save_file(kept, bundle_copy / "goldens/00.safetensors", metadata)
    (localization,) = parity(rehash(bundle_copy, "goldens/00.safetensors"), precision="fp32").localizations
    assert localization.note == "the goldens have no taps; export the bundle again"

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    tensors["taps/decoder/odd"] = tensors["taps/decoder/norm"]
    save_file(tensors, bundle_copy / "goldens/00.safetensors", metadata)
    bundle = rehash(bundle_copy, "goldens/00.safetensors")
    notes = {
        localization.component: localization.note
        for localization in parity(bundle, precision="fp32", taps=True).localizations
    }
    assert notes["decoder"] == "the goldens have other taps; export the bundle again"
    monkeypatch.setattr("dsvl_export.parity_check.localization.take_from_debug_build", full)
    result = parity(bundle, precision="fp32")
    assert result.exit_code == 1
    assert result.localizations[0].note == "no debug build: [Errno 28] No space left on device"


def test_a_single_decode_step_is_judged_too(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend may use another kernel for one token; its NaN hides behind argmax, its scale as well."""
    whole = onnxruntime.OrtDecoder.decode

    def spoil(change: Callable[[np.ndarray], None]) -> set[str]:
        def decode(self, inputs_embeds, logit_rows, cache):  # type: ignore[no-untyped-def]
            logits = whole(self, inputs_embeds, logit_rows, cache)
            if inputs_embeds.shape[1] == 1:
                change(logits)
            return logits

        monkeypatch.setattr(onnxruntime.OrtDecoder, "decode", decode)
        return failed(parity(tiny_bundle, precision="fp32"))

    def to_nan(logits: np.ndarray) -> None:
        logits[0, 0, logits[0, 0].argmax()] = np.nan

    def stretch(logits: np.ndarray) -> None:
        logits *= 1.5

    assert spoil(to_nan) == {"teacher_forced_logits", "greedy_tokens", "long_context"}
    assert spoil(stretch) == {"teacher_forced_logits", "long_context"}


@pytest.mark.parametrize(
    "arrays",
    [
        {"squares": np.zeros((1, 5, 5, 3), np.uint8)},
        {"image_embeds": np.zeros((1, 3, 128), np.float32)},
        {"features/low_features": np.zeros((1, 3, 128), np.float32)},
        {"features/odd": np.zeros((1, 3, 128), np.float32)},
        {"prompt_tokens": np.full(130, 9999)},
        {"greedy_tokens": np.zeros(1, np.int64), "logits": np.zeros((1, 512), np.float32)},
        {"greedy_tokens": np.zeros(0, np.int64)},
    ],
    ids=lambda arrays: next(iter(arrays)),
)
def test_goldens_that_do_not_fit_their_contracts(bundle_copy: Path, arrays: dict[str, np.ndarray]) -> None:
    with pytest.raises(
        UserError, match=r"02.safetensors does not fit the bundle's contracts; export it again"
    ):
        parity(respoil(bundle_copy, 2, {}, arrays), precision="fp32")


def test_verdicts_belong_to_what_was_judged(bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    result = parity(bundle, precision="fp32")
    record_verdict(bundle, result)
    page = bundle_copy / "reports/parity-onnxruntime-fp32.html"
    assert page.exists()
    unable = ParityResult("onnxruntime", "fp32", Execution("not run", "no GPU"), "r")
    record_verdict(bundle, unable)
    assert Bundle.open(bundle_copy).manifest.parity["onnxruntime/fp32"]["verdict"] == "passed"
    plant(bundle_copy, "fp32", "decoder", weight("norm.weight", scaled(2)))
    with pytest.raises(UserError, match="has changed while it was judged; run parity again"):
        record_verdict(bundle, result)


def test_the_verdict_is_kept(bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    page = record_verdict(bundle, parity(bundle, precision="fp16"))
    assert page.suffix == ".html"
    again = Bundle.open(bundle_copy)
    kept = again.manifest.parity["onnxruntime/fp16"]
    assert kept["verdict"] == "passed"
    assert kept["execution"].startswith("ran on cpu with onnxruntime")
    jsonschema.validate(json.loads((bundle_copy / kept["report"]).read_text()), schema())
    assert again.problems() == []
