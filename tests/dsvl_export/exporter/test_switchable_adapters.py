"""Adapters that stay beside the weights: what they compute, and how a bundle gets and loses them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

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
from runtimes.bundle.files import read_json, write_json
from runtimes.bundle.manifest import MANIFEST
from runtimes.pipeline import Pipeline
from tests.adapters import PREFIX, write_decoder_adapter
from tests.dsvl_export.cli.command_line import refused

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


def opened(bundle: Bundle, precision: str = "fp32", adapter: str | None = None) -> Pipeline:
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


@pytest.fixture
def changed(switchable_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy whose adapters may be changed."""
    return Path(shutil.copytree(switchable_bundle.folder, tmp_path / "bundle"))


def test_added_and_removed_without_a_rebuild(
    changed: Path, decoder_adapters: dict[str, Path], tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Bundle.open(changed)
    monkeypatch.setattr("dsvl_export.compilers.onnxruntime.compile_component", None)
    done = run("add-adapter", changed, f"new={decoder_adapters['some']}=0.5", "--json")
    assert done.code == 0, done.err
    assert [row["precision"] for row in json.loads(done.out)] == [item for _, item in before.choices()]
    after = Bundle.open(changed)
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
    add_adapters(changed, parse_named([f"new={decoder_adapters['some']}"]))
    replaced = Bundle.open(changed)
    assert len(replaced.manifest.adapters) == 12
    assert not np.array_equal(text_logits(opened(replaced, adapter="new")), old_logits)
    assert run("remove-adapter", changed, "new").code == 0
    assert Bundle.open(changed).manifest == before.manifest
    assert not list(changed.rglob("new*"))


def test_a_later_export_keeps_them(changed: Path, decoder_adapters: dict[str, Path]) -> None:
    """Also in a bundle that lost its record, as one from the hub."""
    shutil.rmtree(changed / ".staging", ignore_errors=True)
    before = Bundle.open(changed).manifest
    after = export("tiny", changed, precisions=["int8-weights"], goldens=False, switchable=True).manifest
    assert set(before.adapters) == set(after.adapters)
    for adapter in before.adapters:
        assert before.files[adapter.file] == after.files[adapter.file]
    remove_adapters(changed, ["all"])
    added = add_adapters(changed, parse_named([f"all={decoder_adapters['all']}"]))
    assert [item.precision for item in added] == ["fp32", "fp16", "int4", "8da4w-g128", "int8-weights"]
    assert {item.precision: item.digest for item in added}["fp32"] == before.adapters[0].digest


def test_an_export_that_cannot_keep_them_says_so(changed: Path, run) -> None:
    done = run("export", "tiny", "--output", changed, "--no-goldens", "--no-parity")
    assert done.code == 0, done.err
    assert "Removed the adapter adapters/onnxruntime/fp32/all/all.onnx_adapter" in done.err
    after = Bundle.open(changed)
    assert {item.precision for item in after.manifest.adapters} == {"fp16", "int4", "8da4w-g128"}
    assert after.problems() == []


def test_the_config_names_them(switchable_bundle: Bundle, tmp_path: Path) -> None:
    config = ExportConfig.read(switchable_bundle.folder / "configs/onnxruntime/fp32/export.yaml")
    assert [text.partition("=")[0] for text in config.switchable_adapters] == ["all", "some"]
    (tmp_path / "export.yaml").write_text("checkpoint: tiny\nswitchable_adapters: [a=mine=0.5]\n")
    config = ExportConfig.read(tmp_path / "export.yaml")
    assert config.switchable_adapters == (f"a={tmp_path / 'mine'}=0.5",)
    assert config.compile_options(64).onnxruntime.switchable


def test_the_audit_compares_the_graphs(changed: Path) -> None:
    def verdicts() -> dict[str, str]:
        source = open_checkpoint("tiny")
        source.compute_digest(lambda done, total: None)
        parts = audit(Bundle.open(changed), source, precision="8da4w-g128").parts
        return {part.name: part.state for part in parts}

    before = verdicts()
    assert set(before.values()) == {"passed"}
    file = changed / "onnxruntime/8da4w-g128/decoder/decoder_adapted_prefill.onnx"
    file.write_bytes(file.read_bytes().replace(b"mlp.down_proj/linear_up", b"mlp.down_proj/linear_ap"))
    assert verdicts() == {**before, "onnxruntime/8da4w-g128/decoder": "failed"}


# What is refused.


def dora(settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    settings["use_dora"] = True
    for name in [name for name in tensors if name.endswith("lora_B.weight")]:
        tensors[name.replace("lora_B.weight", "lora_magnitude_vector")] = torch.ones(len(tensors[name]))


def vision_target(settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    stem = "base_model.model.aligner.layers.1"
    tensors[f"{stem}.lora_A.weight"] = torch.ones(4, 128)
    tensors[f"{stem}.lora_B.weight"] = torch.ones(128, 4)


def saved_module(settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.language_model.model.norm.weight"] = torch.ones(128)


def embedding(settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{PREFIX}embed_tokens.lora_embedding_A"] = torch.ones(4, 512)
    tensors[f"{PREFIX}embed_tokens.lora_embedding_B"] = torch.ones(128, 4)


def nan(settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors[sorted(tensors)[0]][0, 0] = torch.nan


def other_base(settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "lora_A" in name]:
        tensors[name] = torch.ones(4, 77)


def rank_0(settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    settings["r"] = 0


def too_large(settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    settings["lora_alpha"] = 1e9


Edit = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (dora, "q_proj (DoRA)"),
        (
            vision_target,
            "it changes adaptor.layers.1, but only LoRA of linear layers of the decoder can; merge it",
        ),
        (saved_module, "it changes decoder.norm (replaced), but"),
        (embedding, "it changes token_embedding, but"),
        (nan, "holds NaN or infinity"),
        (other_base, "was made for another model"),
        (rank_0, "r is 0"),
        (too_large, "exceeds the range of fp16"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_refused_adapter_leaves_the_bundle_as_it_was(
    changed: Path, tmp_path: Path, run, edit: Edit, sentence: str
) -> None:
    folder = write_decoder_adapter(tmp_path / "a", modules=("q_proj",))
    settings = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(settings, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    before = sorted(path for path in changed.rglob("*") if path.is_file()), Bundle.open(changed).manifest
    assert refused(run("add-adapter", changed, f"new={folder}"), sentence)
    after = sorted(path for path in changed.rglob("*") if path.is_file()), Bundle.open(changed).manifest
    assert before == after
    if edit is not too_large:  # of fp16 alone
        done = run("export", "tiny", "--switchable-adapter", f"new={folder}", "--output", tmp_path / "b")
        assert refused(done, sentence)
        assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "name", ["", "a/b", "../a", ".a", "-a", "a b", "ä", "a" * 65, "a\n", "onnxruntime/fp32"]
)
def test_names_that_are_no_file_names(name: str, decoder_adapters: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="cannot be the name of an adapter"):
        parse_named([f"{name}={decoder_adapters['all']}"])


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (["german"], "as NAME=FOLDER, not 'german'"),
        (["german="], "as NAME=FOLDER, not 'german='"),
        (["a=x", "a=y"], "Two adapters have the name 'a'"),
        (["a=x=nan"], "The weight 'nan' of the adapter x is not a number"),
    ],
)
def test_malformed_choices(texts: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse_named(texts)


@pytest.mark.parametrize("backend", ["coreml", "coreai", "executorch", "tensorrt", "tensorrt_rtx"])
def test_other_backends_are_refused(
    tiny_bundle: Bundle, decoder_adapters: dict[str, Path], tmp_path: Path, run, backend: str
) -> None:
    folder = Path(shutil.copytree(tiny_bundle.folder, tmp_path / "bundle"))
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    for artifact in manifest["artifacts"]:
        artifact["backend"] = backend
    file.write_text(json.dumps(manifest))
    named = f"new={decoder_adapters['all']}"
    assert refused(
        run("add-adapter", folder, named),
        f"is for {backend} fp32, {backend} fp16, which cannot switch adapters",
    )
    assert refused(
        run("run", folder, "-p", "Hello", "--adapter", "new"), f"The backend {backend} cannot switch adapters"
    )
    if backend == "coreml":
        done = run(
            "export", "tiny", "--backend", backend, "--switchable-adapter", named, "--output", tmp_path / "b"
        )
        assert refused(done, f"The backend {backend} cannot switch adapters")
        assert not (tmp_path / "b").exists()


def test_a_plain_bundle_is_refused(
    tiny_bundle: Bundle, decoder_adapters: dict[str, Path], tmp_path: Path, run
) -> None:
    folder = Path(shutil.copytree(tiny_bundle.folder, tmp_path / "bundle"))
    done = run("add-adapter", folder, f"new={decoder_adapters['all']}")
    assert refused(done, "was exported without switchable adapters (onnxruntime fp32, onnxruntime fp16)")
    assert refused(
        run("chat", folder, "--adapter", "new"), "was exported without switchable adapters, so new cannot be"
    )
    assert refused(run("remove-adapter", folder, "new"), "has no adapter 'new'; it has none")


def test_a_damaged_file_is_refused(changed: Path, run) -> None:
    ask = ("run", changed, "-p", "Hello", "--precision", "fp32", "--adapter", "all")
    file = changed / "adapters/onnxruntime/fp32/all/all.onnx_adapter"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert refused(run(*ask), "all.onnx_adapter has a wrong SHA-256")
    file.write_bytes(b"no adapter")
    assert refused(run(*ask, "--no-verify"), "is not an adapter that ONNX Runtime can read")
    shutil.copyfile(changed / "adapters/onnxruntime/fp16/all/all.onnx_adapter", file)
    assert refused(run(*ask, "--no-verify"), "does not fit the decoder")
    file.unlink()
    assert refused(run(*ask), "all.onnx_adapter is missing")
    assert run("run", changed, "-p", "Hello", "--adapter", "some", "--max-new-tokens", "2").code == 0


@pytest.mark.parametrize("file", ["all.onnx_adapter", "onnxruntime/fp32/decoder/decoder.onnx"])
def test_files_outside_of_an_adapters_folder_are_refused(
    switchable_bundle: Bundle, tmp_path: Path, file: str
) -> None:
    """``remove-adapter`` removes the folder of an adapter's file."""
    folder = Path(shutil.copytree(switchable_bundle.folder, tmp_path / "bundle"))
    raw = read_json(folder / MANIFEST)
    entry = raw["adapters"][0]
    raw["files"][file] = raw["files"][entry["file"]]
    entry["file"] = file
    write_json(folder / MANIFEST, raw)
    before = sorted(folder.rglob("*"))
    with pytest.raises(
        UserError, match=f"the file '{file}' for the adapter 'all', expected one in adapters/"
    ):
        remove_adapters(folder, ["all"])
    assert sorted(folder.rglob("*")) == before
