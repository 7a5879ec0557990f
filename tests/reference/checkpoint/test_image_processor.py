"""The image processor's settings: which file has them, and each is followed or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import DeepseekVLHybridProcessor, PreTrainedTokenizerFast
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil
from transformers.models.deepseek_vl_hybrid.image_processing_pil_deepseek_vl_hybrid import (
    DeepseekVLHybridImageProcessorPil,
)

from reference.checkpoint.checkpoint import open_checkpoint
from reference.checkpoint.image_processor import parse_preprocessing
from reference.checkpoint.specs import preprocess_spec, prompt_spec
from reference.model.config import ModelConfig
from reference.settings import Settings
from runtimes.errors import UserError
from runtimes.preprocess import preprocess
from tests.conftest import OraclePair
from tests.oracles.models import save_oracle
from tests.reference.checkpoint.test_config_file import HOSTILE

PICTURE = Image.fromarray(
    np.random.default_rng(0).integers(0, 255, (9, 9, 3), dtype=np.uint8)
).resize((90, 90), Image.Resampling.BICUBIC)  # fmt: skip


def test_specs_of_both_variants(siglip_pair: OraclePair, hybrid_pair: OraclePair) -> None:
    """Only the hybrid normalizes inside its tower."""
    low, high = preprocess_spec(siglip_pair.checkpoint), preprocess_spec(hybrid_pair.checkpoint)
    assert (low.image_size, low.do_normalize, low.background) == (30, True, (127, 127, 127))
    assert (high.image_size, high.do_normalize, high.background) == (112, False, (122, 116, 104))
    assert prompt_spec(hybrid_pair.checkpoint).image_tokens == 16


def test_processor_settings_as_transformers_5_saves_them(hybrid_pair: OraclePair, tmp_path: Path) -> None:
    """Real files of transformers' own processor, with settings that are nobody's default."""
    save_oracle(hybrid_pair.oracle, tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"),
        extra_special_tokens={"image_token": "<image_placeholder>"},
    )
    images = DeepseekVLHybridImageProcessorPil(
        size={"height": 28, "width": 28}, high_res_size={"height": 112, "width": 112}, min_size=9,
        image_mean=[0.1, 0.2, 0.3], image_std=[0.4] * 3, high_res_image_mean=[0.6] * 3, high_res_image_std=[0.7] * 3,
    )  # fmt: skip
    DeepseekVLHybridProcessor(images, tokenizer, num_image_tokens=16).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    spec, vision = preprocess_spec(checkpoint), checkpoint.config.vision
    assert (spec.min_size, spec.background, spec.do_normalize) == (9, (153, 153, 153), False)
    assert vision.low_norm is not None
    assert vision.low_norm.mean == (0.1, 0.2, 0.3)
    assert vision.high_norm is not None
    assert vision.high_norm.std == (0.7, 0.7, 0.7)


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def ours(folder: Path) -> np.ndarray:
    return preprocess(PICTURE, preprocess_spec(open_checkpoint(str(folder))))


SETTINGS: list[dict[str, Any]] = [
    *({"resample": number} for number in range(6)),
    {"do_rescale": False},
    {"do_rescale": None},
    {"do_normalize": False},
    {"do_normalize": None},
    {"do_convert_rgb": False},
    {"do_convert_rgb": True},
    {"do_normalize": False, "image_mean": None},
    {"rescale_factor": 1 / 127.5},
    {"min_size": 20},
    {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 1.7], "background_color": [25, 51, 76]},
    {"size": 30},
    {"image_processor_type": "DeepseekVLImageProcessorFast"},
]


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_settings_are_followed(siglip_pair: OraclePair, tmp_path: Path, changes: dict[str, Any]) -> None:
    """As by transformers' processor, on a square picture (of others it rounds the sides differently)."""
    save_oracle(siglip_pair.oracle, tmp_path)
    edit(tmp_path, **changes)
    theirs = DeepseekVLImageProcessorPil.from_pretrained(tmp_path)(PICTURE, return_tensors="np")
    assert np.abs(ours(tmp_path) - theirs["pixel_values"][0]).max() < 2e-6 * max(
        1, np.abs(ours(tmp_path)).max()
    )


