"""What the runtime must know about a checkpoint besides its weights: preprocessing and prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from reference.checkpoint import Checkpoint
from reference.config import CLIP_MEAN, CLIP_STD, HALF, ModelConfig, triple
from runtimes.errors import UserError
from runtimes.files import read_json
from runtimes.preprocess import PreprocessSpec
from runtimes.prompt import BOS, EOS, IMAGE_PLACEHOLDER, SYSTEM_PROMPT
from runtimes.tokenizer import PromptSpec

TEXT_CONFIGS = ("text_config", "language_config")  # keys of config.json in the two layouts


def preprocess_spec(checkpoint: Checkpoint) -> PreprocessSpec:
    """Preprocessing of one image, from ``preprocessor_config.json`` and the model's config.

    The hybrid model normalises inside its tower, so its images only get resized, padded and
    rescaled; transformers' two-image form of that is folded back into one.
    """
    try:
        return _parse(checkpoint.preprocessor, checkpoint.config)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise UserError(
            f"The image processor's settings in {checkpoint.folder} cannot be used: {error}."
        ) from error


def _parse(raw: Mapping[str, Any], config: ModelConfig) -> PreprocessSpec:
    vision = config.vision
    two_images = "high_res_size" in raw
    prefix = "high_res_" if two_images else ""
    # The original's defaults, which are CLIP's; only an explicit null pads with grey.
    mean, std = (
        raw.get(f"{prefix}image_{key}", default) for key, default in (("mean", CLIP_MEAN), ("std", CLIP_STD))
    )
    normalises = bool(raw.get("do_normalize", not vision.hybrid)) and not two_images
    if normalises and (mean is None or std is None):
        raise ValueError("it normalises but gives no image_mean and image_std")
    size = _side(raw["high_res_size"] if two_images else raw.get("size", raw.get("image_size")))
    if size not in (None, vision.image_size):
        raise ValueError(f"it makes images of {size} pixels, the vision encoder takes {vision.image_size}")
    return PreprocessSpec(
        image_size=vision.image_size,
        min_size=int(raw.get("min_size", 14)),
        mean=triple(mean or HALF),
        std=triple(std or HALF),
        background=_padding(mean),
        rescale_factor=float(raw.get("rescale_factor", 1 / 255)),
        do_normalize=normalises,
    )


def _padding(mean: Sequence[float] | None) -> tuple[int, int, int]:
    red, green, blue = (int(value * 255) for value in mean) if mean is not None else (127, 127, 127)
    return red, green, blue


def _side(size: Any) -> int | None:
    """Side of a square given as a number or as transformers' ``{"height": …, "width": …}``."""
    return None if size is None else int(size["height"] if isinstance(size, dict) else size)


def prompt_spec(checkpoint: Checkpoint) -> PromptSpec:
    """Special tokens by their names in the checkpoint's own tokenizer.

    Raises:
        UserError: the tokenizer lacks one of them, or the end tokens are not token ids.
    """
    file = checkpoint.tokenizer_files[0]
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{file} is no tokenizer: {error}.") from error
    settings_file = checkpoint.folder / "tokenizer_config.json"
    settings = read_json(settings_file) if settings_file.exists() else {}

    def token_id(name: str) -> int:
        number = tokenizer.token_to_id(name)
        if number is None:
            raise UserError(f"{file} has no token {name!r}, which the prompt format needs.")
        if number >= checkpoint.config.decoder.vocab_size:
            raise UserError(f"{file} gives {name!r} the id {number}, outside the model's vocabulary.")
        return int(number)

    return PromptSpec(
        system_prompt=SYSTEM_PROMPT,
        bos_id=token_id(_token(settings.get("bos_token"), BOS)),
        eos_ids=_eos_ids(checkpoint, token_id(_token(settings.get("eos_token"), EOS))),
        image_token_id=token_id(IMAGE_PLACEHOLDER),
        image_tokens=checkpoint.config.vision.image_tokens,
    )


def _eos_ids(checkpoint: Checkpoint, tokenizer_eos: int) -> tuple[int, ...]:
    """Tokens that end an answer: the tokenizer's own, and those with which transformers generates.

    These are ``eos_token_id`` of ``generation_config.json``; without that file, of ``config.json``, at the
    top or else of the text model (transformers' ``GenerationConfig.from_model_config``).
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
    # The model cannot produce a token outside its vocabulary; -1 is a common way to write "none".
    produced = [number for number in ids if 0 <= number < checkpoint.config.decoder.vocab_size]
    return tuple(dict.fromkeys([tokenizer_eos, *produced]))


def _token(setting: Any, default: str) -> str:
    """A token of tokenizer_config.json, which is a string or an AddedToken object."""
    if isinstance(setting, dict):
        setting = setting.get("content")
    return str(setting or default)
