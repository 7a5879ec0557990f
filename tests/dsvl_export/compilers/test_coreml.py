"""Core ML packages: written, executed from the saved files, checked by parity, and refused if damaged."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dsvl_export.exporter.export import export
from dsvl_export.parity_check import parity
from dsvl_export.parity_check.goldens import Goldens
from dsvl_export.parity_check.stage_tensors import STEPS, stage_tensors
from reference.tiny import HELDOUT
from reference.tiny.pictures import draw_scene
from runtimes.backends.mil.interpreter import Function, InterpretedAsset
from runtimes.backends.mil.package import (
    CONTRACT,
    EXTEND,
    IMAGE,
    PREFILL,
    PREPROCESSING,
    SPECIFICATION,
    WEIGHTS,
    Package,
)
from runtimes.backends.registry import load_backend
from runtimes.backends.static_shape import DECODE, DecoderSizes, StaticShapeDecoder
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.contracts import Contract
from runtimes.bundle.files import write_json
from runtimes.bundle.manifest import MANIFEST
from runtimes.embedding import TokenEmbedding
from runtimes.errors import UserError
from runtimes.goldens.golden import relative_rms
from runtimes.goldens.task import load_task
from runtimes.pipeline import Pipeline
from runtimes.preprocess import PreprocessSpec, preprocess
from runtimes.session import SessionOptions
from tests.conftest import OraclePair
from tests.dsvl_export.compilers.coreml_bundles import (
    PRECISIONS,
    copy_with_goldens,
    export_all_precisions,
    package,
)
from tests.dsvl_export.compilers.package_faults import Opened
from tests.grids import variants_by_precision
from tests.shared import shared_bundle

coremltools = pytest.importorskip("coremltools", reason="coremltools is not installed here")
PROOF = "simulated by the MIL interpreter on the saved package"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """Tiny in every precision that Core ML has; tests must not change it."""
    yield from shared_bundle(tmp_path_factory, "coreml", export_all_precisions)


@pytest.fixture
def short(bundle: Bundle, tmp_path: Path) -> Path:
    """A copy to spoil, with four goldens."""
    return copy_with_goldens(bundle, tmp_path / "bundle", 4)


@pytest.mark.parametrize(
    "precision",
    [name if name == "fp16" else pytest.param(name, marks=pytest.mark.full) for name in PRECISIONS],
)
def test_every_precision_passes_parity(bundle: Bundle, precision: str) -> None:
    backend, name = bundle.select("coreml", precision)
    questions = load_task(HELDOUT)[::8]
    result = parity(bundle, backend, name, task=questions, taps=True)
    assert str(result.execution) == PROOF or sys.platform == "darwin"
    assert result.passed, [stage for stage in result.stages if stage.state != "passed"]
    assert not any(localization.first for localization in result.localizations)
    assert result.task and result.task.accuracy_ratio and result.task.accuracy_ratio >= 0.99


def test_the_logits_of_half_precision(bundle: Bundle) -> None:
    """The error over all goldens. The order in which a BLAS adds up moves that of one golden threefold."""
    chain, goldens = Pipeline.open(bundle, "coreml", "fp16").chain, Goldens.of_bundle(bundle)
    errors: dict[str, list[float]] = {}
    for index in range(len(goldens.files)):
        golden = goldens.load(index, bundle.manifest.checkpoint["sha256"])
        for tensor in stage_tensors(chain, golden, steps=STEPS):
            error = relative_rms(tensor.actual, tensor.expected)
            errors.setdefault(f"{tensor.stage} {tensor.name}", []).append(error)
    errors = {name: found for name, found in errors.items() if "logits" in name}
    assert len(errors) == 3
    for name, found in errors.items():
        assert np.sqrt(np.square(found).mean()) < 1.5e-3, name


def test_the_fixed_functions_of_the_neural_engine_pass_parity(short: Path) -> None:
    result = parity(short, "coreml", "fp16", device="ane")
    assert not [stage for stage in result.stages if stage.state == "failed"]
    assert result.stage("greedy_tokens").state == "passed"


@variants_by_precision({"siglip": ("int8",), "hybrid": ("fp16",)}, "palette4", "int4")
def test_random_checkpoints_of_both_variants(pair: OraclePair, precision: str, tmp_path: Path) -> None:
    """Grouped queries and both vision towers; groups that divide their small widths."""
    if precision in ("int4", "palette4"):
        rule = f"layers: 'decoder.layers.*', kind: linear, precision: {precision}-g4"
        (tmp_path / "four.yaml").write_text("base: fp16\nrules: [{" + rule + "}]")
        precision = str(tmp_path / "four.yaml")
    made = export(pair.checkpoint.folder, tmp_path / "b", "coreml", [precision], capacity=256)
    result = parity(made, taps=True)
    assert result.passed, [stage for stage in result.stages if stage.state != "passed"]


def test_functions_share_their_weights(bundle: Bundle) -> None:
    """Three functions of the decoder, two of the vision encoder, at the bytes of one."""
    for component, functions in (("decoder", [DECODE, EXTEND, PREFILL]), ("vision_encoder", [IMAGE, "main"])):
        opened = Package(package(bundle, "fp16", component))
        assert opened.function_names == functions
        offsets = {
            name: {
                int(op.attributes["val"].blobFileValue.offset)
                for op in opened.function(name).block_specializations["CoreML8"].operations
                if op.type == "const" and op.attributes["val"].WhichOneof("value") == "blobFileValue"
            }
            for name in functions
        }
        shared = set.intersection(*offsets.values())
        size = (opened.folder / WEIGHTS).stat().st_size
        alone = sum(_bytes(opened, offset) for offset in shared)
        assert size < 1.02 * alone


def _bytes(opened: Package, offset: int) -> int:
    raw = np.fromfile(opened.folder / WEIGHTS, "<u8", 1, offset=offset + 8)
    return int(raw[0])


def test_coremltools_reads_the_packages(bundle: Bundle, tmp_path: Path) -> None:
    """Apple's own reader loads the program, with its types inferred anew, and the metadata say what it is.

    It writes into packages that it reads, and so gets copies.
    """
    from coremltools.converters.mil.frontend.milproto import load

    for component in ("vision_encoder", "adaptor", "decoder"):
        original = package(bundle, "int4-fp16", component)
        folder = shutil.copytree(original, tmp_path / original.name)
        model = coremltools.models.MLModel(str(folder), skip_model_load=True)
        program = load.load(model.get_spec(), model.get_spec().specificationVersion, model.weights_dir)
        assert set(program.functions) == set(Package(folder).function_names)
        spec = model.get_spec()
        about = spec.description.metadata
        assert about.shortDescription.startswith("Vision-language model: ") and about.license
        contract = bundle.manifest.contracts["int4-fp16"][component]
        assert Contract.from_dict(json.loads(about.userDefined[CONTRACT])) == contract
        spelled = json.loads(about.userDefined[PREPROCESSING])
        assert PreprocessSpec.from_dict(spelled) == bundle.manifest.preprocessing
        described = {item.name: item for item in spec.description.functions} or {"main": spec.description}
        for name, item in described.items():
            assert {feature.name for feature in item.output} == {spec.name for spec in contract.outputs}
            assert all(feature.shortDescription for feature in (*item.input, *item.output, *item.state))
            assert not item.state or name in (DECODE, EXTEND, PREFILL)


def test_an_image_is_an_input(bundle: Bundle) -> None:
    """The function that takes a camera frame agrees with the one that takes preprocessed pixels."""
    contract = bundle.manifest.contracts["fp16"]["vision_encoder"]
    file = bundle.path(bundle.artifact("vision_encoder", "coreml", "fp16").files[0])
    session = load_backend("coreml").open_component(file, contract, SessionOptions())
    spec = bundle.manifest.preprocessing
    picture, _ = draw_scene((5, 1234))
    square = np.asarray(picture.convert("RGB").resize((spec.image_size, spec.image_size)))
    pixels = preprocess(square, spec)[None].astype(np.float16)
    expected = session.run({"pixel_values": pixels})
    found = session.run_image(square)  # type: ignore[attr-defined]
    for name in expected:
        assert relative_rms(found[name], expected[name]) < 2e-3
    wrong = session.run_image(square[:, :, ::-1].copy())  # type: ignore[attr-defined]
    assert all(relative_rms(wrong[name], expected[name]) > 2e-2 for name in expected)


def test_rms_norm_of_large_activations(bundle: Bundle) -> None:
    """Rows of 3,000, whose squares half precision does not have, and rows that are small."""
    contract = bundle.manifest.contracts["fp16"]["decoder"]
    opened = Opened(package(bundle, "fp16", "decoder"))
    proto = opened.package.function(DECODE)
    block = proto.block_specializations[proto.opset]
    name = "layers__0__input_layernorm_rms_norm"
    block.outputs.append(name)
    function = Function(opened.package, DECODE, {})
    width = int(contract.inputs[0].shape[-1])
    weight = function._load("layers__0__input_layernorm__weight")
    asset = InterpretedAsset(opened.package, contract)
    for size in (3000.0, 1.0, 1e-3):
        x = (size * np.random.default_rng(0).normal(size=(1, 1, width))).astype(np.float16)
        inputs = {"inputs_embeds": x, "positions": np.zeros((1, 1)), "logit_rows": np.zeros(1)}
        found = function.run(inputs, asset.new_state())[name]
        wide = x.astype(np.float64)
        epsilon = 1e-6
        expected = wide / np.sqrt(np.square(wide).mean() + epsilon) * weight
        assert relative_rms(found, expected) < 2e-3


def test_an_input_of_an_unknown_type_is_refused(bundle: Bundle) -> None:
    opened = Package(package(bundle, "fp16", "decoder"))
    (first, *_) = opened.function(DECODE).inputs
    first.type.tensorType.dataType = 5
    with pytest.raises(UserError, match="decode of .* is malformed"):
        Function(opened, DECODE, {})


def test_it_answers_on_linux(bundle: Bundle, pictures: list[Path]) -> None:
    greedy = Pipeline.open(bundle, "coreml", "fp16").chat("What colour is the shape?", pictures[:1]).text
    fixed = Pipeline.open(bundle, "coreml", "fp16", device="ane").chat(
        "What colour is the shape?", pictures[:1]
    )
    assert greedy == fixed.text != ""


def test_goldens_that_do_not_fit_are_left_out(short: Path) -> None:
    """A KV cache for less than a golden needs is judged by the others; for none of them, it is said."""

    def with_capacity(capacity: int) -> Bundle:
        manifest = Bundle.open(short).manifest
        write_json(short / MANIFEST, replace(manifest, default_capacity=capacity).to_dict())
        return Bundle.open(short)

    result = parity(with_capacity(200), "coreml", "fp16")
    assert (result.verdict, result.goldens, result.left_out) == ("not judged", 3, 1)
    assert [each.golden for each in result.tokens] == [0, 2, 3]
    with pytest.raises(UserError, match="cache of 100 tokens; the shortest needs 156"):
        parity(with_capacity(100), "coreml", "fp16")


def open_decoder(folder: Path) -> StaticShapeDecoder:
    """In the interpreter, on a Mac too."""
    bundle = Bundle.open(folder)
    contract = bundle.manifest.contracts["fp16"]["decoder"]
    asset = InterpretedAsset(Package(package(bundle, "fp16", "decoder")), contract)
    return StaticShapeDecoder(asset, contract, DecoderSizes(1024, EXTEND, 256, flexible=True, any_rows=True))


def step(folder: Path) -> None:
    session = open_decoder(folder)
    width = int(session.contract.inputs[0].shape[-1])
    session.decode(np.zeros((1, 1, width), np.float16), np.array([0]), session.new_cache(1, 8))


def test_damaged_packages_are_named(short: Path) -> None:
    folder = package(Bundle.open(short), "fp16", "decoder")
    specification, weights = (folder / SPECIFICATION).read_bytes(), (folder / WEIGHTS).read_bytes()
    cases = {
        "is damaged": (specification[: len(specification) // 2], weights),
        "end at byte": (specification, weights[:-4000]),
        "too short for a weight": (specification, weights[:80]),
        "is not a Core ML weight file": (specification, b"nonsense" * 100),
        "has no weight at byte": (specification, weights[:64] + bytes(len(weights) - 64)),
    }
    for message, (first, second) in cases.items():
        (folder / SPECIFICATION).write_bytes(first)
        (folder / WEIGHTS).write_bytes(second)
        with pytest.raises(UserError, match=message):
            step(short)
    (folder / WEIGHTS).write_bytes(weights)
    (folder / SPECIFICATION).unlink()
    with pytest.raises(UserError, match="cannot be read: No such file"):
        step(short)


def test_what_the_interpreter_cannot_do_is_named(short: Path) -> None:
    folder = package(Bundle.open(short), "fp16", "decoder")
    cases = {
        "uses the operator 'einsum'": lambda op: setattr(op, "type", "einsum"),
        "reads 'nothing', which is not computed": lambda op: setattr(
            op.inputs["x"].arguments[0], "name", "nothing"
        ),
        "is declared as FLOAT16": lambda op: setattr(
            op.outputs[0].type.tensorType.dimensions[2].constant, "size", 3
        ),
    }
    for message, change in cases.items():
        opened = Opened(folder)
        for operation in opened.operations("layers__0__mlp_silu"):
            change(operation)
        before = (folder / SPECIFICATION).read_bytes()
        opened.save()
        with pytest.raises(UserError, match=message):
            step(short)
        (folder / SPECIFICATION).write_bytes(before)


def test_a_package_that_is_something_else_is_named(short: Path) -> None:
    folder = package(Bundle.open(short), "fp16", "decoder")
    before = (folder / SPECIFICATION).read_bytes()

    def without_states(opened: Opened) -> None:
        for item in opened.package.model.description.functions:
            del item.state[:]

    def of_another_opset(opened: Opened) -> None:
        opened.package.function(DECODE).opset = "CoreML99"

    for edit, sentence in (
        (without_states, "has no states"),
        (of_another_opset, "decode .* does not give logits"),
    ):
        opened = Opened(folder)
        edit(opened)
        opened.save()
        with pytest.raises(UserError, match=sentence):
            Package(folder).capacity()
            step(short)
        (folder / SPECIFICATION).write_bytes(before)


def test_lengths_outside_of_the_range_are_refused(bundle: Bundle) -> None:
    session = open_decoder(bundle.folder)
    width = int(session.contract.inputs[0].shape[-1])
    long = {
        "inputs_embeds": np.zeros((1, 300, width), np.float16),
        "positions": np.arange(300)[None],
        "logit_rows": np.zeros(1, np.int64),
    }
    with pytest.raises(UserError, match="takes inputs_embeds of 1 to 256, got"):
        session.asset.call(EXTEND, long, session.asset.new_state())
    with pytest.raises(UserError, match="takes inputs_embeds as"):
        session.asset.call(DECODE, long, session.asset.new_state())
    with pytest.raises(UserError, match="compiled for 1024 tokens, but a KV cache of 2000 was requested"):
        session.new_cache(1, 2000)


def test_memory_is_asked_for_before_it_is_taken(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtimes.backends.mil.interpreter.available_memory", lambda: 1000)
    with pytest.raises(
        UserError, match="interpreter needs 0.0 GB of memory for the weights of decoder.mlpackage"
    ):
        open_decoder(bundle.folder)


def test_exports_are_the_same_byte_for_byte(bundle: Bundle, tmp_path: Path) -> None:
    again = export("tiny", tmp_path / "b", "coreml", ["fp16"], goldens=False, capacity=1024)
    for component in ("vision_encoder", "decoder"):
        for file in bundle.artifact(component, "coreml", "fp16").files:
            assert again.manifest.files[file].sha256 == bundle.manifest.files[file].sha256


def test_the_listing_is_of_this_bundle(bundle: Bundle) -> None:
    """Every tensor's and function's name, and the numbers of the token embeddings, from the bundle itself."""
    text = bundle.path("coreml/fp16/listing/DeepSeekVL.swift").read_text()
    contracts = bundle.manifest.contracts["fp16"]
    for contract in contracts.values():
        for spec in (*contract.outputs, *(contract.inputs if contract.component == "decoder" else ())):
            assert f'"{spec.name}"' in text
    for function in (IMAGE, DECODE, PREFILL, EXTEND):
        assert f'"{function}"' in text
    table = TokenEmbedding(bundle.path(bundle.manifest.token_embedding))
    assert f"let place = {table.rows.offset} + (token * {table.rows.shape[1]} + index)" in text
    assert "capacity = 1024, chunk = 256" in text
    assert f"![{bundle.manifest.prompt.eos_id}].contains(token)" in text
    assert "${" not in text and "$$" not in text
    assert text.count("{") == text.count("}") and text.count("(") == text.count(")")


def test_bundles_keep_the_capacity(bundle: Bundle) -> None:
    assert bundle.artifact("decoder", "coreml", "fp16").capacity == 1024
    assert bundle.artifact("adaptor", "coreml", "fp16").capacity is None
    raw = json.loads((bundle.folder / MANIFEST).read_text())
    assert raw["default_capacity"] == 1024