@pytest.mark.parametrize(
    "changes", [{"high_res_resample": 2}, {"high_res_image_mean": [0.2] * 3}, {"do_rescale": False}]
)
def test_settings_of_the_hybrid_are_followed(
    hybrid_pair: OraclePair, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """The large image, whose normalization is inside our tower."""
    save_oracle(hybrid_pair.oracle, tmp_path)
    edit(tmp_path, **changes)
    theirs = DeepseekVLHybridImageProcessorPil.from_pretrained(tmp_path)(PICTURE, return_tensors="np")
    norm = open_checkpoint(str(tmp_path)).config.vision.high_norm
    assert norm is not None
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (norm.mean, norm.std))
    found = (ours(tmp_path) - mean) / std
    assert np.abs(found - theirs["high_res_pixel_values"][0]).max() < 2e-6 * max(1, np.abs(found).max())


@pytest.mark.parametrize(
    "changes", [{}, {"image_mean": [0.2] * 3}, {"image_mean": [0.5] * 3, "image_std": [0.4] * 3}]
)
def test_defaults_are_transformers(siglip_pair: OraclePair, tmp_path: Path, changes: dict[str, Any]) -> None:
    save_oracle(siglip_pair.oracle, tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"size": {"height": 30, "width": 30}, **changes})
    )
    theirs = DeepseekVLImageProcessorPil.from_pretrained(tmp_path)(PICTURE, return_tensors="np")
    assert np.abs(ours(tmp_path) - theirs["pixel_values"][0]).max() < 2e-6


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_transparent_pictures_are_put_on_white(siglip_pair: OraclePair, tmp_path: Path, mode: str) -> None:
    """With ``do_convert_rgb``, as by transformers; without it their alpha is dropped."""
    save_oracle(siglip_pair.oracle, tmp_path)
    picture = PICTURE.copy()
    picture.putalpha(PICTURE.getchannel(0))
    picture = picture.quantize(16) if mode == "P" else picture.convert(mode)
    picture.save(tmp_path / "picture.png")  # in memory, a palette keeps its alpha elsewhere
    picture = Image.open(tmp_path / "picture.png")
    dropped = preprocess(picture, preprocess_spec(open_checkpoint(str(tmp_path))))
    edit(tmp_path, do_convert_rgb=True)
    theirs = DeepseekVLImageProcessorPil.from_pretrained(tmp_path)(picture, return_tensors="np")
    found = preprocess(picture, preprocess_spec(open_checkpoint(str(tmp_path))))
    assert np.abs(found - theirs["pixel_values"][0]).max() < 2e-6
    assert (np.abs(found - dropped).max() > 0.1) == (mode != "L")


