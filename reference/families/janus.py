"""Janus (arXiv 2410.13848) and Janus-Pro (arXiv 2501.17811): answers about images, no generation.

Two layouts exist: ``multi_modality`` (the original) and transformers' ``janus``. A config of type
``multi_modality`` with sections about image generation, such as ``gen_vision_config``, is of Janus;
without them it is of DeepSeek-VL. Both layouts hold tensors that only generate images; they are
skipped. Image generation is not supported.

Differences from DeepSeek-VL's 1.3B: the aligner has the vision tower's activation and any depth,
SigLIP's q, k and v may have no bias, images lie between two tokens, and Janus-Pro's roles are
tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from reference.families.family import PromptFormat, TextFiles
from reference.families.limits import MAX_IMAGE_SIZE, MAX_VISION_LAYERS
from reference.families.llama import parse_llama, parse_tied_head
from reference.families.names import ParameterSource, Rule, Shape, original_source, transformers_source
from reference.families.original_layout import generates_images, siglip_from_original, tower_normalization
from reference.model.config import (
    GELU_APPROXIMATIONS,
    AdaptorConfig,
    ModelConfig,
    SiglipConfig,
    VisionConfig,
)
from reference.settings import Settings
from runtimes.errors import UserError
from runtimes.text.prompt import IMAGE_PLACEHOLDER, SYSTEM_PROMPT, ChatTemplate

NAME, LABEL = "janus", "Janus"
MODEL_TYPES: tuple[str, ...] = ("multi_modality", "janus")
# The image tokenizer, the table of its codes, their aligner and their head.
SKIPPED_TENSORS: re.Pattern[str] | None = re.compile(
    r"(.*\.)?(gen_vision_model|gen_embed|gen_aligner|gen_head|vqmodel"
    r"|generation_embeddings|generation_aligner|generation_head)\..*"
)

# Roles of Janus-1.3B (``deepseek_old`` in the original) and of Janus-Pro (``deepseek``).
WORD_ROLES = ChatTemplate(before_image="\n", after_image="\n")
USER, ASSISTANT = "<|User|>", "<|Assistant|>"
TOKEN_ROLES = replace(WORD_ROLES, user=f"{USER}: ", assistant=f"{ASSISTANT}: ", answer=f"{ASSISTANT}:")


def recognizes(raw: Mapping[str, Any]) -> bool:
    """Return whether a config is of this family; see ``Family``."""
    return raw["model_type"] == "janus" or generates_images(raw)


def parse_config(raw: Settings, preprocessor: Settings | None) -> ModelConfig:
    """Parse ``config.json`` in either layout; see ``Family``."""
    return _parse_original(raw) if raw.values["model_type"] == "multi_modality" else _parse_transformers(raw)


def parameter_source(config: ModelConfig, name: str, shape: Shape) -> ParameterSource:
    """Return the checkpoint tensors of a parameter; see ``Family``."""
    if config.layout == "original":
        return original_source(False, name, shape)
    return transformers_source(_aligner_names(config), "projection_layer", name, shape)


def image_processors(config: ModelConfig) -> tuple[str, ...]:
    """Return the classes of image processors; see ``Family``."""
    original = ("VLMImageProcessor",) if config.layout == "original" else ()
    return (*original, *(f"JanusImageProcessor{suffix}" for suffix in ("", "Fast", "Pil")))


def prompt_format(files: TextFiles) -> PromptFormat:
    """Return the format of Janus-1.3B or Janus-Pro, which no key of a config tells apart.

    Raises:
        UserError: the processor writes prompts in a way that is not supported.
    """
    processor = files.processor
    template, reason = _choose_template(files)
    processor.choice("image_tag", (IMAGE_PLACEHOLDER,), IMAGE_PLACEHOLDER)
    processor.refuse_unsupported({"add_special_token": (False,)})
    if processor.integer("num_image_tokens", files.image_tokens) != files.image_tokens:
        raise processor.error("num_image_tokens", f"but the vision encoder has {files.image_tokens}")
    start, end = (_image_token(files, side) for side in ("start", "end"))
    # transformers' processor writes the system prompt only if its settings say so.
    writes_system_prompt = processor.nullable_flag("use_default_system_prompt", False)
    from_transformers = files.layout == "transformers" and bool(processor.values)
    has_system_prompt = writes_system_prompt or not from_transformers
    prefix = f"{SYSTEM_PROMPT}{template.system_end}"
    return PromptFormat(
        system_prompt=SYSTEM_PROMPT if has_system_prompt else "",
        template=template,
        image_start=(start,),
        image_end=(end,),
        template_prefix=prefix if has_system_prompt else "",
        processor_prefix=prefix if writes_system_prompt else "",
        remark=f"The prompt has the roles {template.user.strip(': ')} and {template.answer.strip(': ')} of"
        f" {'Janus-Pro' if template.user == TOKEN_ROLES.user else 'Janus-1.3B'}, since {reason}.",
    )


def _choose_template(files: TextFiles) -> tuple[ChatTemplate, str]:
    """Return the template and why it was chosen."""
    has_tokens = all(map(files.has_added_token, (USER, ASSISTANT)))
    tokens = replace(TOKEN_ROLES, control_tokens=(USER, ASSISTANT)) if has_tokens else TOKEN_ROLES
    sft_format = files.processor.choice("sft_format", ("deepseek", "deepseek_old"), "deepseek")
    if files.chat_template and f"{USER}:" in files.chat_template:
        return tokens, "the chat template has them"
    if files.chat_template and WORD_ROLES.user in files.chat_template:
        return WORD_ROLES, "the chat template has them"
    if sft_format == "deepseek_old":
        return WORD_ROLES, "the processor's sft_format is deepseek_old"
    if re.search(r"janus-1\.3b", files.name, re.IGNORECASE):
        return WORD_ROLES, "the checkpoint's name says so"
    if has_tokens:
        return tokens, "the tokenizer has these tokens"
    return WORD_ROLES, f"the tokenizer has no tokens {USER} and {ASSISTANT}"


def _image_token(files: TextFiles, side: str) -> str:
    """Return the name of the token before (``start``) or after (``end``) an image."""
    tag = files.processor.text(
        f"image_{side}_tag", "<begin_of_image>" if side == "start" else "<end_of_image>"
    )
    key = "boi_token" if side == "start" else "eoi_token"  # transformers' names
    settings = files.tokenizer_settings
    extra = settings.values.get("extra_special_tokens")
    for values in (settings.values, extra if isinstance(extra, Mapping) else {}):
        name = values.get(key)
        name = name.get("content") if isinstance(name, Mapping) else name
        if isinstance(name, str):
            return name
    return tag


def _parse_original(raw: Settings) -> ModelConfig:
    if "vision_und_enc_config" in raw:
        raise UserError(
            f"{raw.file} is a config of JanusFlow, which is not supported; expected Janus or Janus-Pro."
        )
    vision, projector = raw.section("vision_config"), raw.section("aligner_config").section("params")
    vision.choice("cls", ("CLIPVisionTower",))
    params = vision.section("params")
    params.refuse_unsupported({"select_layers": ()})
    siglip = siglip_from_original(params)
    projector.choice("projector_type", ("mlp_gelu",))
    language = raw.section("language_config")
    return ModelConfig(
        vision=VisionConfig(siglip, low_norm=tower_normalization(params)),
        adaptor=AdaptorConfig(
            low_width=siglip.width,
            high_width=None,
            width=projector.integer("n_embed"),
            depth=projector.integer("depth", 1, high=MAX_VISION_LAYERS),
        ),
        decoder=parse_llama(language),
        layout="original",
        tied_head=parse_tied_head(raw, language, False),
        family=NAME,
    )


def _parse_transformers(raw: Settings) -> ModelConfig:
    vision = raw.section("vision_config", optional=True)
    vision.choice("model_type", ("janus_vision_model",), "janus_vision_model")
    vision.refuse_unsupported({"num_channels": (3,), "use_qk_norm": (False,)})
    # Defaults of transformers' JanusVisionConfig.
    width = vision.integer("hidden_size", 1024)
    activation = vision.choice("hidden_act", tuple(GELU_APPROXIMATIONS), "gelu")
    siglip = SiglipConfig(
        image_size=vision.integer("image_size", 384, high=MAX_IMAGE_SIZE),
        patch_size=vision.integer("patch_size", 16),
        width=width,
        layers=vision.integer("num_hidden_layers", 24, high=MAX_VISION_LAYERS),
        heads=vision.integer("num_attention_heads", 16),
        mlp_width=int(width * vision.number("mlp_ratio", 4.0, high=1024.0)),
        activation=activation,
        norm_eps=vision.number("layer_norm_eps", 1e-6, high=1.0),
        qkv_bias=vision.flag("attention_bias", True),
    )
    return ModelConfig(
        vision=VisionConfig(siglip),
        adaptor=AdaptorConfig(
            low_width=width,
            high_width=None,
            width=vision.integer("projection_dim", 2048),
            depth=vision.integer("depth", 2, high=MAX_VISION_LAYERS),
            activation=activation,
        ),
        decoder=parse_llama(raw.section("text_config", optional=True)),
        layout="transformers",
        tied_head=parse_tied_head(raw, raw.section("text_config", optional=True), True),
        family=NAME,
    )


def _aligner_names(config: ModelConfig) -> list[Rule]:
    """Return the names of the aligner's layers, which alternate with activations in ours."""
    hidden = [
        (rf"adaptor\.layers\.{2 * index + 2}\.", f"model.aligner.hidden_layers.{index}.")
        for index in range(config.adaptor.depth - 1)
    ]
    return [(r"adaptor\.layers\.0\.", "model.aligner.fc1."), *hidden]
