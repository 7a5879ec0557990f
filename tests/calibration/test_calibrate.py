"""Calibration from data to the table: resumed, merged, tuned, and refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from calibration.choose_scales import build_scale_table
from calibration.data import load_data
from calibration.folding import list_foldings
from calibration.gptq import quantize_with_gptq
from calibration.observers import TensorStatistics
from calibration.planned_model import planned_model
from calibration.precision_plan import LayerPrecision, PrecisionPlan, Rule, load_precision
from calibration.quantized_weights import FoldedWeights, QuantizedWeights, broadcast_scale, find_weight_scale
from calibration.scale_table import TABLE_FILE, ScaleTable
from calibration.statistics import STATISTICS_FILE, Statistics, collect_statistics
from reference.session import reference_chain
from reference.tiny import HELDOUT
from runtimes.errors import UserError
from tests.calibration.calibrated import Calibrated
from tests.calibration.test_quantized_program import stage_errors

PICTURES = sorted((HELDOUT.parent / "images").glob("*.png"))


def same(a: Statistics, b: Statistics) -> None:
    assert a.data_digest == b.data_digest
    assert a.tensors.keys() == b.tensors.keys()
    for name, one in a.tensors.items():
        other = b.tensors[name]
        assert (one.count, one.minimum, one.maximum) == (other.count, other.minimum, other.maximum), name
        for part in ("counts", "channel_max", "keys", "rows"):
            assert np.array_equal(getattr(one, part), getattr(other, part)), (name, part)


def test_an_interrupted_run_goes_on(tiny_calibrated: Calibrated, tmp_path: Path) -> None:
    samples = load_data("bundled", 16).samples

    def stop(done: int, total: int) -> None:
        if done == 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_statistics(tiny_calibrated.source, tiny_calibrated.embedding, samples, tmp_path, on_step=stop)
    assert 0 < len(Statistics.load(tmp_path / STATISTICS_FILE).samples) < 16
    seen: list[int] = []
    again = collect_statistics(
        tiny_calibrated.source,
        tiny_calibrated.embedding,
        samples,
        tmp_path,
        on_step=lambda done, _: seen.append(done),
    )
    assert seen[0] == 11
    same(again, tiny_calibrated.statistics)
    with pytest.raises(UserError, match="holds samples that are not among the data"):
        collect_statistics(tiny_calibrated.source, tiny_calibrated.embedding, samples[:3], tmp_path)
    with pytest.raises(UserError, match="keeps another number of rows"):
        collect_statistics(tiny_calibrated.source, tiny_calibrated.embedding, samples, tmp_path, keep=3)


def test_halves_merged_are_the_whole(tiny_calibrated: Calibrated, tmp_path: Path) -> None:
    samples = load_data("bundled", 16).samples
    source, embedding = tiny_calibrated.source, tiny_calibrated.embedding
    halves = [
        collect_statistics(source, embedding, samples[part::2], tmp_path / str(part)) for part in (1, 0)
    ]
    halves[0].merge(Statistics.load(tmp_path / "0" / STATISTICS_FILE))
    same(halves[0], tiny_calibrated.statistics)
    table = build_scale_table(source, halves[0], "mse")
    assert table.digest == tiny_calibrated.table.digest
    with pytest.raises(UserError, match="8 samples are in both statistics"):
        halves[0].merge(halves[1])
    with pytest.raises(UserError, match="cannot be merged"):
        halves[0].merge(replace(halves[1], checkpoint="other"))


def test_table_can_be_read_and_edited(tiny_calibrated: Calibrated, tmp_path: Path) -> None:
    tiny_calibrated.table.save(tmp_path)
    again = ScaleTable.load(tmp_path)
    assert again.digest == tiny_calibrated.table.digest
    raw = json.loads((tmp_path / TABLE_FILE).read_text())
    row = raw["activations"]["decoder.head"]
    assert row["samples"] == 16
    assert row["fp8"] == pytest.approx(max(map(abs, row["range"])) / 448)
    row["int8"] = 0.5
    (tmp_path / TABLE_FILE).write_text(json.dumps(raw))
    weights = QuantizedWeights(tiny_calibrated.source, load_precision("int8"), ScaleTable.load(tmp_path))
    assert weights.load("decoder.head.input_scale").item() == 0.5


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda raw: raw["activations"]["decoder.head"].update(int8=0), "int8 scale of decoder.head is 0, it must be a positive"),
        (lambda raw: raw["activations"]["decoder.head"].update(fp8=float("nan")), "NaN is not a number"),
        (lambda raw: raw["activations"]["decoder.head"].pop("method"), "is not valid: .*method"),
        (lambda raw: raw.update(version=9), "has version 9, this release reads 1"),
        (lambda raw: raw["vectors"].update(sha256="0"), "is not the file that .* was written with"),
        (lambda raw: raw.update(activations=3), "is not valid"),
    ],
)  # fmt: skip
def test_damaged_tables(tiny_calibrated: Calibrated, tmp_path: Path, spoil, sentence: str) -> None:  # type: ignore[no-untyped-def]
    tiny_calibrated.table.save(tmp_path)
    raw = json.loads((tmp_path / TABLE_FILE).read_text())
    spoil(raw)
    (tmp_path / TABLE_FILE).write_text(json.dumps(raw))
    with pytest.raises(UserError, match=sentence):
        ScaleTable.load(tmp_path)


def test_tables_that_do_not_fit(tiny_calibrated: Calibrated, tmp_path: Path) -> None:
    plan = load_precision("int8")
    table = tiny_calibrated.table
    with pytest.raises(UserError, match="was made for the checkpoint 000, but"):
        QuantizedWeights(tiny_calibrated.source, plan, replace(table, checkpoint="000"))
    lacking = {name: row for name, row in table.activations.items() if name != "decoder.head"}
    weights = QuantizedWeights(tiny_calibrated.source, plan, replace(table, activations=lacking))
    with pytest.raises(UserError, match="no scale for the input of decoder.head"):
        weights.check()
    weights = QuantizedWeights(tiny_calibrated.source, load_precision("kv-int8"), replace(table, caches={}))
    with pytest.raises(UserError, match="no scale for the key cache of decoder.layers.0.self_attn"):
        weights.check()
    with pytest.raises(UserError, match="There is no scale table"):
        ScaleTable.load(tmp_path)


def test_statistics_that_give_no_table(tiny_calibrated: Calibrated) -> None:
    source, statistics = tiny_calibrated.source, tiny_calibrated.statistics
    silent = TensorStatistics.from_values(np.zeros((4, 128), np.float32), "s", 0)
    dead = replace(statistics, tensors={**statistics.tensors, "decoder.head": silent})
    with pytest.raises(UserError, match="input of decoder.head is zero for all calibration data"):
        build_scale_table(source, dead)
    lacking = {name: seen for name, seen in statistics.tensors.items() if name != "decoder.head"}
    with pytest.raises(UserError, match="no entry for the input of decoder.head"):
        build_scale_table(source, replace(statistics, tensors=lacking))
    with pytest.raises(UserError, match="statistics belong to another checkpoint"):
        build_scale_table(source, replace(statistics, checkpoint="0"))


def test_broken_weights_are_named(tiny_copy: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from reference.checkpoint.checkpoint import open_checkpoint
    from reference.session import write_token_embedding

    tensors = load_file(tiny_copy / "model.safetensors")
    tensors["language_model.model.layers.1.mlp.gate_proj.weight"][0, 0] = float("nan")
    save_file(tensors, tiny_copy / "model.safetensors", metadata={"format": "pt"})
    source = open_checkpoint(str(tiny_copy))
    write_token_embedding(source, tmp_path / "table.safetensors")
    with pytest.raises(UserError, match=r"input of decoder.layers.1.mlp.down_proj holds NaN or infinity"):
        collect_statistics(
            source, tmp_path / "table.safetensors", load_data("bundled", 2).samples, tmp_path / "s"
        )


def test_data_of_all_kinds(tmp_path: Path) -> None:
    for index in range(12):
        shutil.copyfile(PICTURES[index], tmp_path / f"{index:02}.png")
    assert len(load_data(str(tmp_path), 100).samples) == 12
    shutil.copyfile(PICTURES[0], tmp_path / "03.png")  # a copy that is asked the same
    assert len(load_data(str(tmp_path), 100).samples) == 11
    shutil.copyfile(PICTURES[3], tmp_path / "03.png")
    assert load_data(str(tmp_path), 5) == load_data(str(tmp_path), 5)
    assert load_data(str(tmp_path), 5, seed=1) != load_data(str(tmp_path), 5)
    (tmp_path / "07.png").write_bytes(b"no picture")
    data = load_data(str(tmp_path), 100)
    assert (len(data.samples), data.skipped) == (11, (str(tmp_path / "07.png"),))
    (tmp_path / "08.png").write_bytes(b"")
    with pytest.raises(UserError, match="2 images of .* cannot be read, which is too many"):
        load_data(str(tmp_path), 100)
    lines = [{"image": "00.png", "prompt": "a"}, {"images": ["01.png", "02.png"], "prompts": ["b", "c"]}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [sample.question for sample in load_data(str(tmp_path / "d.jsonl"), 9).samples] == ["a", "b", "c"]
    assert len(load_data("bundled", 1000).samples) == 128


@pytest.mark.parametrize(
    ("line", "sentence"),
    [("{", "Line 1 of .* is not valid JSON"), ('{"image": "a.png"}', "is not a calibration sample"),
     ('{"image": 3, "prompt": "x"}', "must be lists of strings"), ("", "has no images to calibrate with")],
)  # fmt: skip
def test_bad_data(tmp_path: Path, line: str, sentence: str) -> None:
    (tmp_path / "d.jsonl").write_text(line)
    with pytest.raises(UserError, match=sentence):
        load_data(str(tmp_path / "d.jsonl"), 9)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no images to calibrate with"):
        load_data(str(tmp_path / "empty"), 9)
    with pytest.raises(UserError, match="There is no calibration data"):
        load_data(str(tmp_path / "nowhere"), 9)


def test_odd_images_and_texts_are_used_or_named(tmp_path: Path) -> None:
    """Photos with tags that Pillow cannot write again, and line separators inside of a question."""
    line = {"image": "00.jpg", "prompt": "one\u2028two\u0085three"}
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "00.jpg", exif=tags)
    content = (tmp_path / "00.jpg").read_bytes()
    bad = content.replace(b"Exif\0\0", b"Exif\0\0Exif\0\0", 1)
    (tmp_path / "00.jpg").write_bytes(
        bad[:4] + (int.from_bytes(bad[4:6], "big") + 6).to_bytes(2, "big") + bad[6:]
    )
    (tmp_path / "d.jsonl").write_text(json.dumps(line, ensure_ascii=False), encoding="utf-8")
    (sample,) = load_data(str(tmp_path / "d.jsonl"), 9).samples
    assert sample.question == line["prompt"]
    (tmp_path / "00.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    with pytest.raises(UserError, match=r"00\.jpg is not a readable image; .*, line 1 of .*d\.jsonl\."):
        load_data(str(tmp_path / "d.jsonl"), 9)


def test_folding_changes_nothing(tiny_calibrated: Calibrated) -> None:
    """Random factors at every folding: the same function, but for rounding."""
    source = tiny_calibrated.source
    rng = np.random.default_rng(0)
    places = list_foldings(source.config)
    assert len(places) == 7 * 3 + 4 * 4 + 1
    factors = {
        place.producer: np.exp(rng.normal(0, 1, tiny_calibrated.statistics.tensors[place.consumers[0]].rows.shape[1])).astype("f")
        for place in places
    }  # fmt: skip
    folded = reference_chain(
        source, tiny_calibrated.embedding, source.load_model(load=FoldedWeights(source, factors).load)
    )
    errors = stage_errors(folded, reference_chain(source, tiny_calibrated.embedding))
    assert max(errors.values()) < 2e-5, errors
    changed = FoldedWeights(source, factors).load("decoder.layers.0.self_attn.o_proj.weight")
    assert not torch.allclose(changed, source.load("decoder.layers.0.self_attn.o_proj.weight").float())
    with pytest.raises(UserError, match="smoothing factors of nothing, which this model does not have"):
        FoldedWeights(source, {"nothing": np.ones(3, np.float32)})


def test_gptq_lowers_the_error_of_outputs(tiny_calibrated: Calibrated) -> None:
    precision = LayerPrecision("int4", 128)
    name = "decoder.layers.1.mlp.down_proj"
    weight = tiny_calibrated.source.load(f"{name}.weight").float()
    rows = torch.from_numpy(tiny_calibrated.statistics.tensors[name].rows)
    codes, scale = quantize_with_gptq(weight, rows, precision)
    assert (codes.min() >= -8) and (codes.max() <= 7)
    each = broadcast_scale(scale, precision, weight)
    plain = (weight / each).round().clamp(-8, 7) * each
    errors = [float((rows @ (w - weight).T).square().sum()) for w in (codes * each, plain)]
    assert errors[0] < 0.8 * errors[1]
    assert torch.equal(scale, find_weight_scale(weight, precision))


def test_tuning_lowers_the_cost(tiny_calibrated: Calibrated) -> None:
    """4-bit weights in large groups, smoothed and rounded by GPTQ, lie nearer to the reference."""
    source = tiny_calibrated.source
    plan = PrecisionPlan("four", rules=(Rule("*", LayerPrecision("int4", 128), "linear"),))
    errors = []
    for tuned in (False, True):
        table = build_scale_table(source, tiny_calibrated.statistics, tune_for=plan, smooth=tuned, gptq=tuned)
        assert bool(table.tuned) == bool(table.smoothing) == tuned
        model = planned_model(QuantizedWeights(source, plan, table))
        chain = reference_chain(source, tiny_calibrated.embedding, model)
        errors.append(stage_errors(chain, reference_chain(source, tiny_calibrated.embedding))["logits"])
    assert errors[1] < errors[0]
    # Codes are used for the precision they were made for alone.
    other = PrecisionPlan("other", rules=(Rule("*", LayerPrecision("int4", 32), "linear"),))
    assert QuantizedWeights(source, other, table)._tuned("decoder.head") is None
