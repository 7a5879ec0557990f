"""Adapters that stay beside the weights: what they compute, and how a bundle gets and loses them."""

from __future__ import annotations

import json
import shutil
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.quantized_weights import FoldedWeights
from calibration.scale_table import ScaleTable
from calibration.switchable_adapter import layer_matrices, open_switchable
from dsvl_export import UserError, export
from dsvl_export.audit.bundle import audit
from dsvl_export.exporter.adapters import add_adapters, parse_named, remove_adapters
from dsvl_export.exporter.config import ExportConfig
from reference.checkpoint.checkpoint import open_checkpoint, parameter_shapes
from reference.checkpoint.lora_adapter import AdapterChoice
from runtimes.backends import onnxruntime
from runtimes.bundle.bundle import Bundle
from runtimes.pipeline import Pipeline
from tests.adapters import write_decoder_adapter

DESCRIBE = "Describe the picture."
TEXT = np.arange(40, 100)  # tokens; more than 32, from which on a prefill graph is used


@pytest.fixture(scope="module")
def merged_bundles(
    tiny_bundle: Bundle, decoder_adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str | None, Bundle]:
    """Plain exports in fp32: of tiny, and with each adapter merged into the weights."""
    folder = tmp_path_factory.mktemp("merged")
    choices = {"all": str(decoder_adapters["all"]), "some": f"{decoder_adapters['some']}=0.5"}
    merged = {
        name: export("tiny", folder / name, goldens=False, adapters=[choice])
        for name, choice in choices.items()
    }
    return {None: tiny_bundle, **merged}


def opened(bundle: Bundle, precision: str | None = "fp32", adapter: str | None = None) -> Pipeline:
    return Pipeline.open(bundle, "onnxruntime", precision, threads=1, adapter=adapter)


def text_logits(pipeline: Pipeline, batch: int = 1) -> np.ndarray:
    """Logits ``[B, S, V]`` of a text: most of it at once, row by row, then token by token."""
    chain = pipeline.chain
    cache = chain.decoder.new_cache(batch, len(TEXT))
    first = [chain.decode(TEXT[None, :-3], cache.row(row)) for row in range(batch)]
    steps = [chain.decode(np.full((batch, 1), token), cache) for token in TEXT[-3:]]
    return np.concatenate([np.concatenate(first), *steps], axis=1)


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """The RMS of the difference, relative to that of the expected values."""
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


@pytest.mark.parametrize("name", ["all", "some"])
def test_it_computes_what_a_merged_export_does(
    switchable_bundle: Bundle, merged_bundles: dict[str | None, Bundle], pictures: list[Path], name: str
) -> None:
    ours, merged, base = (
        opened(switchable_bundle, adapter=name), opened(merged_bundles[name]), opened(merged_bundles[None]),
    )  # fmt: skip
    expected = text_logits(merged)
    assert error(text_logits(base), expected) > 0.1  # what the adapter changes
    assert error(text_logits(ours), expected) < 1e-5
    rows = text_logits(ours, batch=3)
    assert error(rows, np.broadcast_to(expected, rows.shape)) < 1e-5
    for picture in pictures[:2]:
        assert ours.chat(DESCRIBE, [picture]).tokens == merged.chat(DESCRIBE, [picture]).tokens


def test_without_an_adapter_nothing_differs_from_a_plain_export(
    switchable_bundle: Bundle, merged_bundles: dict[str | None, Bundle], pictures: list[Path]
) -> None:
    """Also after adapters were used, and in the weights on disk, which are there once."""
    base = opened(switchable_bundle)
    expected = text_logits(opened(merged_bundles[None]))
    assert np.array_equal(text_logits(base), expected)
    adapted = [base.with_adapter(name) for name in ("all", "some", "all")]
    logits = [text_logits(pipeline) for pipeline in adapted]
    assert np.array_equal(logits[0], logits[2])
    assert not np.array_equal(logits[0], logits[1])
    assert np.array_equal(text_logits(base.with_adapter(None)), expected)
    assert np.array_equal(text_logits(base), expected)
    artifact = switchable_bundle.artifact("decoder", "onnxruntime", "fp32")
    names = [file.rpartition("/")[2] for file in artifact.files]
    assert names == ["decoder.onnx", "decoder.onnx.data", "decoder_adapted.onnx"]
    sizes = [switchable_bundle.manifest.files[file].bytes for file in artifact.files]
    assert sizes[2] < 0.05 * sizes[1]


@pytest.mark.parametrize("precision", ["fp16", "int4", "8da4w-g128"])
def test_the_error_of_a_precision_stays(
    switchable_bundle: Bundle, merged_bundles: dict[str | None, Bundle], precision: str
) -> None:
    """With an adapter, a precision is about as near to fp32 as without one."""
    base, merged = (text_logits(opened(merged_bundles[name])) for name in (None, "all"))
    usual = error(text_logits(opened(switchable_bundle, precision)), base)
    ours = error(text_logits(opened(switchable_bundle, precision, "all")), merged)
    assert 0 < ours < 2.5 * usual < 0.5 * error(base, merged)


