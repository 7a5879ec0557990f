"""A checkpoint's image processor settings, and the preprocessing that they describe."""

from __future__ import annotations

from pathlib import Path

from reference.families.limits import MAX_STD, MIN_STD
from reference.families.registry import family_of
from reference.model.config import CLIP_MEAN, CLIP_STD, HALF_RGB, ModelConfig
from reference.settings import Settings
from runtimes.bundle.files import read_json
from runtimes.preprocess import RESAMPLING, PreprocessSpec

BILINEAR, BICUBIC = 2, 3  # numbers of Pillow's filters, as in ``resample``


def read_image_processor(folder: Path) -> Settings | None:
    """Read the image processor's settings from a checkpoint folder; None if no file has them.

    As in transformers (``get_image_processor_dict``), settings in ``processor_config.json`` take
    precedence over ``preprocessor_config.json``, which may be left over from an older version.
    """
    combined, own = folder / "processor_config.json", folder / "preprocessor_config.json"
    if combined.exists():
        inner = read_json(combined).get("image_processor")
        if inner is not None:
            return Settings.from_json(inner, str(combined), "image_processor.")
    return Settings(read_json(own), str(own)) if own.exists() else None


def parse_preprocessing(settings: Settings, config: ModelConfig) -> PreprocessSpec:
    """Build the preprocessing of one image from an image processor's settings.

    The hybrid model normalizes inside its tower, so its images are only resized, padded and
    rescaled; transformers' two images per input become one.

    Raises:
        UserError: a setting is not supported, or does not match the model.
    """
    vision = config.vision
    two_images = vision.hybrid and (config.layout == "transformers" or "high_res_size" in settings)
    _check_class(settings, config)
    rescales = _check_steps(settings, two_images)
    prefix = "high_res_" if two_images else ""
    _check_side(settings, f"{prefix}size" if f"{prefix}size" in settings else "image_size", vision.image_size)
    if two_images:
        _check_side(settings, "size", vision.siglip.image_size)
        if settings.integer("resample", BICUBIC, low=0) not in (BILINEAR, BICUBIC):
            raise settings.error("resample", f"which is not supported; expected {BILINEAR} or {BICUBIC}")
    normalizes = settings.nullable_flag("do_normalize", not vision.hybrid) and not two_images
    mean, std = None, None
    if settings.values.get(f"{prefix}image_mean", CLIP_MEAN) is not None:
        mean = settings.triple(f"{prefix}image_mean", CLIP_MEAN)
    if settings.values.get(f"{prefix}image_std", CLIP_STD) is not None:
        std = settings.triple(f"{prefix}image_std", CLIP_STD, low=MIN_STD, high=MAX_STD)
    if normalizes and (mean is None or std is None):
        raise settings.error("do_normalize", "but image_mean or image_std is null")
    background = tuple(int(value * 255) for value in mean) if mean else (127, 127, 127)
    if settings.integers(f"{prefix}background_color", background, low=0, high=255) != background:
        raise settings.error(
            f"{prefix}background_color",
            f"which is not supported; expected {list(background)}, as it follows from {prefix}image_mean",
        )
    return PreprocessSpec(
        image_size=vision.image_size,
        min_size=settings.integer("min_size", min(14, vision.image_size), high=vision.image_size),
        mean=mean or HALF_RGB,
        std=std or HALF_RGB,
        background=(background[0], background[1], background[2]),
        rescale_factor=settings.number("rescale_factor", 1 / 255, high=1000.0) if rescales else 1.0,
        do_normalize=normalizes,
        on_white=settings.nullable_flag("do_convert_rgb", False),
        resample=RESAMPLING[settings.integer(f"{prefix}resample", BICUBIC, low=0, high=len(RESAMPLING) - 1)],
    )


def _check_class(settings: Settings, config: ModelConfig) -> None:
    """Refuse another processor class: it may do other steps, such as a center crop."""
    if settings.values.get("image_processor_type") is None:
        return
    settings.choice("image_processor_type", family_of(config).image_processors(config))


def _check_steps(settings: Settings, two_images: bool) -> bool:
    """Refuse unsupported steps; returns whether pixels are rescaled."""
    for step in ("do_resize", "do_pad"):
        if not settings.nullable_flag(step, True):
            raise settings.error(step, "which is not supported; expected true")
    supported = ("do_resize", "do_pad", "do_rescale", "do_normalize", "do_convert_rgb")
    settings.refuse_unsupported(
        {key: (False,) for key in settings.values if key.startswith("do_") and key not in supported}
    )
    settings.refuse_unsupported({"pad_size": ()})
    if not two_images:
        settings.refuse_unsupported({key: () for key in settings.values if key.startswith("high_res_")})
    return settings.nullable_flag("do_rescale", True)


def _check_side(settings: Settings, key: str, side: int) -> None:
    """Check that a size is a square of ``side`` pixels.

    A size is a number, ``[height, width]`` or ``{"height": …, "width": …}``.
    """
    if key not in settings:
        return
    size = settings.values[key]
    if isinstance(size, dict):
        size = [size.get("height"), size.get("width")] if size.keys() == {"height", "width"} else None
    sides = size if isinstance(size, list) else [size]
    if not sides or any(type(value) is not int for value in sides):
        raise settings.error(key, f"expected a square of {side} pixels")
    if any(value != side for value in sides):
        raise settings.error(key, f"but the vision encoder takes images of {side} pixels")
