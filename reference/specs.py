"""What the runtime must know about a checkpoint besides its weights: preprocessing and prompt."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer

from reference.checkpoint import Checkpoint
from runtimes.errors import UserError
from runtimes.files import read_json
from runtimes.preprocess import PreprocessSpec
from runtimes.prompt import BOS, EOS, IMAGE_PLACEHOLDER, SYSTEM_PROMPT
from runtimes.tokenizer import PromptSpec

GREY = (127, 127, 127)


def preprocess_spec(checkpoint: Checkpoint) -> PreprocessSpec:
    """Preprocessing of one image, from ``preprocessor_config.json`` and the model's config.

    The hybrid model normalises inside its tower, so its images only get resized, padded and
    rescaled; transformers' two-image form of that is folded back into one.
    """
    raw, vision = checkpoint.preprocessor, checkpoint.config.vision
    hybrid_processor = vision.hybrid and "high_res_size" in raw
    mean = raw.get("high_res_image_mean" if hybrid_processor else "image_mean")
    std = raw.get("high_res_image_std" if hybrid_processor else "image_std")
    normalises = not vision.hybrid and bool(raw.get("do_normalize", True))
    if normalises and (mean is None or std is None):
        raise UserError(
            f"{checkpoint.folder / 'preprocessor_config.json'} must give image_mean and image_std."
        )
    size = _side(raw.get("high_res_size" if hybrid_processor else "size", raw.get("image_size")))
    if size not in (None, vision.image_size):
        raise UserError(
            f"The preprocessing makes images of {size} pixels, the vision encoder takes {vision.image_size}."
        )
    padding = [int(value * 255) for value in mean] if mean is not None else GREY
    return PreprocessSpec(
        image_size=vision.image_size,
        min_size=int(raw.get("min_size", 14)),
        mean=tuple(mean or (0.5, 0.5, 0.5)),
        std=tuple(std or (0.5, 0.5, 0.5)),
        background=(padding[0], padding[1], padding[2]),
        rescale_factor=float(raw.get("rescale_factor", 1 / 255)),
        do_normalize=normalises,
    )


def _side(size: Any) -> int | None:
    """Side of a square given as a number or as transformers' ``{"height": …, "width": …}``."""
    return None if size is None else int(size["height"] if isinstance(size, dict) else size)


def prompt_spec(checkpoint: Checkpoint) -> PromptSpec:
    """Special tokens by their names in the checkpoint's own tokenizer.

    Raises:
        UserError: the tokenizer lacks one of them.
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
        return int(number)

    return PromptSpec(
        system_prompt=SYSTEM_PROMPT,
        bos_id=token_id(_token(settings.get("bos_token"), BOS)),
        eos_id=token_id(_token(settings.get("eos_token"), EOS)),
        image_token_id=token_id(IMAGE_PLACEHOLDER),
        image_tokens=checkpoint.config.vision.image_tokens,
    )


def _token(setting: Any, default: str) -> str:
    """A token of tokenizer_config.json, which is a string or an AddedToken object."""
    if isinstance(setting, dict):
        setting = setting.get("content")
    return str(setting or default)
