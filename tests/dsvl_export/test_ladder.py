"""The ladder says yes to what is right and no to what is not, rung by rung."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

from dsvl_export.ladder import ParityResult, Rung, parity
from dsvl_export.records import record_verdict
from runtimes.bundle import Bundle, FileEntry
from runtimes.errors import UserError
from runtimes.files import sha256_of_file


def spoil(bundle: Path, component: str, weight: str, factor: float) -> Bundle:
    """Scale one row of one weight of an artifact, and give the file its new hash."""
    path = f"onnxruntime/fp32/{component}/{component}.onnx"
    model = onnx.load(str(bundle / path))
    (tensor,) = [item for item in model.graph.initializer if item.name == weight]
    values = numpy_helper.to_array(tensor).copy()
    values[..., 3] *= factor
    tensor.CopyFrom(numpy_helper.from_array(values, weight))
    onnx.save(model, str(bundle / path))
    return rehash(bundle, path)


def rehash(folder: Path, path: str) -> Bundle:
    bundle = Bundle.open(folder)
    bundle.manifest.files[path] = FileEntry((folder / path).stat().st_size, sha256_of_file(folder / path))
    return bundle


def test_both_precisions_pass(tiny_bundle: Bundle) -> None:
    fp32, fp16 = (parity(tiny_bundle, precision=precision) for precision in ("fp32", "fp16"))
    assert fp32.passed
    assert fp16.passed
    for small, large in zip(fp32.rungs, fp16.rungs, strict=True):
        assert small.relative_rms <= 1e-5
        assert not small.detail
        assert large.relative_rms < 7e-3
    assert all(rung.relative_rms > 1e-6 for rung in fp16.rungs[1:5])


@pytest.mark.parametrize(
    ("component", "weight", "rungs"),
    [
        ("vision_encoder", "high.blocks.2.mlp.fc1.weight_transposed", {"vision_encoder"}),
        ("adaptor", "layers.1.weight_transposed", {"adaptor"}),
        ("decoder", "layers.1.self_attn.v_proj.weight_transposed",
         {"prefill_logits", "teacher_forced_logits"}),
    ],
)  # fmt: skip
def test_one_zeroed_row_fails_its_own_rung(
    bundle_copy: Path, component: str, weight: str, rungs: set[str]
) -> None:
    result = parity(spoil(bundle_copy, component, weight, 0.0), precision="fp32")
    failed = {rung.name for rung in result.rungs if rung.failed}
    assert not result.passed
    assert rungs <= failed <= rungs | {"greedy_tokens"}


def test_changed_goldens_are_noticed(bundle_copy: Path) -> None:
    path = "goldens/03.safetensors"
    (bundle_copy / path).write_bytes(b"spoilt" + (bundle_copy / path).read_bytes()[6:])
    with pytest.raises(UserError, match="goldens/03.safetensors has a wrong SHA-256"):
        parity(bundle_copy)
    with pytest.raises(UserError, match="no golden that can be read"):
        parity(rehash(bundle_copy, path))


def test_preprocessing_that_drifts_fails(bundle_copy: Path) -> None:
    from dataclasses import replace

    bundle = Bundle.open(bundle_copy)
    spec = replace(bundle.manifest.preprocessing, background=(0, 0, 0), image_size=128, min_size=100)
    bundle.manifest = replace(bundle.manifest, preprocessing=replace(spec, rescale_factor=1 / 254))
    failed = {rung.name for rung in parity(bundle, precision="fp32").rungs if rung.failed}
    assert "vision_encoder" in failed


def test_wrong_tokens_fail_and_near_ties_do_not(bundle_copy: Path) -> None:
    """The recorded tokens are changed to the runner-up; then its logit is raised to a near tie."""
    path = bundle_copy / "goldens" / "00.safetensors"
    from safetensors import safe_open

    with safe_open(path, "np") as handle:
        metadata = handle.metadata()
    tensors = load_file(path)
    best = int(tensors["greedy_tokens"][0])
    runner_up = int(np.argsort(tensors["logits"][0])[-2])
    tensors["greedy_tokens"][0] = runner_up
    tensors["logits"][0, runner_up] = tensors["logits"][0, best] + 5
    save_file(tensors, path, metadata)
    result = parity(rehash(bundle_copy, "goldens/00.safetensors"), precision="fp32")
    tokens = result.rungs[-1]
    assert tokens.failed
    assert "golden 0: differs at token 0 (margin 5)" in tokens.detail
    tensors["logits"][0, runner_up] = tensors["logits"][0, best] + 1e-6
    save_file(tensors, path, metadata)
    tokens = parity(rehash(bundle_copy, "goldens/00.safetensors"), precision="fp32").rungs[-1]
    assert not tokens.failed
    assert "near tie at token 0" in tokens.detail


def test_nan_never_passes() -> None:
    rung = Rung("adaptor", 1e-4)
    rung.compare(0, np.ones(4), np.ones(4))
    assert not rung.failed
    rung.compare(1, np.array([1, np.nan, 1, 1]), np.ones(4))
    rung.compare(2, np.ones(4), np.ones(4))
    assert rung.failed
    assert rung.worst_golden == 1
    raw = ParityResult("b", "fp32", 3, [rung]).to_dict()["rungs"][0]
    assert raw["relative_rms"] is raw["max_abs"] is None


def test_the_verdict_is_kept(bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    record_verdict(bundle, parity(bundle, precision="fp16"))
    again = Bundle.open(bundle_copy)
    assert again.manifest.parity["onnxruntime/fp16"]["verdict"] == "passed"
    assert (bundle_copy / "reports" / "parity-onnxruntime-fp16.json").exists()
    assert again.problems() == []
