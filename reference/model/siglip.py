"""SigLIP vision transformer (arXiv 2303.15343): all patch tokens, no pooling."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reference.model.config import GELU_APPROXIMATIONS, SiglipConfig


class PatchEmbed(nn.Module):
    """Embedding of non-overlapping patches."""

    def __init__(self, width: int, patch_size: int) -> None:
        """Create the convolution."""
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, image: Tensor) -> Tensor:
        """Map ``[B, 3, N, N]`` to ``[B, C, g, g]``."""
        return self.proj(image)


class Attention(nn.Module):
    """Bidirectional multi-head attention with one fused QKV projection."""

    def __init__(self, width: int, heads: int, qkv_bias: bool = True) -> None:
        """Create the projections."""
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, T, C]`` to ``[B, T, C]``."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, T, Dh]
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        """Create the layers; ``activation`` is a key of ``GELU_APPROXIMATIONS``."""
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate=GELU_APPROXIMATIONS[activation])
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., C]`` to ``[..., C]``."""
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: SiglipConfig) -> None:
        """Create the sublayers."""
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = Attention(config.width, config.heads, config.qkv_bias)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = Mlp(config.width, config.mlp_width, config.activation)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, T, C]`` to ``[B, T, C]``."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SiglipEncoder(nn.Module):
    """Encoder of normalized pixels."""

    def __init__(self, config: SiglipConfig) -> None:
        """Create the embeddings, blocks and final norm."""
        super().__init__()
        self.patch_embed = PatchEmbed(config.width, config.patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid**2, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode ``[B, 3, N, N]`` as patch features ``[B, grid**2, C]``."""
        x = self.patch_embed(pixels).flatten(2).transpose(1, 2)  # [B, T, C]
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
