"""ExecuTorch: one program for all components, judged by the parity check and by the stock runner of the wheel."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from dsvl_export.compilers.executorch_program.tokenizer import write_runner_tokenizer
from dsvl_export.exporter.export import export
from dsvl_export.parity_check import parity
from reference.checkpoint.checkpoint import open_checkpoint
from reference.session import reference_chain
from reference.tiny import HELDOUT
from runtimes.backends.executorch import MAGIC, METHODS, load_program
from runtimes.backends.executorch_tokenizer import TEXTS
from runtimes.backends.registry import load_backend
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.manifest import TOKENIZER
from runtimes.errors import UserError
from runtimes.goldens.golden import relative_rms
from runtimes.goldens.task import load_task
from runtimes.pipeline import Pipeline
from runtimes.preprocess import preprocess
from runtimes.session import SessionOptions
from runtimes.text.prompt import BOS, EOS, IMAGE_PLACEHOLDER
from runtimes.text.tokenizer import expand_images
from tests.conftest import OraclePair, programs_untouched
from tests.dsvl_export.compilers.test_executorch_tokenizer import STEPS
from tests.shared import shared_bundle

pytest.importorskip("executorch", reason="executorch is not installed here")
PRECISION = "8da4w"  # XNNPACK's fast one


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """Tiny with 4-bit weights and 8-bit activations; tests must not change it."""

    def make(folder: Path) -> None:
        export("tiny", folder, "executorch", [PRECISION])

    yield from shared_bundle(tmp_path_factory, "executorch-tiny", make)


def program_of(bundle: Bundle, precision: str = PRECISION) -> Path:
    return bundle.path(bundle.artifact("decoder", "executorch", precision).files[0])


@pytest.mark.full
def test_8_bit_weights_and_activations_pass_parity(tmp_path: Path) -> None:
    """Of all precisions the one in which most of the error is values that round to the other side."""
    result = parity(export("tiny", tmp_path / "bundle", "executorch", ["8da8w"]))
    assert result.passed, [stage for stage in result.stages if stage.state != "passed"]


@pytest.mark.full
def test_tiny_passes_parity(bundle: Bundle) -> None:
    result = parity(bundle, "executorch", PRECISION, task=load_task(HELDOUT)[::8])
    assert result.execution.kind == "ran" and "XNNPACK" in str(result.execution)
    assert result.passed, [stage for stage in result.stages if stage.state != "passed"]


def test_floats_pass_parity(executorch_bundle: Bundle) -> None:
    result = parity(executorch_bundle, "executorch", "fp32")
    assert result.passed, [stage for stage in result.stages if stage.state != "passed"]
    assert all(stage.errors.relative_rms < 1e-5 for stage in result.stages if stage.errors)


@pytest.mark.full
def test_random_checkpoints_of_both_variants(pair: OraclePair, tmp_path: Path) -> None:
    with programs_untouched(pair.checkpoint.config, "executorch", ["fp16"]):
        made = export(pair.checkpoint.folder, tmp_path / "b", "executorch", ["fp16"], capacity=256)
    result = parity(made)
    assert result.passed, [stage for stage in result.stages if stage.state != "passed"]


@pytest.mark.full
def test_one_program_has_all_components(bundle: Bundle) -> None:
    artifacts = [bundle.artifact(component, "executorch", PRECISION) for component in METHODS]
    assert len({item.files for item in artifacts}) == 1
    layers = bundle.manifest.model["decoder"]["layers"]
    # A decoder layer is cut where its attention is, and before the last row is taken: nowhere else.
    cut = f"vision_encoder 1, adaptor 1, text_decoder {layers + 2}, token_embedding 0"
    assert artifacts[0].tools["partitions"] == cut


@pytest.mark.full
def test_a_large_method_leaves_the_cache_alone(bundle: Bundle) -> None:
    """The methods of a program share one memory: unless told, the vision encoder's lies over the KV cache."""
    import torch

    program = load_program(program_of(bundle))
    decoder, encoder = (program.method(name) for name in ("text_decoder", "vision_encoder"))
    random = torch.manual_seed(0)
    prompt, token = (torch.randn(1, length, 128, generator=random) for length in (9, 1))
    decoder.call([prompt, torch.arange(9)])
    expected = decoder.call([token, torch.tensor([9])])[0].numpy().copy()
    cache = decoder.get_attribute("key_cache_0").numpy()
    before, size = cache.copy(), bundle.manifest.preprocessing.image_size
    encoder.call([torch.randn(1, 3, size, size, generator=random)])
    assert 3 * size * size * 4 > cache[:, :10].nbytes  # it would reach that far
    assert np.array_equal(cache, before) and np.any(cache[:, :9])
    assert np.array_equal(decoder.call([token, torch.tensor([9])])[0].numpy(), expected)


