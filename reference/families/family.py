"""What a model family defines, and how a module of this folder defines it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from tokenizers import Tokenizer

from reference.families.names import ParameterSource, Shape
from reference.model.config import Layout, ModelConfig
from reference.settings import Settings
from runtimes.text.prompt import SYSTEM_PROMPT, ChatTemplate


@dataclass(frozen=True)
class TextFiles:
    """What the files of a checkpoint say about its prompt.

    Args:
        name: names of the checkpoint, such as its folder and its hub id.
        layout: the checkpoint's layout.
        image_tokens: number of tokens of an image.
        tokenizer: of ``tokenizer.json``.
        tokenizer_settings: ``tokenizer_config.json``; empty without this file.
        processor: ``processor_config.json``; empty without this file.
        chat_template: the checkpoint's own chat template.
    """

    name: str
    layout: Layout
    image_tokens: int
    tokenizer: Tokenizer
    tokenizer_settings: Settings
    processor: Settings
    chat_template: str | None

    def has_added_token(self, name: str) -> bool:
        """Return whether the tokenizer has an added token of this name."""
        return any(token.content == name for token in self.tokenizer.get_added_tokens_decoder().values())


@dataclass(frozen=True)
class PromptFormat:
    """How a model's prompts are written.

    Args:
        system_prompt: the system prompt of conversations without one of their own.
        template: texts between the messages.
        image_start: names of the tokens before the image tokens of an image.
        image_end: names of the tokens after them.
        template_prefix: what precedes the text of the model's own chat template in its prompts.
        processor_prefix: what the model's processor writes before the text of any chat template.
        remark: one sentence about a choice that no file states; empty if there was none.
    """

    system_prompt: str = SYSTEM_PROMPT
    template: ChatTemplate = field(default_factory=ChatTemplate)
    image_start: tuple[str, ...] = ()
    image_end: tuple[str, ...] = ()
    template_prefix: str = ""
    processor_prefix: str = ""
    remark: str = ""


class Family(Protocol):
    """A module of this folder that defines a model family.

    Attributes:
        LABEL: name of the family in messages.
        MODEL_TYPES: values of ``model_type`` in ``config.json``.
        SKIPPED_TENSORS: tensors of parts that answers do not need, such as image generation.
    """

    LABEL: str
    MODEL_TYPES: tuple[str, ...]
    SKIPPED_TENSORS: re.Pattern[str] | None

    def recognizes(self, raw: Mapping[str, Any]) -> bool:
        """Return whether a ``config.json`` with one of the model types is of this family."""

    def parse_config(self, raw: Settings, preprocessor: Settings | None) -> ModelConfig:
        """Parse ``config.json``; see ``reference.checkpoint.config_file``."""

    def parameter_source(self, config: ModelConfig, name: str, shape: Shape) -> ParameterSource:
        """Return the checkpoint tensors of a parameter, by the names of the config's layout.

        Raises:
            KeyError: the layout has no such tensor.
        """

    def image_processors(self, config: ModelConfig) -> tuple[str, ...]:
        """Return the classes of image processors whose steps ``runtimes.preprocess`` does."""

    def prompt_format(self, files: TextFiles) -> PromptFormat:
        """Return how prompts are written."""
