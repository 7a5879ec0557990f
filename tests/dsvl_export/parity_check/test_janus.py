"""Random Janus checkpoints through every backend: fp16 and a quantized precision, all stages.

The quick ones are in every run, the rest in ``make test-full``.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from dsvl_export.cli import display
from dsvl_export.exporter.export import export
from dsvl_export.parity_check import parity
from dsvl_export.publish.model_card import CardOptions, model_card
from reference.checkpoint.checkpoint import open_checkpoint
from runtimes.bundle.bundle import Bundle
from runtimes.generation.sampling import GenerationOptions
from runtimes.pipeline import Pipeline
from tests.oracles.models import janus_oracle, save_oracle
from tests.oracles.original_janus import save_original
from tests.shared import made_once, shared_bundle

PLANS = {"rounded-fp32": "base: fp32\nrules: [{layers: '*', kind: linear, precision: int8-weights}]"}
PACKAGES = {"coreai": "coreai_torch", "executorch": "executorch", "tensorrt_rtx": "tensorrt_rtx"}
# Core AI and ExecuTorch take ten seconds to minutes.
CASES = [
    pytest.param(backend, precision, marks=() if always else pytest.mark.full, id=f"{backend}-{precision}")
    for backend, precision, always in (
        ("onnxruntime", "int8", True),
        ("coreml", "fp16", True),
        ("coreml", "int8", False),
        ("coreai", "fp16", False),
        ("coreai", "rounded-fp32", False),
        ("executorch", "fp16", False),
        ("executorch", "8da8w", False),
        ("tensorrt", "fp16", False),
        ("tensorrt", "int8", True),
        ("tensorrt_rtx", "fp16", True),
        ("tensorrt_rtx", "int8", False),
    )
]


def made(factory: pytest.TempPathFactory, tied: bool) -> Path:
    """A checkpoint with one layer in the tower and in the decoder."""

    def make(folder: Path) -> None:
        save_oracle(janus_oracle({"num_hidden_layers": 1}, tied, num_hidden_layers=1), folder)

    return made_once(factory, f"small-janus-{tied}", make)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory, tied=False)


@pytest.fixture(scope="module")
def original_bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """The original layout in fp16 for ONNX Runtime; tests must not change it."""

    def make(folder: Path) -> None:
        source = tmp_path_factory.mktemp("source")
        save_original(janus_oracle({"hidden_act": "gelu", "attention_bias": True}), source)
        export(source, folder, precisions=["fp16"], capacity=256)

    yield from shared_bundle(tmp_path_factory, "original-janus", make)


@pytest.mark.parametrize(("backend", "precision"), CASES)
def test_every_stage_passes(
    backend: str, precision: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """Core AI's sums in half precision change tokens that nearly tie; a tied head leaves few of those."""
    if backend in PACKAGES and find_spec(PACKAGES[backend]) is None:
        pytest.skip(f"{backend} is not installed here")
    if precision in PLANS:
        file = tmp_path / f"{precision}.yaml"
        file.write_text(PLANS[precision])
        precision = str(file)
    half = (backend, precision) == ("coreai", "fp16")
    bundle = export(
        made(tmp_path_factory, tied=half),
        tmp_path / "b",
        backend,
        [precision],
        capacity=256,
        capabilities=(89,) * (backend == "tensorrt_rtx"),
    )
    result = parity(bundle)
    assert result.passed, [stage for stage in result.stages if stage.state != "passed"]
    assert {stage.name: stage.state for stage in result.stages}["text"] == "passed"


def test_the_original_layout_passes(original_bundle: Bundle) -> None:
    result = parity(original_bundle, taps=True)
    assert result.passed, [stage for stage in result.stages if stage.state != "passed"]


def test_a_bundle_says_what_was_chosen_and_skipped(
    original_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = original_bundle.manifest
    chosen, skipped = manifest.checkpoint["remarks"]
    assert chosen.startswith("The prompt has the roles <|User|> and <|Assistant|> of Janus-Pro")
    assert skipped.endswith("such as those of image generation, which is not supported.")
    for table in display.bundle_tables(original_bundle):
        display.out.print(table)
    assert "roles <|User|> and <|Assistant|>" in " ".join(capsys.readouterr().out.split())
    assert manifest.model["family"] == "janus"
    assert "tags: [janus, dsvl-export]" in model_card(original_bundle, "o/n", CardOptions())
    assert len(manifest.prompt.image_start_ids) == len(manifest.prompt.image_end_ids) == 1


def test_answers_reuse_the_prefix_with_its_image(original_bundle: Bundle, pictures: list[Path]) -> None:
    """The tokens around an image are text of the prompt: the second turn prefills only what is new."""
    pipeline, options = Pipeline.open(original_bundle), GenerationOptions(max_new_tokens=4)
    turns = [{"role": "system", "content": "Hi."}, {"role": "user", "content": "What is it?"}]
    first = pipeline.chat(turns, [pictures[0]], options)
    turns += [{"role": "assistant", "content": "A 7."}, {"role": "user", "content": "Why?"}]
    second = pipeline.chat(turns, [pictures[0]], options)
    assert first.reused_tokens == 0 and second.reused_tokens > 25 + len("<|User|>: ")
    fresh = Pipeline.open(original_bundle)
    assert fresh.chat(turns, [pictures[0]], options).tokens == second.tokens


def test_the_export_says_what_was_skipped(run, small: Path, tmp_path: Path) -> None:
    done = run(
        "export", small, "--precision", "fp16", "--no-goldens", "--capacity", 64, "--output", tmp_path / "b"
    )
    assert done.code == 0
    assert "Note: The prompt has the roles <|User|> and <|Assistant|> of Janus-Pro" in done.out
    count = len(open_checkpoint(str(small)).skipped_tensors())
    assert count > 100 and f"Note: {count} tensors (" in done.out