def test_an_adapter_of_zeros_changes_nothing(switchable_bundle: Bundle, tmp_path: Path) -> None:
    """Bit for bit, in every precision: the adapter is beside the quantized product, not in it."""
    folder = Path(shutil.copytree(switchable_bundle.folder, tmp_path / "bundle"))
    add_adapters(folder, parse_named([f"zeros={write_decoder_adapter(tmp_path / 'a', scale=0)}"]))
    bundle = Bundle.open(folder)
    for _, precision in bundle.choices():
        base = opened(bundle, precision)
        assert np.array_equal(text_logits(base), text_logits(base.with_adapter("zeros"))), precision


def test_smoothing_factors_are_folded_into_the_matrices(
    decoder_adapters: dict[str, Path], tmp_path: Path
) -> None:
    """As into merged weights: what merging adds to a folded weight is the product of the folded matrices."""
    random = np.random.default_rng(0)
    source = open_checkpoint("tiny")
    config, layer = source.config, "decoder.layers.1"
    sizes = {
        f"{layer}.input_layernorm": config.decoder.width,
        f"{layer}.self_attn.v_proj": config.decoder.heads * config.decoder.head_dim,
        f"{layer}.mlp.up_proj": config.decoder.mlp_width,
    }
    smoothing = {name: np.exp(random.normal(size=size)).astype(np.float32) for name, size in sizes.items()}
    source.compute_digest(lambda done, total: None)
    ScaleTable(source.digest, "0" * 64, 1, smoothing=smoothing).save(tmp_path)
    choice = AdapterChoice(decoder_adapters["all"], 0.7)
    adapter = open_switchable(choice, config, parameter_shapes(config))
    base = FoldedWeights(source, smoothing)
    merged = FoldedWeights(open_checkpoint("tiny", adapters=[choice]), smoothing)
    layers = dict(layer_matrices(adapter, config, tmp_path, "fp32"))
    assert len(layers) == 7 * config.decoder.layers + 1
    for name, (down, up) in layers.items():
        added = merged.load(f"decoder.{name}.weight").double() - base.load(f"decoder.{name}.weight").double()
        assert error((down @ up).T, added.numpy()) < 1e-4, name


def test_caches_are_by_adapter(switchable_bundle: Bundle, pictures: list[Path]) -> None:
    """What a KV cache holds is only reused with the same adapter; the pictures are encoded once."""
    base = opened(switchable_bundle)
    first = base.chat(DESCRIBE, pictures[:1])
    ours = base.with_adapter("all")
    alone = opened(switchable_bundle, adapter="all").chat(DESCRIBE, pictures[:1])
    answers = [pipeline.chat(DESCRIBE, pictures[:1]) for pipeline in (ours, base, ours)]
    assert [answer.tokens for answer in answers] == [alone.tokens, first.tokens, alone.tokens]
    assert [answer.reused_tokens for answer in answers] == [0, *[first.prompt_tokens - 1] * 2]
    assert (base.chain.images_encoded, ours.chain.images_encoded) == (1, 0)
    streams = [pipeline.stream_chat(DESCRIBE, pictures[:1]) for pipeline in (ours, base)]
    texts = [
        "".join(text for text, _ in steps)
        for steps in zip(*zip_longest(*streams, fillvalue=("", None)), strict=True)
    ]
    assert texts == [alone.text, first.text]


