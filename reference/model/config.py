"""Config of a model; ``reference.checkpoint.config_file`` parses it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from runtimes.errors import UserError, first_line

Layout = str  # "original" or "transformers"
RGB = tuple[float, float, float]

# Limits on sizes: above them, a short config file would cost gigabytes of memory or minutes.
MAX_ROPE_TABLE_SIZE = 1 << 27  # elements of the RoPE tables
MAX_GRID = 256  # patches along a side

# Name of a GELU in configs → PyTorch's ``approximate``; transformers' SigLIP may use tanh.
GELU_APPROXIMATIONS = {"gelu": "none", "gelu_pytorch_tanh": "tanh"}

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF_RGB = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class SiglipConfig:
    """Sizes of a SigLIP ViT in pixels, channels and layers; it outputs ``[B, grid**2, width]``."""

    image_size: int = 384
    patch_size: int = 16
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_width: int = 4096
    activation: str = "gelu"
    norm_eps: float = 1e-6
    qkv_bias: bool = True

    @property
    def grid(self) -> int:
        """Patches along a side of the image."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class SamConfig:
    """Sizes of a SAM ViT-B with two necks and strided convolutions; see ``reference.model.sam``.

    The second neck reads the output of the first layer that ``global_layers`` *lists*. A
    ``window_size`` of 0 makes all layers global.
    """

    image_size: int = 1024
    patch_size: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    window_size: int = 14
    global_layers: tuple[int, ...] = (2, 5, 8, 11)
    neck_width: int = 256
    downsample_widths: tuple[int, int] = (512, 1024)
    activation: str = "gelu"
    norm_eps: float = 1e-6

    @property
    def grid(self) -> int:
        """Patches along a side of the image."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class NormalizationConfig:
    """Per-channel ``(x - mean) / std`` of RGB in [0, 1]."""

    mean: RGB
    std: RGB


@dataclass(frozen=True)
class VisionConfig:
    """Config of the vision tower: SigLIP alone (1.3B), or SAM and SigLIP (7B).

    ``low_norm`` and ``high_norm`` are the normalizations *inside* the tower; None if the
    preprocessing normalizes.
    """

    siglip: SiglipConfig
    sam: SamConfig | None = None
    low_norm: NormalizationConfig | None = None
    high_norm: NormalizationConfig | None = None

    @property
    def hybrid(self) -> bool:
        """Whether the tower has both branches, SAM and SigLIP."""
        return self.sam is not None

    @property
    def image_size(self) -> int:
        """Side of the square input image, in pixels."""
        return self.sam.image_size if self.sam else self.siglip.image_size

    @property
    def image_tokens(self) -> int:
        """Tokens per image."""
        return self.siglip.grid**2


@dataclass(frozen=True)
class AdaptorConfig:
    """Sizes of the adaptor: ``mlp_gelu``, or ``low_high_hybrid_split_mlp_gelu`` (7B)."""

    low_width: int
    high_width: int | None
    width: int
    depth: int = 2
    activation: str = "gelu"


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a LLaMA decoder; the defaults are LlamaConfig's, which checkpoints leave out."""

    vocab_size: int = 32000
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    mlp_width: int = 11008
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_positions: int = 2048


@dataclass(frozen=True)
class ModelConfig:
    """Config of a model: vision tower, adaptor, decoder, checkpoint layout and family.

    Raises:
        ValueError: the sizes are inconsistent or above the limits of this module.
    """

    vision: VisionConfig
    adaptor: AdaptorConfig
    decoder: DecoderConfig
    layout: Layout = "original"
    tied_head: bool = False
    family: str = "deepseek_vl"  # a module of ``reference.families``

    def to_dict(self) -> dict[str, Any]:
        """Return nested dictionaries, as a manifest stores them.

        Keys that earlier releases do not have are left out where they have their defaults, so that
        bundles of these releases still compare as equal.
        """
        raw = asdict(self)
        for part, key, default in (
            (raw, "family", "deepseek_vl"),
            (raw["vision"]["siglip"], "qkv_bias", True),
            (raw["adaptor"], "activation", "gelu"),
        ):
            if part[key] == default:
                del part[key]
        return raw

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Build a config from ``to_dict``'s result, also after a round trip through JSON.

        Raises:
            UserError: a key or value is missing or wrong; the manifest is damaged.
        """

        def tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
            return {
                name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
            }

        try:
            vision = raw["vision"]
            norms = (vision["low_norm"], vision["high_norm"])
            return cls(
                VisionConfig(
                    SiglipConfig(**vision["siglip"]),
                    SamConfig(**tuples(vision["sam"])) if vision["sam"] else None,
                    *(NormalizationConfig(**tuples(norm)) if norm else None for norm in norms),
                ),
                AdaptorConfig(**raw["adaptor"]),
                DecoderConfig(**raw["decoder"]),
                raw["layout"],
                raw["tied_head"],
                raw.get("family", "deepseek_vl"),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"The model's sizes in the manifest are not valid ({first_line(error)}); export it again."
            ) from error

    def __post_init__(self) -> None:
        """Check the sizes."""
        _check_sizes(self)


def _check_sizes(config: ModelConfig) -> None:
    low, high, decoder = config.vision.siglip, config.vision.sam, config.decoder
    parts = {"SigLIP": low, "SAM": high, "the decoder": decoder}
    sizes = {
        f"{part}'s {key}": value
        for part, spec in parts.items()
        if spec
        for key, value in vars(spec).items()
        if isinstance(value, int) and not isinstance(value, bool)
    }
    for name, value in sizes.items():
        if value < (0 if name == "SAM's window_size" else 1):
            raise ValueError(f"{name} is {value}, it must be at least 1")
    for part in (low, high, config.adaptor):
        if part and part.activation not in GELU_APPROXIMATIONS:
            raise ValueError(f"activation {part.activation!r} is not one of {', '.join(GELU_APPROXIMATIONS)}")
    checks: list[tuple[bool, str]] = [
        (low.image_size % low.patch_size == 0, "SigLIP's patch_size must divide its image_size"),
        (low.grid <= MAX_GRID, f"SigLIP's grid of {low.grid} patches is larger than {MAX_GRID}"),
        (low.width % low.heads == 0, "SigLIP's heads must divide its width"),
        (decoder.heads % decoder.kv_heads == 0, "the decoder's kv_heads must divide its heads"),
        (decoder.head_dim % 2 == 0, "the decoder's head_dim must be even for RoPE"),
        (
            decoder.max_positions * decoder.head_dim <= MAX_ROPE_TABLE_SIZE,
            f"RoPE tables of {decoder.max_positions} positions with {decoder.head_dim} numbers are too large",
        ),
        (
            config.adaptor.width == decoder.width,
            f"the adaptor outputs {config.adaptor.width} channels but the decoder takes {decoder.width}",
        ),
    ]
    if high:
        checks += [
            (high.image_size % high.patch_size == 0, "SAM's patch_size must divide its image_size"),
            (high.grid <= MAX_GRID, f"SAM's grid of {high.grid} patches is larger than {MAX_GRID}"),
            (high.width % high.heads == 0, "SAM's heads must divide its width"),
            (len(high.downsample_widths) == 2, "SAM needs two downsample_widths"),
            (bool(high.global_layers), "SAM needs at least one global-attention layer"),
            (
                all(0 <= layer < high.layers for layer in high.global_layers),
                "SAM's global layers must lie below its layer count",
            ),
            (decoder.width % 2 == 0, "the hybrid adaptor needs an even decoder width"),
        ]
    for passed, message in checks:
        if not passed:
            raise ValueError(message)
