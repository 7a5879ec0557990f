"""Preprocessing and prompt of a checkpoint, in the form that the runtime reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from reference.checkpoint.chat_template import choose_prompt
from reference.checkpoint.checkpoint import Checkpoint
from reference.checkpoint.image_processor import parse_preprocessing
from reference.checkpoint.text_files import find_chat_template, read_text_files
from reference.families.registry import family_of
from runtimes.bundle.files import read_json
from runtimes.errors import UserError
from runtimes.preprocess import PreprocessSpec
from runtimes.text.prompt import BOS, EOS, IMAGE_PLACEHOLDER
from runtimes.text.tokenizer import PromptSpec
from runtimes.units import size

TEXT_CONFIGS = ("text_config", "language_config")  # keys of config.json in the two layouts


def preprocess_spec(checkpoint: Checkpoint) -> PreprocessSpec:
    """Build the preprocessing of one image from the image processor's settings and the config.

    Raises:
        UserError: no file has the settings, one is not supported, or does not match the model.
    """
    if checkpoint.preprocessor is None:
        others = sorted(file.name for file in checkpoint.folder.glob("*processor*.json"))
        remedy = f"; it has {', '.join(others)}, which does not say it" if others else ""
        raise UserError(
            f"{checkpoint.folder} has no preprocessor_config.json, which says how images are resized and"
            f" normalized{remedy}; copy it from the base model."
        )
    return parse_preprocessing(checkpoint.preprocessor, checkpoint.config)


def reference_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return model sizes and preprocessing of the reference, in the form of a manifest.

    The prompt is part of the text goldens.
    """
    return {
        "model": checkpoint.config.to_dict(),
        "preprocessing": asdict(preprocess_spec(checkpoint)),
    }


def prompt_spec(checkpoint: Checkpoint) -> PromptSpec:
    """Build the prompt format from the family, the checkpoint's tokenizer and its chat template.

    Raises:
        UserError: the tokenizer has no such token, ``eos_token_id`` is not a list of token ids, or
            the chat template cannot be used.
    """
    file = checkpoint.tokenizer_files[0]
    files = read_text_files(checkpoint)
    prompt = family_of(checkpoint.config).prompt_format(files)
    settings = files.tokenizer_settings.values
    _check_added_tokens(checkpoint.folder, files.tokenizer, settings)

    def token_id(name: str) -> int:
        number = files.tokenizer.token_to_id(name)
        if number is None:
            raise UserError(f"{file} has no token {name!r}, which the prompt format needs.")
        if number >= checkpoint.config.decoder.vocab_size:
            raise UserError(f"{file} gives {name!r} the id {number}, outside the model's vocabulary.")
        return int(number)

    built_in = PromptSpec(
        system_prompt=prompt.system_prompt,
        bos_id=token_id(_token_text(settings.get("bos_token"), BOS)),
        eos_ids=_eos_ids(checkpoint, token_id(_token_text(settings.get("eos_token"), EOS))),
        image_token_id=token_id(IMAGE_PLACEHOLDER),
        image_tokens=files.image_tokens,
        image_start_ids=tuple(map(token_id, prompt.image_start)),
        image_end_ids=tuple(map(token_id, prompt.image_end)),
        template=prompt.template,
    )
    return choose_prompt(checkpoint, built_in, prompt.template_prefix, prompt.processor_prefix)


def _check_added_tokens(folder: Path, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
    """Check that ``tokenizer.json`` has the tokens that other files of the tokenizer add.

    transformers adds them when it reads the folder, and writes them to ``tokenizer.json`` when it
    saves a tokenizer. Without them, their ids in an answer have no text.

    Raises:
        UserError: a token is missing, or has another id.
    """
    added: dict[str, Any] = {}
    if (folder / "added_tokens.json").exists():
        added = dict(read_json(folder / "added_tokens.json", huge_integers=True))
    decoder = settings.get("added_tokens_decoder")
    for number, token in decoder.items() if isinstance(decoder, dict) else ():
        added[_token_text(token, "")] = int(number) if str(number).isdecimal() else number
    missing = {
        name: number for name, number in added.items() if name and tokenizer.token_to_id(name) != number
    }
    if missing:
        name, number = next(iter(missing.items()))
        raise UserError(
            f"{folder / 'tokenizer.json'} lacks {len(missing)} of the tokens that added_tokens.json or"
            f" tokenizer_config.json adds, such as {name!r} with the id {number}; save the tokenizer again"
            " with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
        )


def remarks(checkpoint: Checkpoint, prompt: PromptSpec) -> list[str]:
    """Return sentences about choices of the reader that users should know.

    Args:
        checkpoint: its family may have chosen a prompt format.
        prompt: the prompt format that is used; it may be the checkpoint's chat template instead.
    """
    sentences = [family_of(checkpoint.config).prompt_format(read_text_files(checkpoint)).remark]
    if prompt.template.exact:
        sentences = ["The prompt is the checkpoint's own chat template, which differs from the built-in one."]
    if skipped := checkpoint.skipped_tensors():
        sentences.append(
            f"{len(skipped)} tensors ({size(sum(skipped.values()))}) that answers do not need were skipped,"
            " such as those of image generation, which is not supported."
        )
    return [sentence for sentence in (*sentences, *_adapter_templates(checkpoint)) if sentence]


def _adapter_templates(checkpoint: Checkpoint) -> list[str]:
    """Return a sentence for each adapter with another chat template than the checkpoint."""
    own = find_chat_template(checkpoint.folder, optional=True)
    sentences = []
    for adapter in checkpoint.adapters.adapters:
        template = find_chat_template(adapter.folder, optional=True)
        if template and (own is None or template[1] != own[1]):
            sentences.append(
                f"The adapter {adapter.folder} has a chat template of its own ({template[0]}), which is not"
                " used; if it was trained with it, copy it and the adapter's tokenizer to the base model."
            )
    return sentences


def _eos_ids(checkpoint: Checkpoint, tokenizer_eos: int) -> tuple[int, ...]:
    """Return the tokens that end an answer: the tokenizer's own and those of ``eos_token_id``.

    transformers reads ``eos_token_id`` from ``generation_config.json``; without that file, from
    ``config.json``: at the top level, or else of the text model
    (``GenerationConfig.from_model_config``).
    """
    file = checkpoint.folder / "generation_config.json"
    if file.exists():
        setting = read_json(file).get("eos_token_id")
    else:
        file = checkpoint.folder / "config.json"
        config = read_json(file)
        parts = [config, *(config[key] for key in TEXT_CONFIGS if isinstance(config.get(key), dict))]
        setting = next((part["eos_token_id"] for part in parts if part.get("eos_token_id") is not None), None)
    ids = setting if isinstance(setting, list) else [] if setting is None else [setting]
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in ids):
        raise UserError(
            f"{file} has the eos_token_id {setting!r}, which is neither a token id nor a list of them."
        )
    # The model cannot produce a token outside its vocabulary; -1 often means "none".
    in_vocabulary = [number for number in ids if 0 <= number < checkpoint.config.decoder.vocab_size]
    return tuple(dict.fromkeys([tokenizer_eos, *in_vocabulary]))


def _token_text(setting: Any, default: str) -> str:
    """Return a token of tokenizer_config.json, which is a string or an AddedToken object."""
    if isinstance(setting, dict):
        setting = setting.get("content")
    return str(setting or default)