def test_the_nested_settings_win(siglip_pair: OraclePair, tmp_path: Path) -> None:
    """Over a file that an older version left; a ``processor_config.json`` without them changes nothing."""
    save_oracle(siglip_pair.oracle, tmp_path)
    own = json.loads((tmp_path / "preprocessor_config.json").read_text())
    combined = tmp_path / "processor_config.json"
    for nested in ({"image_processor": {**own, "image_mean": [0.2] * 3}}, {"image_processor": None}, {}):
        combined.write_text(json.dumps({"num_image_tokens": 25, **nested}))
        theirs = DeepseekVLImageProcessorPil.from_pretrained(tmp_path)(PICTURE, return_tensors="np")
        assert np.abs(ours(tmp_path) - theirs["pixel_values"][0]).max() < 2e-6
    combined.write_text('{"image_processor": []}')
    with pytest.raises(
        UserError, match=r"processor_config.json: image_processor is \[\], expected an object"
    ):
        open_checkpoint(str(tmp_path))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"do_resize": False}, "do_resize is false, which is not supported; expected true"),
    ({"do_pad": None}, "do_pad is null, which is not supported"),
    ({"do_center_crop": True}, "do_center_crop is true, which is not supported; expected false"),
    ({"do_flip_channel_order": True}, "do_flip_channel_order is true"),
    ({"do_normalize": "yes"}, "do_normalize is 'yes', expected true or false"),
    ({"pad_size": {"height": 40, "width": 40}}, "pad_size is an object, which is not supported"),
    ({"background_color": [0, 0, 0]}, r"background_color is \[0, 0, 0\], which is not supported"),
    ({"resample": 6}, "resample is 6, expected an integer from 0 to 5"),
    ({"resample": "bicubic"}, "resample is 'bicubic', expected an integer"),
    ({"resample": None}, "resample is null, expected an integer"),
    ({"image_processor_type": "CLIPImageProcessor"}, "image_processor_type is 'CLIPImageProcessor', which"),
    ({"image_processor_type": "DeepseekVLHybridImageProcessor"}, "which is not supported"),
    ({"high_res_size": {"height": 60, "width": 60}}, "high_res_size is an object, which is not supported"),
    ({"size": {"shortest_edge": 30}}, "expected a square of 30 pixels"),
    ({"size": {"height": 30, "width": 31}}, "the vision encoder takes images of 30 pixels"),
    ({"size": 99}, "size is 99, but the vision encoder takes images of 30 pixels"),
    ({"size": "30"}, "size is '30', expected a square"),
    ({"min_size": -5}, "min_size is -5, expected an integer from 1 to 30"),
    ({"min_size": 31}, "min_size is 31"),
    ({"rescale_factor": float("nan")}, "is not valid JSON: NaN"),
    ({"rescale_factor": 0}, "rescale_factor is 0, expected a number greater than 0"),
    ({"rescale_factor": -1}, "expected a number greater than 0"),
    ({"image_std": [0, 0.5, 0.5]}, "image_std is .*, expected three numbers"),
    ({"image_std": [float("inf")] * 3}, "is not valid JSON: Infinity"),
    ({"image_mean": 0.5}, "image_mean is 0.5, expected three numbers"),
    ({"image_mean": [0.5]}, "expected three numbers"),
    ({"image_mean": [2, 0.5, 0.5]}, "expected three numbers from 0 to 1"),
    ({"image_mean": None}, "do_normalize is .*, but image_mean or image_std is null"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "sentence"), REFUSED, ids=str)
def test_settings_are_refused(
    siglip_pair: OraclePair, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    save_oracle(siglip_pair.oracle, tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(UserError, match=sentence):
        preprocess_spec(open_checkpoint(str(tmp_path)))


def test_hostile_values_end_in_a_sentence(siglip_pair: OraclePair, hybrid_pair: OraclePair) -> None:
    """Every setting in turn: followed or refused, and never a crash."""
    keys = {key for changes, _ in REFUSED for key in changes} | {
        key for changes in SETTINGS for key in changes
    }
    keys |= {f"high_res_{key}" for key in ("resample", "image_mean", "image_std", "background_color")}
    for checkpoint in (siglip_pair.checkpoint, hybrid_pair.checkpoint):
        assert checkpoint.preprocessor
        raw = checkpoint.config.to_dict()
        for key in sorted(keys):
            for value in HOSTILE:
                settings = Settings(
                    {**checkpoint.preprocessor.values, key: value}, "preprocessor_config.json"
                )
                try:
                    spec = parse_preprocessing(settings, ModelConfig.from_dict(raw))
                except UserError as error:
                    assert len(str(error)) < 300
                else:
                    assert 1 <= spec.min_size <= spec.image_size
                    assert 0 < spec.rescale_factor < float("inf")
