"""Precision plans: rules, recipes, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from calibration.precision_plan import LayerPrecision, component_layers, load_precision, recipe_names
from calibration.quantized_weights import QuantizedWeights
from reference.checkpoint.checkpoint import open_checkpoint
from runtimes.errors import UserError
from tests.conftest import OraclePair


def write(folder: Path, text: str) -> str:
    (folder / "my.yaml").write_text(text)
    return str(folder / "my.yaml")


def test_the_last_rule_that_matches_holds(tmp_path: Path) -> None:
    plan = load_precision(
        write(tmp_path, "base: fp16\nrules:\n- {layers: '*', precision: int8}\n"
              "- {layers: 'decoder.*', kind: linear, precision: int4-g64}\n"
              "- {layers: decoder.head, precision: float}\n")
    )  # fmt: skip
    config = open_checkpoint("tiny").config
    found = {
        layer.name: str(plan.precision_of(layer))
        for c in ("vision_encoder", "decoder")
        for layer in component_layers(config, c)
    }
    assert found["vision_encoder.high.neck.0"] == "int8"
    assert found["decoder.layers.2.mlp.up_proj"] == "int4-g64"
    assert found["decoder.head"] == "float"
    assert (plan.name, plan.base, plan.quantizes, plan.needs_scales(config)) == ("my", "fp16", True, True)
    plan.save(tmp_path / "again.yaml", "why")
    again = load_precision(str(tmp_path / "again.yaml"))
    assert (again.rules, again.base) == (plan.rules, plan.base)


def test_every_recipe_fits_tiny() -> None:
    config = open_checkpoint("tiny").config
    calibrated, others = (
        ["fp8", "int8", "int8-int4", "kv-int8"],
        ["8da4w", "8da4w-g128", "8da8w", "int4", "int8-weights", "palette4"],
    )
    assert recipe_names() == sorted(calibrated + others)
    for name in recipe_names():
        plan = load_precision(name)
        plan.check(config)
        assert plan.needs_scales(config) == (name in calibrated)
    assert not load_precision("fp16").quantizes


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("rules: [{layers: '*', precision: int3}]", "no precision 'int3' of a layer; there are float, int8"),
        ("rules: [{layers: '*', precision: int4-g1}]", "a group of 1 is too small"),
        ("rules: [{layers: '*', precision: int4-}]", "no precision 'int4-'"),
        ("rules: [{layers: '*', precision: int4-gx}]", "is not a precision plan: invalid literal"),
        ("rules: [{layers: '*'}]", "is not a precision plan: precision"),
        ("rules: [{layers: '*', precision: int8, group: 3}]", "a rule has the unknown keys group"),
        (
            "rules: [{layers: '*', precision: int8, kind: norm}]",
            "the kind 'norm' of a rule is neither linear nor conv",
        ),
        ("rules: 3", "is not a precision plan"),
        ("bass: fp32", "the file has the unknown keys bass"),
        ("base: fp64", "its base 'fp64' is not one of fp32, fp16"),
        ("kv_cache: int2", "its kv_cache 'int2' is not one of float, int8, fp8"),
        ("[1]", "the file must be a mapping with the keys base, kv_cache, rules"),
        ("{", "is not valid YAML"),
    ],
)
def test_bad_plans(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_precision(write(tmp_path, text))


def test_plans_that_do_not_fit(tmp_path: Path, hybrid_pair: OraclePair) -> None:
    source = hybrid_pair.checkpoint
    for text, sentence in (
        ("rules: [{layers: 'decoder.*', precision: int4}]", "group size 32 does not divide the 100 inputs of decoder.layers.0.mlp.down_proj"),
        ("rules: [{layers: '*', precision: int4}]", "my gives int4-g32 to the convolution"),
        ("rules: [{layers: decoder.tail, precision: int8}]", "names 'decoder.tail', which no layer matches"),
        ("rules: [{layers: 'decoder.*', kind: conv, precision: int8}]", "names 'decoder.\\*', which no layer matches"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=sentence):
            QuantizedWeights(source, load_precision(write(tmp_path, text)))
    with pytest.raises(UserError, match="needs a scale table"):
        QuantizedWeights(source, load_precision("int8"))
    with pytest.raises(
        UserError,
        match="no precision 'int3'; there are fp32, fp16, bf16, 8da4w, 8da4w-g128, 8da8w, fp8, int4",
    ):
        load_precision("int3")
    with pytest.raises(UserError, match=r"nowhere.yaml is missing"):
        load_precision("nowhere.yaml")
    (tmp_path / "int8.yaml").write_text("{}")
    with pytest.raises(UserError, match="has the name of a shipped precision"):
        load_precision(str(tmp_path / "int8.yaml"))


def test_spelling() -> None:
    for text in ("float", "int8", "fp8", "int8-weights", "int4-g128"):
        assert str(LayerPrecision.parse(text)) == text
    assert str(LayerPrecision.parse("int4")) == "int4-g32"
