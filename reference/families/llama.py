"""The decoder's part of ``config.json``, which all families share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from reference.families.limits import MAX_DECODER_LAYERS, MAX_POSITIONS, MAX_VOCAB_SIZE
from reference.model.config import DecoderConfig
from reference.settings import Settings

# Keys of LLaMA and related models that change the computation, with the values that do not.
_LLAMA_KEYS_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (),
    "attention_chunk_size": (),
    "layer_types": (),
    "no_rope_layers": (),
    "partial_rotary_factor": (1, 1.0),
    "rotary_pct": (1, 1.0),
    "logit_scale": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "logit_scaling": (1, 1.0),
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "clip_qkv": (),
    "use_qk_norm": (False,),
    "qk_norm": (False,),
    "qk_layernorm": (False,),
    "alibi": (False,),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
}


def parse_llama(raw: Settings) -> DecoderConfig:
    """Parse the config of a LLaMA decoder; absent keys have the defaults of LlamaConfig.

    Raises:
        UserError: a value changes the computation in a way that is not supported.
        ValueError: sizes are inconsistent.
    """
    raw.choice("model_type", ("llama",), "llama")
    layers = raw.integer("num_hidden_layers", 32, high=MAX_DECODER_LAYERS)
    if raw.values.get("layer_types") == ["full_attention"] * layers:
        raw = replace(raw, values={key: value for key, value in raw.values.items() if key != "layer_types"})
    raw.refuse_unsupported(_LLAMA_KEYS_WITHOUT_EFFECT)
    raw.choice("hidden_act", ("silu", "swish"), "silu")
    width = raw.integer("hidden_size", 4096)
    heads = raw.integer("num_attention_heads", 32)
    if width % heads:
        raise ValueError(f"the decoder's {heads} heads must divide its width of {width}")
    return DecoderConfig(
        vocab_size=raw.integer("vocab_size", 32000, high=MAX_VOCAB_SIZE),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=raw.optional_integer("num_key_value_heads", heads),
        head_dim=raw.optional_integer("head_dim", width // heads),
        mlp_width=raw.integer("intermediate_size", 11008),
        norm_eps=raw.number("rms_norm_eps", 1e-6, high=1.0),
        rope_theta=_rope_theta(raw),
        max_positions=raw.integer("max_position_embeddings", 2048, high=MAX_POSITIONS),
    )


def _rope_theta(raw: Settings) -> float:
    """Return the base of RoPE, which transformers 5 keeps in ``rope_parameters``.

    ``rope_scaling`` takes precedence over ``rope_parameters``.
    """
    key = "rope_scaling" if raw.values.get("rope_scaling") else "rope_parameters"
    rope = raw.section(key, optional=True)
    for name in ("rope_type", "type"):
        if name in rope:
            rope.choice(name, ("default",))
            break
    rope.refuse_unsupported({"partial_rotary_factor": (1, 1.0)})
    for name, value in rope.values.items():
        if isinstance(value, Mapping):
            raise rope.error(name, "which is not supported; expected one RoPE for all layers")
    return rope.number("rope_theta") if "rope_theta" in rope else raw.number("rope_theta", 10000.0)
