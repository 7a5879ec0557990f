"""Sizes of a DeepSeek-VL model, read from either checkpoint layout's ``config.json``.

Two layouts exist: ``multi_modality`` (the original, arXiv 2403.05525) and transformers'
``deepseek_vl`` / ``deepseek_vl_hybrid``. Both leave out keys that equal the defaults of
the class that wrote them, so those defaults are filled in here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from runtimes.errors import UserError

Layout = str  # "original" or "transformers"
Triple = tuple[float, float, float]

# Forms of GELU by the names in configs; transformers' SigLIP may use the tanh approximation.
ACTIVATIONS = {"gelu": "none", "gelu_pytorch_tanh": "tanh"}

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class SiglipConfig:
    """SigLIP ViT. Sizes in pixels, channels and layers; the output is ``grid**2`` tokens of ``width``."""

    image_size: int = 384
    patch_size: int = 16
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_width: int = 4096
    activation: str = "gelu"
    norm_eps: float = 1e-6

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class SamConfig:
    """SAM ViT-B with two necks and two stride-2 convolutions; see ``reference/sam.py``."""

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
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class NormalizationConfig:
    """Per-channel ``(x - mean) / std`` of RGB in [0, 1]."""

    mean: Triple
    std: Triple


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower: SigLIP alone (1.3B) or SAM beside it (7B).

    ``low_norm`` / ``high_norm`` are the normalisations *inside* the tower; None where the
    preprocessing has normalised already.
    """

    siglip: SiglipConfig
    sam: SamConfig | None = None
    low_norm: NormalizationConfig | None = None
    high_norm: NormalizationConfig | None = None

    @property
    def hybrid(self) -> bool:
        return self.sam is not None

    @property
    def image_size(self) -> int:
        """Side in pixels of the square image that the tower takes."""
        return self.sam.image_size if self.sam else self.siglip.image_size

    @property
    def image_tokens(self) -> int:
        return self.siglip.grid**2


@dataclass(frozen=True)
class AdaptorConfig:
    """``mlp_gelu`` of any depth, or the 7B's ``low_high_hybrid_split_mlp_gelu``."""

    low_width: int
    high_width: int | None
    width: int
    depth: int = 2


@dataclass(frozen=True)
class DecoderConfig:
    """LLaMA decoder; defaults are LlamaConfig's, which the checkpoints leave out."""

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
    """One DeepSeek-VL: vision tower, adaptor and decoder, and the layout it came in."""

    vision: VisionConfig
    adaptor: AdaptorConfig
    decoder: DecoderConfig
    layout: Layout = "original"
    tied_head: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """The inverse of ``to_dict``, also of what JSON makes of it."""

        def tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
            return {
                name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
            }

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
        )

    def __post_init__(self) -> None:
        _check_sizes(self)


