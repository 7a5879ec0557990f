"""``bench``: what it measures, what it sets beside that, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsvl_export.bench.bench import BenchOptions, BenchResult, bench
from dsvl_export.bench.plot import bench_plot
from dsvl_export.cli import main
from reference.checkpoint.checkpoint import open_checkpoint
from reference.model.config import ModelConfig
from runtimes.bundle.bundle import Bundle
from runtimes.cache import cache_bytes
from runtimes.errors import UserError

QUICK = BenchOptions(contexts=(40, 200), tokens=3, repeats=2)


@pytest.fixture(scope="module")
def result(tiny_bundle: Bundle) -> BenchResult:
    return bench(tiny_bundle.folder, "onnxruntime", "fp32", QUICK)


def test_every_stage_and_context_is_measured(result: BenchResult, tiny_bundle: Bundle) -> None:
    assert list(result.stages) == ["preprocess", "vision_encoder", "adaptor", "prefill"]
    assert all(0 < timing.low <= timing.median <= timing.high for timing in result.stages.values())
    lows, highs = ([getattr(timing, end) for timing in result.stages.values()] for end in ("low", "high"))
    assert sum(lows) <= result.first_token.low <= result.first_token.high <= sum(highs)
    assert [row.context for row in result.decoding] == [40, 200]
    assert {timing.repeats for timing in (result.first_token, *(row.step for row in result.decoding))} == {2}
    assert result.prompt_tokens > tiny_bundle.manifest.prompt.image_tokens
    assert 0 <= result.loaded < result.peak  # opening may add no memory to a process with free pages


def test_bound_and_plan_agree_on_the_bytes(result: BenchResult, tiny_bundle: Bundle) -> None:
    """The file's bytes and the contract's states against what ``plan`` derives from shapes."""
    contract = tiny_bundle.manifest.contracts["fp32"]["decoder"]
    decoder = open_checkpoint("tiny").config.decoder
    assert (
        cache_bytes(contract.states, 1, 200)
        == 2 * decoder.layers * decoder.kv_heads * decoder.head_dim * 200 * 4
    )
    row = result.decoding[-1]
    file = tiny_bundle.path(tiny_bundle.artifact("decoder", "onnxruntime", "fp32").files[0])
    assert row.bytes_per_token == file.stat().st_size + cache_bytes(contract.states, 1, 200)
    assert result.bandwidth
    assert row.bound == pytest.approx(result.bandwidth / row.bytes_per_token)
    assert isinstance(result.predicted, dict)
    artifacts = result.predicted["artifacts"]["decoder"] + result.predicted["kv_bytes"]
    assert artifacts == pytest.approx(row.bytes_per_token, rel=0.02)


@pytest.fixture
def slow_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """So slow that it alone decides how long a token takes."""
    for module in ("bench.bench", "targets.targets"):
        monkeypatch.setattr(f"dsvl_export.{module}.read_bandwidth", lambda threads=None: 1e6)


def test_halves_are_read_as_they_lie_in_memory(tiny_bundle: Bundle, slow_memory: None) -> None:
    """ONNX Runtime widens them on a CPU: the bound is what ``plan`` predicts."""
    found = bench(tiny_bundle.folder, "onnxruntime", "fp16", QUICK)
    file = tiny_bundle.path(tiny_bundle.artifact("decoder", "onnxruntime", "fp16").files[0])
    states = cache_bytes(tiny_bundle.manifest.contracts["fp16"]["decoder"].states, 1, 200)
    assert found.decoding[-1].bytes_per_token == 2 * file.stat().st_size + states
    assert isinstance(found.predicted, dict)
    assert found.predicted["tokens_per_second"] == pytest.approx(found.decoding[-1].bound, rel=0.02)


def test_the_graph_for_prompts_is_not_read_by_a_token(tmp_path: Path, slow_memory: None) -> None:
    from dsvl_export.exporter.export import export

    bundle = export("tiny", tmp_path / "b", precisions=["8da4w-g128"], goldens=False)
    found = bench(bundle.folder, None, None, QUICK)
    file = bundle.path(bundle.artifact("decoder", "onnxruntime", "8da4w-g128").files[0])
    states = cache_bytes(bundle.manifest.contracts["8da4w-g128"]["decoder"].states, 1, 200)
    assert found.decoding[-1].bytes_per_token == file.stat().st_size + states
    assert isinstance(found.predicted, dict)
    assert found.predicted["tokens_per_second"] == pytest.approx(found.decoding[-1].bound, rel=0.02)


def test_a_file_of_all_components_has_no_known_bound(executorch_bundle: Bundle) -> None:
    found = bench(executorch_bundle.folder, "executorch", "fp32", QUICK)
    assert {(row.bytes_per_token, row.bound, row.share_of_bound) for row in found.decoding} == {
        (None, None, None)
    }
    assert isinstance(found.predicted, str)
    assert "executorch" in found.predicted
    assert "bandwidth bound" not in bench_plot(found)


def test_the_command(tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", str(tiny_bundle.folder), "--context", "30", "--tokens", "2", "--repeats", "1"]
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--report", str(tmp_path / "report")])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    for word in (
        "preprocess",
        "first token",
        "bytes per token",
        "of the bound",
        "Prediction of 'plan' for a context of",
    ):
        assert word in shown
    document = json.loads((tmp_path / "report" / "bench.json").read_text())
    assert document["decoding"][0]["tokens_per_second"] > 0
    assert document["machine"]["packages"]["dsvl-export"]
    plot = (tmp_path / "report" / "bench.svg").read_text()
    assert plot.count("vision encoder") == 1
    with pytest.raises(SystemExit):
        main([*arguments, "--json"])
    assert json.loads(capsys.readouterr().out)["first_token"]["median"] > 0


@pytest.mark.parametrize("context", [0, 1024, 5000])
def test_contexts_that_do_not_fit(tiny_bundle: Bundle, context: int) -> None:
    with pytest.raises(UserError, match=rf"between 1 and 1021, .* the 3 tokens to decode; got {context}"):
        bench(tiny_bundle.folder, "onnxruntime", "fp32", BenchOptions(contexts=(context,), tokens=3))


def test_a_report_that_cannot_be_written(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    arguments = ["bench", str(tiny_bundle.folder), "--context", "30", "--tokens", "1", "--repeats", "1"]
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--report", str(tmp_path / "file")])
    assert done.value.code == 2
    assert "report cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("hybrid", [False, True])
def test_a_manifests_model_is_a_config(hybrid: bool) -> None:
    """``from_dict`` after JSON gives the config back, of both variants."""
    from reference.checkpoint.released import released_config

    config = released_config("7b" if hybrid else "1.3b")
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
