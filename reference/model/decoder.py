"""LLaMA decoder with an explicit, statically sized KV cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reference.model.config import DecoderConfig
from reference.model.constants import ConstantModule
from reference.model.operators import cached_attention, cached_attention_op, rope_tables


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467); half precision is computed in float32 inside."""

    def __init__(self, width: int, eps: float) -> None:
        """Create the weight ``[width]``."""
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``[..., width]`` over its last axis."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class SelfAttention(nn.Module):
    """Causal attention; keys and values are stored in a cache that the caller owns."""

    def __init__(self, config: DecoderConfig) -> None:
        """Create the projections."""
        super().__init__()
        head_dim = config.head_dim
        self.q_proj = nn.Linear(config.width, config.heads * head_dim, bias=False)
        self.k_proj = nn.Linear(config.width, config.kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(config.width, config.kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(config.heads * head_dim, config.width, bias=False)
        self.kv_heads = config.kv_heads
        self.key_scale: nn.Parameter | None = None
        self.value_scale: nn.Parameter | None = None

    def quantize_cache(self) -> None:
        """Add parameters for the scales ``[Hkv]`` of a quantized cache."""
        like = self.k_proj.weight
        for name in ("key_scale", "value_scale"):
            setattr(self, name, nn.Parameter(torch.ones(self.kv_heads, dtype=like.dtype, device=like.device)))

    def forward(
        self, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Attend over the cache; updates the cache in place.

        Args:
            x: ``[B, S, D]``.
            positions: ``[B, S]`` int64.
            cos: table ``[P, Dh / 2]`` of RoPE.
            sin: table ``[P, Dh / 2]`` of RoPE.
            keys: cache ``[B, Hkv, C, Dh]``.
            values: cache ``[B, Hkv, C, Dh]``.

        Returns:
            ``[B, S, D]``.
        """
        # The traced program keeps attention as one operator; autograd needs the ATen form.
        attend = cached_attention if torch.is_grad_enabled() else cached_attention_op
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        scales = (self.key_scale, self.value_scale)
        return self.o_proj(attend(q, k, v, positions, cos, sin, keys, values, *scales))


class GatedMlp(nn.Module):
    """SiLU-gated feed-forward (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        """Create the projections."""
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, S, D]`` to ``[B, S, D]``."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward with residuals."""

    def __init__(self, config: DecoderConfig) -> None:
        """Create the sublayers."""
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)
        self.mlp = GatedMlp(config.width, config.mlp_width)

    def forward(
        self, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Map ``[B, S, D]`` to ``[B, S, D]``; arguments as in ``SelfAttention.forward``."""
        x = x + self.self_attn(self.input_layernorm(x), positions, cos, sin, keys, values)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(ConstantModule):
    """Layers, final norm and head; the cache is an argument, updated in place."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        """Create the layers."""
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.register_constants()

    def constants(self) -> dict[str, Tensor]:
        """Compute RoPE's tables ``cos`` and ``sin``, ``[P, Dh / 2]``."""
        config = self.config
        cos, sin = rope_tables(config.head_dim, config.rope_theta, config.max_positions)
        return {"cos": cos, "sin": sin}

    def new_cache(self, batch: int, capacity: int) -> list[Tensor]:
        """Allocate a zero cache: keys then values per layer, ``[batch, Hkv, capacity, Dh]``."""
        shape = (batch, self.config.kv_heads, capacity, self.config.head_dim)
        return [self.cos.new_zeros(shape) for _ in range(2 * self.config.layers)]

    def forward(
        self, inputs_embeds: Tensor, positions: Tensor, logit_rows: Tensor, cache: list[Tensor]
    ) -> Tensor:
        """Compute the logits of selected positions.

        Args:
            inputs_embeds: ``[B, S, D]``.
            positions: ``[B, S]`` int64.
            logit_rows: ``[K]`` int64, indices into S.
            cache: as ``new_cache`` returns it; updated in place.

        Returns:
            ``[B, K, V]`` float32.
        """
        x = inputs_embeds
        for index, layer in enumerate(self.layers):
            keys, values = cache[2 * index], cache[2 * index + 1]
            x = layer(x, positions, self.cos, self.sin, keys, values)
        x = self.norm(x.index_select(1, logit_rows))
        return self.head(x).float()