@pytest.mark.full
def test_the_stock_runner_gives_the_same_tokens(bundle: Bundle) -> None:
    """ExecuTorch's own MultimodalRunner, which apps have in C++, Swift and Kotlin, on the same files.

    It is given tokens, and texts: what is between two images is a text of its own.
    """
    import executorch.kernels.quantized  # noqa: F401 -- as our own session does before it loads a program
    import torch
    from executorch.extension.llm import runner as stock
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401

    pipeline = Pipeline.open(bundle, "executorch", PRECISION)
    spec = pipeline.chain.tokenizer.spec
    program = program_of(bundle)
    runner = stock.MultimodalRunner(str(program), str(program.with_name("tokenizer.json")))
    config = stock.GenerationConfig(echo=False, max_new_tokens=64, temperature=0.0, num_bos=0)
    for item in load_task(HELDOUT)[:25]:
        prompt = pipeline.format(item.messages, len(item.images))
        tokens = expand_images(pipeline.chain.tokenizer.encode(prompt), spec, len(item.images))
        pictures = [
            stock.make_image_input(torch.from_numpy(preprocess(image, pipeline.chain.preprocessing)))
            for image in item.images
        ]
        images, inputs = iter(pictures), []
        for is_image, run in groupby(tokens.tolist(), lambda token: token == spec.image_token_id):
            run = list(run)
            if is_image:
                inputs += [next(images) for _ in range(len(run) // spec.image_tokens)]
            else:
                inputs.append(stock.make_token_input(run))
        first, *texts = (BOS + prompt).split(IMAGE_PLACEHOLDER)
        in_words = [stock.make_text_input(first)]
        for picture, text in zip(pictures, texts, strict=True):
            in_words += [picture, *([stock.make_text_input(text)] if text else [])]
        answer = pipeline.generate(prompt, item.images)
        for given in (inputs, in_words):
            found: list[str] = []
            runner.reset()
            runner.generate(given, config, found.append)
            assert "".join(found).removesuffix(EOS).strip() == answer.text.strip()


@pytest.mark.full
@pytest.mark.parametrize("name", ["tiny", *STEPS])
def test_the_stock_runner_reads_texts_as_they_are_meant(bundle: Bundle, name: str, tmp_path: Path) -> None:
    """The tokenizer inside of the runner, too, and not only the package of the same library."""
    import executorch.kernels.quantized  # noqa: F401
    from executorch.extension.llm import runner as stock
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401

    original, file = bundle.path(TOKENIZER), tmp_path / "tokenizer.json"
    if name in STEPS:
        raw = json.loads(original.read_text())
        raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": STEPS[name]}
        original = tmp_path / "original.json"
        original.write_text(json.dumps(raw))
    assert write_runner_tokenizer(file, original).startswith("equal on")
    exact = tokenizers.Tokenizer.from_file(str(original))
    runner = stock.MultimodalRunner(str(program_of(bundle)), str(file))
    config = stock.GenerationConfig(echo=False, max_new_tokens=1, temperature=0.0, num_bos=0)
    read: list[int] = []
    for text in TEXTS:
        runner.reset()
        given = [stock.make_text_input(text)]
        runner.generate(given, config, lambda piece: None, lambda stats: read.append(stats.num_prompt_tokens))
    assert read == [len(exact.encode(text, add_special_tokens=False).ids) for text in TEXTS]


@pytest.mark.full
def test_caches_take_turns(bundle: Bundle) -> None:
    """A program has one KV cache; two conversations that alternate, in two pipelines, are as good as alone."""
    backend, file = load_backend("executorch"), program_of(bundle)
    contracts = bundle.manifest.contracts[PRECISION]
    decoders = [backend.open_decoder(file, contracts["decoder"], SessionOptions()) for _ in range(2)]
    assert load_program(file) is load_program(file)  # which all of them share
    x = np.random.default_rng(0).normal(size=(2, 1, 12, 128)).astype(np.float32)
    last = np.array([0])
    alone = []
    for row in x:
        cache = decoders[0].new_cache(1, 40)
        alone.append([decoders[0].decode(row[:, [step]], last, cache) for step in range(12)])
    caches = [decoder.new_cache(1, 40) for decoder in decoders]
    for step in range(12):
        if step == 6:  # another method is loaded late, and runs
            encoder = backend.open_component(file, contracts["vision_encoder"], SessionOptions())
            encoder.run({"pixel_values": np.ones((1, 3, 128, 128), np.float32)})
        for row, decoder, cache, expected in zip(x, decoders, caches, alone, strict=True):
            assert np.array_equal(decoder.decode(row[:, [step]], last, cache), expected[step])


@pytest.mark.full
def test_bad_files_get_a_sentence(bundle: Bundle, tmp_path: Path) -> None:
    source = program_of(bundle)
    contract = bundle.manifest.contracts[PRECISION]["decoder"]
    whole = source.read_bytes()
    assert whole[4:8] == MAGIC
    file = tmp_path / "model.pte"
    cases: dict[bytes, str] = {
        whole[:4]
        + b"\xff\xfe\xff\xfe"
        + whole[8:]: "is not an ExecuTorch program",  # ends the process unless checked
        b"": "is not an ExecuTorch program",
        b"nonsense" * 100: "is not an ExecuTorch program",
        whole[:2000]: "ExecuTorch cannot load",
        whole[: len(whole) // 2]: "ExecuTorch",
    }
    for content, sentence in cases.items():
        file.write_bytes(content)
        with pytest.raises(UserError, match=sentence):
            load_backend("executorch").open_decoder(file, contract, SessionOptions())
    with pytest.raises(UserError, match="cannot be read: No such file"):
        load_program(tmp_path / "none.pte")
    with pytest.raises(UserError, match=r"got 4096 threads for \d+ cores"):
        load_program(source, 4096)


@pytest.mark.full
def test_bad_calls_get_a_sentence(bundle: Bundle) -> None:
    contract = bundle.manifest.contracts[PRECISION]["decoder"]
    decoder = load_backend("executorch").open_decoder(program_of(bundle), contract, SessionOptions())
    with pytest.raises(UserError, match="compiled for 1024 tokens"):
        decoder.new_cache(1, 1025)
    cache, last = decoder.new_cache(1, 8), np.array([0])
    with pytest.raises(UserError, match="needs 9 positions but the KV cache holds 8"):
        decoder.decode(np.zeros((1, 9, 128), np.float32), last, cache)
    with pytest.raises(ValueError, match="inputs_embeds must be float32"):
        decoder.decode(np.zeros((1, 1, 128), np.float64), last, cache)
    assert decoder.decode(np.zeros((1, 1, 128), np.float32), last, cache).shape == (1, 1, 512)


@pytest.mark.full
@pytest.mark.parametrize("delegate", ["coreml", "vulkan"])
def test_encoders_for_other_delegates_are_built(delegate: str, one_layer: Path, tmp_path: Path) -> None:
    """On an iPhone or an Android GPU they would run; here the whole encoder is shown to be taken."""
    made = export(
        one_layer, tmp_path / "b", "executorch", ["fp16"], goldens=False, capacity=64, delegate=delegate
    )
    encoder = made.artifact("vision_encoder", "executorch", "fp16")
    assert encoder.dialect == delegate
    assert encoder.tools["partitions"].startswith("vision_encoder 1, adaptor 1, ")
    execution = load_backend("executorch").execution(encoder)
    assert execution.kind == "built only" and delegate in str(execution)
    with pytest.raises(UserError, match="has no method vision_encoder"):
        Pipeline.open(made)


def test_one_key_value_head(executorch_bundle: Bundle, one_layer: Path) -> None:
    """A cache of one head has an order of its axes that the operators refuse unless it is made anew."""
    made = executorch_bundle
    table = made.path(made.manifest.token_embedding)
    reference = reference_chain(open_checkpoint(str(one_layer)), table)
    logits = []
    for chain in (Pipeline.open(made, precision="fp32").chain, reference):
        embeds, cache = chain.embed_tokens(np.arange(3, 24)), chain.decoder.new_cache(1, 24)
        chain.prefill(embeds[:14], cache)
        steps = [chain.decoder.decode(embeds[None, [step]], np.array([0]), cache) for step in range(14, 21)]
        logits.append(np.concatenate(steps))
    assert relative_rms(*logits) < 1e-5


def test_a_capacity_that_makes_no_range_of_lengths_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a --capacity of at least 3 tokens, got 2"):
        export("tiny", tmp_path / "b", "executorch", goldens=False, capacity=2)
    assert not (tmp_path / "b").exists()


def test_what_other_delegates_do_not_take_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no ExecuTorch delegate 'metal'; use one of xnnpack, coreml, vulkan"):
        export("tiny", tmp_path / "a", "executorch", delegate="metal")
    with pytest.raises(
        UserError, match="coreml supports only float encoders, 8da8w quantizes vision_encoder."
    ):
        export("tiny", tmp_path / "b", "executorch", ["8da8w"], goldens=False, delegate="coreml")
    assert not list(tmp_path.iterdir())


def test_precisions_that_xnnpack_lacks_are_refused(tmp_path: Path) -> None:
    for precision, sentence in {
        "int4": "cannot compute vision_encoder.* in int8-weights; it has 8da4w, 8da8w",
        "bf16": "has no precision 'bf16'; it has fp32, fp16",
    }.items():
        with pytest.raises(UserError, match=sentence):
            export("tiny", tmp_path / "b", "executorch", [precision])
    assert not (tmp_path / "b").exists()


@pytest.mark.full
def test_a_bundle_is_extended_without_its_record(bundle: Bundle, tmp_path: Path) -> None:
    """What shares a file is read back from the manifest, and kept."""
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "copy"))
    shutil.rmtree(folder / ".staging", ignore_errors=True)
    made = export("tiny", folder, "onnxruntime", ["fp32"], goldens=False)
    assert {item.precision for item in made.manifest.artifacts if item.backend == "executorch"} == {PRECISION}
    for component in METHODS:
        artifact = made.artifact(component, "executorch", PRECISION)
        assert artifact == bundle.artifact(component, "executorch", PRECISION)
    assert not made.problems(list(made.manifest.files))