def parse_config(
    raw: Mapping[str, Any], where: str, preprocessor: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Config of a checkpoint from its parsed ``config.json``.

    Args:
        raw: the JSON object.
        where: file name for error messages.
        preprocessor: the parsed ``preprocessor_config.json``; transformers keeps the normalisation
            of both branches there, the original inside ``config.json``.

    Raises:
        UserError: the config is of no DeepSeek-VL, or lacks or contradicts something.
    """
    kind = raw.get("model_type")
    known = ("multi_modality", "deepseek_vl", "deepseek_vl_hybrid")
    if kind not in known:
        raise UserError(
            f"{where} has model_type {kind!r}, which is no DeepSeek-VL; expected one of {', '.join(known)}."
        )
    try:
        if kind == "multi_modality":
            return _parse_original(raw)
        return _parse_transformers(raw, preprocessor or {})
    except KeyError as error:
        raise UserError(f"{where} lacks the key {error.args[0]!r}.") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{where} has a value that cannot be read: {error}.") from error


# The towers that original checkpoints name without giving sizes.
_SIGLIP_BY_NAME: dict[str, dict[str, Any]] = {
    "siglip_large_patch16_384": {},
    "siglip_large_patch16_256": {"image_size": 256},
}
_SAM_BY_NAME: dict[str, dict[str, Any]] = {"sam_b_downsample": {}}


def _parse_original(raw: Mapping[str, Any]) -> ModelConfig:
    vision, aligner = raw["vision_config"], raw["aligner_config"]
    params = vision["params"]
    tower = str(vision["cls"])
    if tower not in ("CLIPVisionTower", "HybridVisionTower"):
        raise ValueError(f"vision_config.cls is {tower!r}")
    hybrid = tower == "HybridVisionTower"
    low_params = params["low_res_cfg"] if hybrid else params
    low = _siglip_from_original(low_params)
    high = _sam_from_original(params["high_res_cfg"]) if hybrid else None
    projector = aligner["params"]
    expected = "low_high_hybrid_split_mlp_gelu" if hybrid else "mlp_gelu"
    if projector["projector_type"] != expected:
        raise ValueError(f"projector_type is {projector['projector_type']!r}, a {tower} needs {expected!r}")
    return ModelConfig(
        vision=VisionConfig(
            siglip=low,
            sam=high,
            low_norm=_tower_norm(low_params),
            high_norm=_tower_norm(params["high_res_cfg"]) if hybrid else None,
        ),
        adaptor=AdaptorConfig(
            low_width=low.width,
            high_width=high.downsample_widths[-1] if high else None,
            width=int(projector["n_embed"]),
            depth=int(projector.get("depth", 1)),
        ),
        decoder=_parse_llama(raw["language_config"]),
        layout="original",
        tied_head=bool(raw["language_config"].get("tie_word_embeddings", False)),
    )


def _siglip_from_original(params: Mapping[str, Any]) -> SiglipConfig:
    sizes = _named_sizes(params, _SIGLIP_BY_NAME, SiglipConfig)
    # As in the original: -1 keeps every layer, -2 (its default) all but the last, n the first n.
    select = int(params.get("select_layer", -2))
    sizes["layers"] = min(sizes["layers"], sizes["layers"] + select + 1 if select <= 0 else select)
    return SiglipConfig(**sizes)


def _sam_from_original(params: Mapping[str, Any]) -> SamConfig:
    sizes = _named_sizes(params, _SAM_BY_NAME, SamConfig)
    for key in ("global_layers", "downsample_widths"):
        sizes[key] = tuple(int(value) for value in sizes[key])
    return SamConfig(**sizes)


def _named_sizes(
    params: Mapping[str, Any], known: Mapping[str, dict[str, Any]], spec: type[SiglipConfig] | type[SamConfig]
) -> dict[str, Any]:
    """Sizes of a named tower, overridden by the keys that are written out (as in ``tiny``)."""
    name = str(params.get("model_name", next(iter(known))))
    defaults = asdict(spec())
    written = {key: type(defaults[key])(params[key]) for key in defaults if key in params}
    if name not in known and not {"width", "layers", "heads"} <= written.keys():
        raise ValueError(f"model_name {name!r} is not one of {', '.join(known)}")
    return {**defaults, **known.get(name, {}), **written}


def _tower_norm(params: Mapping[str, Any]) -> NormalizationConfig | None:
    if params.get("pixel_mean") is None or params.get("pixel_std") is None:
        return None
    return NormalizationConfig(triple(params["pixel_mean"]), triple(params["pixel_std"]))


def triple(values: Any) -> Triple:
    """Three numbers, one per channel; raises ValueError or TypeError on anything else."""
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _parse_transformers(raw: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> ModelConfig:
    vision = raw.get("vision_config") or {}
    # Defaults of transformers' SiglipVisionConfig.
    low = SiglipConfig(
        image_size=int(vision.get("image_size", 224)),
        patch_size=int(vision.get("patch_size", 16)),
        width=int(vision.get("hidden_size", 768)),
        layers=int(vision.get("num_hidden_layers", 12)),
        heads=int(vision.get("num_attention_heads", 12)),
        mlp_width=int(vision.get("intermediate_size", 3072)),
        activation=str(vision.get("hidden_act", "gelu_pytorch_tanh")),
        norm_eps=float(vision.get("layer_norm_eps", 1e-6)),
    )
    hybrid = raw["model_type"] == "deepseek_vl_hybrid"
    high = _sam_from_transformers(raw.get("high_res_vision_config") or {}) if hybrid else None
    inside = hybrid and bool(preprocessor.get("do_normalize", True))
    text = raw.get("text_config") or {}
    decoder = _parse_llama(text)
    return ModelConfig(
        vision=VisionConfig(
            siglip=low,
            sam=high,
            low_norm=_branch_norm(preprocessor, "", HALF, HALF) if inside else None,
            high_norm=_branch_norm(preprocessor, "high_res_", CLIP_MEAN, CLIP_STD) if inside else None,
        ),
        adaptor=AdaptorConfig(
            low_width=low.width,
            high_width=high.downsample_widths[-1] if high else None,
            width=decoder.width,
        ),
        decoder=decoder,
        layout="transformers",
        tied_head=bool(raw.get("tie_word_embeddings", True)),
    )


def _branch_norm(
    preprocessor: Mapping[str, Any], prefix: str, mean: Triple, std: Triple
) -> NormalizationConfig:
    """Normalisation of a branch from the processor's keys, by default the released 7B's."""
    return NormalizationConfig(
        triple(preprocessor.get(f"{prefix}image_mean") or mean),
        triple(preprocessor.get(f"{prefix}image_std") or std),
    )


def _sam_from_transformers(raw: Mapping[str, Any]) -> SamConfig:
    # Defaults of transformers' SamVisionConfig.
    width = int(raw.get("hidden_size", 768))
    neck = int(raw.get("output_channels", 256))
    return SamConfig(
        image_size=int(raw.get("image_size", 1024)),
        patch_size=int(raw.get("patch_size", 16)),
        width=width,
        layers=int(raw.get("num_hidden_layers", 12)),
        heads=int(raw.get("num_attention_heads", 12)),
        mlp_width=int(raw.get("mlp_dim") or width * float(raw.get("mlp_ratio", 4.0))),
        window_size=int(raw.get("window_size", 14)),
        global_layers=tuple(raw.get("global_attn_indexes", (2, 5, 8, 11))),
        neck_width=neck,
        downsample_widths=(2 * neck, 4 * neck),
        activation=str(raw.get("hidden_act", "gelu")),
        norm_eps=float(raw.get("layer_norm_eps", 1e-6)),
    )


def _parse_llama(raw: Mapping[str, Any]) -> DecoderConfig:
    width = int(raw.get("hidden_size", 4096))
    heads = int(raw.get("num_attention_heads", 32))
    rope = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or rope
    if scaling.get("rope_type", scaling.get("type", "default")) != "default":
        raise ValueError("rope scaling other than 'default' is not part of DeepSeek-VL")
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(f"the decoder's hidden_act is {activation!r}, expected 'silu'")
    if raw.get("attention_bias") or raw.get("mlp_bias"):
        raise ValueError("the decoder's attention_bias and mlp_bias must be false")
    return DecoderConfig(
        vocab_size=int(raw.get("vocab_size", 32000)),
        width=width,
        layers=int(raw.get("num_hidden_layers", 32)),
        heads=heads,
        kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or width // heads),
        mlp_width=int(raw.get("intermediate_size", 11008)),
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
        max_positions=int(raw.get("max_position_embeddings", 2048)),
    )


def _check_sizes(config: ModelConfig) -> None:
    low, high, decoder = config.vision.siglip, config.vision.sam, config.decoder
    parts = {"SigLIP": low, "SAM": high, "the decoder": decoder}
    sizes = {
        f"{part}'s {key}": value
        for part, spec in parts.items()
        if spec
        for key, value in vars(spec).items()
        if isinstance(value, int)
    }
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, it must be at least 1")
    for tower in (low, high):
        if tower and tower.activation not in ACTIVATIONS:
            raise ValueError(f"activation {tower.activation!r} is not one of {', '.join(ACTIVATIONS)}")
    checks: list[tuple[bool, str]] = [
        (low.image_size % low.patch_size == 0, "SigLIP's patch_size must divide its image_size"),
        (low.width % low.heads == 0, "SigLIP's heads must divide its width"),
        (decoder.heads % decoder.kv_heads == 0, "the decoder's kv_heads must divide its heads"),
        (decoder.head_dim % 2 == 0, "the decoder's head_dim must be even for RoPE"),
        (
            config.adaptor.width == decoder.width,
            f"the adaptor gives {config.adaptor.width} channels but the decoder takes {decoder.width}",
        ),
    ]
    if high:
        checks += [
            (high.image_size % high.patch_size == 0, "SAM's patch_size must divide its image_size"),
            (high.width % high.heads == 0, "SAM's heads must divide its width"),
            (len(high.downsample_widths) == 2, "SAM needs two downsample_widths"),
            (bool(high.global_layers), "SAM needs at least one global-attention layer"),
            (
                all(0 <= layer < high.layers for layer in high.global_layers),
                "SAM's global layers must lie below its layer count",
            ),
            (decoder.width % 2 == 0, "the hybrid adaptor needs an even decoder width"),
        ]
    for holds, sentence in checks:
        if not holds:
            raise ValueError(sentence)
