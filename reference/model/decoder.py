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
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class SelfAttention(nn.Module):
    """Causal attention whose keys and values live in the cache that the caller owns."""

    def __init__(self, config: DecoderConfig) -> None:
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
        """Take scales ``[Hkv]`` for a quantized cache as parameters."""
        like = self.k_proj.weight
        for name in ("key_scale", "value_scale"):
            setattr(self, name, nn.Parameter(torch.ones(self.kv_heads, dtype=like.dtype, device=like.device)))

    def forward(
        self, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        # The operator keeps the trace whole; autograd needs the plain form.
        attend = cached_attention if torch.is_grad_enabled() else cached_attention_op
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        scales = (self.key_scale, self.value_scale)
        return self.o_proj(attend(q, k, v, positions, cos, sin, keys, values, *scales))


class GatedMlp(nn.Module):
    """SiLU-gated feed-forward (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward with residuals."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)
        self.mlp = GatedMlp(config.width, config.mlp_width)

    def forward(
        self, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), positions, cos, sin, keys, values)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(ConstantModule):
    """Layers, final norm and head. The cache is an argument, updated in place."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.register_constants()

    def constants(self) -> dict[str, Tensor]:
        config = self.config
        cos, sin = rope_tables(config.head_dim, config.rope_theta, config.max_positions)
        return {"cos": cos, "sin": sin}

    def new_cache(self, batch: int, capacity: int) -> list[Tensor]:
        """Zeroed states: keys then values of each layer, ``[batch, Hkv, capacity, Dh]``."""
        shape = (batch, self.config.kv_heads, capacity, self.config.head_dim)
        return [self.cos.new_zeros(shape) for _ in range(2 * self.config.layers)]

    def forward(
        self, inputs_embeds: Tensor, positions: Tensor, logit_rows: Tensor, cache: list[Tensor]
    ) -> Tensor:
        """Logits of the wanted rows.

        Args:
            inputs_embeds: ``[B, S, D]``.
            positions: ``[B, S]`` int64.
            logit_rows: ``[K]`` int64, rows of S.
            cache: as from ``new_cache``; updated in place.

        Returns:
            ``[B, K, V]`` float32.
        """
        x = inputs_embeds
        for index, layer in enumerate(self.layers):
            keys, values = cache[2 * index], cache[2 * index + 1]
            x = layer(x, positions, self.cos, self.sin, keys, values)
        x = self.norm(x.index_select(1, logit_rows))
        return self.head(x).float()