def test_only_the_needed_graph_is_opened(switchable_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are in memory twice only where answers with and without adapters are asked for."""
    files: list[str] = []
    open_file = onnxruntime._open

    def spy(file: Path, *arguments: Any) -> Any:
        files.append(file.name)
        return open_file(file, *arguments)

    monkeypatch.setattr(onnxruntime, "_open", spy)
    pipeline = opened(switchable_bundle, "8da4w-g128", "all")
    encoders = ["vision_encoder.onnx", "adaptor.onnx"]
    assert files == [*encoders, "decoder_adapted.onnx", "decoder_adapted_prefill.onnx"]
    pipeline.with_adapter("some")
    assert len(files) == 4
    pipeline.with_adapter(None)
    assert files[4:] == ["decoder.onnx", "decoder_prefill.onnx"]


# A bundle gets and loses adapters.


def test_added_and_removed_without_a_rebuild(
    switchable_copy: Path,
    decoder_adapters: dict[str, Path],
    tmp_path: Path,
    run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = Bundle.open(switchable_copy)
    monkeypatch.setattr("dsvl_export.compilers.onnxruntime.compile_component", None)
    done = run("add-adapter", switchable_copy, f"new={decoder_adapters['some']}=0.5", "--json")
    assert done.code == 0, done.err
    assert [row["precision"] for row in json.loads(done.out)] == [item for _, item in before.choices()]
    after = Bundle.open(switchable_copy)
    assert after.problems() == []
    new = {item.file for item in after.manifest.adapters if item.name == "new"}
    assert len(new) == 4
    assert {
        path: entry for path, entry in after.manifest.files.items() if path not in new
    } == before.manifest.files
    (entry,) = (item for item in after.manifest.adapters if (item.name, item.precision) == ("new", "fp32"))
    assert (entry.rank, entry.targets, entry.origin) == (3, ("down_proj", "v_proj"), "some")
    new_logits, old_logits = (text_logits(opened(after, adapter=name)) for name in ("new", "some"))
    assert np.array_equal(new_logits, old_logits)
    # The same name again replaces it.
    add_adapters(switchable_copy, parse_named([f"new={decoder_adapters['some']}"]))
    replaced = Bundle.open(switchable_copy)
    assert len(replaced.manifest.adapters) == 12
    assert not np.array_equal(text_logits(opened(replaced, adapter="new")), old_logits)
    assert run("remove-adapter", switchable_copy, "new").code == 0
    assert Bundle.open(switchable_copy).manifest == before.manifest
    assert not list(switchable_copy.rglob("new*"))


def test_a_later_export_keeps_them(switchable_copy: Path, decoder_adapters: dict[str, Path]) -> None:
    """Also in a bundle that lost its record, as one from the hub."""
    shutil.rmtree(switchable_copy / ".staging", ignore_errors=True)
    before = Bundle.open(switchable_copy).manifest
    after = export(
        "tiny", switchable_copy, precisions=["int8-weights"], goldens=False, switchable=True
    ).manifest
    assert set(before.adapters) == set(after.adapters)
    for adapter in before.adapters:
        assert before.files[adapter.file] == after.files[adapter.file]
    remove_adapters(switchable_copy, ["all"])
    added = add_adapters(switchable_copy, parse_named([f"all={decoder_adapters['all']}"]))
    assert [item.precision for item in added] == ["fp32", "fp16", "int4", "8da4w-g128", "int8-weights"]
    assert {item.precision: item.digest for item in added}["fp32"] == before.adapters[0].digest


def test_an_export_that_cannot_keep_them_says_so(switchable_copy: Path, run) -> None:
    done = run("export", "tiny", "--output", switchable_copy, "--no-goldens", "--no-parity")
    assert done.code == 0, done.err
    assert "Removed the adapter adapters/onnxruntime/fp32/all/all.onnx_adapter" in done.err
    assert "export again with --switchable, then add it again" in done.err
    after = Bundle.open(switchable_copy)
    assert {item.precision for item in after.manifest.adapters} == {"fp16", "int4", "8da4w-g128"}
    assert after.problems() == []


def test_a_selected_adapter_selects_its_decoder(switchable_copy: Path) -> None:
    """The first precision was exported anew, without adapters."""
    export("tiny", switchable_copy, goldens=False)
    bundle = Bundle.open(switchable_copy)
    assert bundle.select(None, None) == ("onnxruntime", "fp32")
    assert bundle.select(None, None, "all") == ("onnxruntime", "fp16")
    assert opened(bundle, precision=None, adapter="all").chat("Hello").tokens
    with pytest.raises(UserError, match="fp32 .* was exported without switchable adapters"):
        opened(bundle, precision="fp32", adapter="all")


def test_an_interrupted_change_of_a_copy_goes_on(
    switchable_copy: Path, decoder_adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle without its record, whose manifest the interruption has moved away."""
    shutil.rmtree(switchable_copy / ".staging", ignore_errors=True)
    named = parse_named([f"all={decoder_adapters['some']}"])
    with monkeypatch.context() as patch:
        patch.setattr("dsvl_export.exporter.adapters._publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            add_adapters(switchable_copy, named)
    assert not (switchable_copy / "manifest.json").exists()
    add_adapters(switchable_copy, named)
    assert Bundle.open(switchable_copy).problems() == []


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_the_config_names_them(switchable_bundle: Bundle, tmp_path: Path) -> None:
    config = ExportConfig.read(switchable_bundle.folder / "configs/onnxruntime/fp32/export.yaml")
    assert [text.partition("=")[0] for text in config.switchable_adapters] == ["all", "some"]
    (tmp_path / "export.yaml").write_text("checkpoint: tiny\nswitchable_adapters: [a=mine=0.5]\n")
    config = ExportConfig.read(tmp_path / "export.yaml")
    assert config.switchable_adapters == (f"a={tmp_path / 'mine'}=0.5",)
    assert config.compile_options(64).onnxruntime.switchable


def test_the_audit_compares_the_graphs(switchable_copy: Path) -> None:
    def verdicts() -> dict[str, str]:
        source = open_checkpoint("tiny")
        source.compute_digest(lambda done, total: None)
        parts = audit(Bundle.open(switchable_copy), source, precision="8da4w-g128").parts
        return {part.name: part.state for part in parts}

    before = verdicts()
    assert set(before.values()) == {"passed"}
    file = switchable_copy / "onnxruntime/8da4w-g128/decoder/decoder_adapted_prefill.onnx"
    file.write_bytes(file.read_bytes().replace(b"mlp.down_proj/linear_up", b"mlp.down_proj/linear_ap"))
    assert verdicts() == {**before, "onnxruntime/8da4w-g128/decoder": "failed"}
