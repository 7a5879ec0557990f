"""SAM image encoder (arXiv 2304.02643) with the two necks of DeepSeek-VL.

The encoder has ViTDet blocks with windowed attention and decomposed relative positions, a
convolutional neck, bilinear upsampling to four times SigLIP's token grid, and two stride-2
convolutions down to that grid. A second neck reads the output of the first global-attention block;
its branch is added with the learned weight ``hd_alpha``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reference.model.config import SamConfig
from reference.model.constants import ConstantModule
from reference.model.resize import bilinear_matrix, resize
from reference.model.siglip import Mlp, PatchEmbed


class RelativePositionAttention(ConstantModule):
    """Attention on an ``n × n`` grid with decomposed relative positions (arXiv 2112.01526)."""

    relative_index: Tensor

    def __init__(self, width: int, heads: int, grid: int) -> None:
        """Create the projections and the tables of relative positions."""
        super().__init__()
        self.heads, self.grid = heads, grid
        head_dim = width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * grid - 1, head_dim))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * grid - 1, head_dim))
        self.register_constants()

    def constants(self) -> dict[str, Tensor]:
        """Compute the table index of every pair of rows, ``[n * n]``."""
        row = torch.arange(self.grid)
        index = row[:, None] - row[None, :] + self.grid - 1  # [query, key]
        return {"relative_index": index.flatten()}

    def _table(self, rel_pos: Tensor) -> Tensor:
        """Return the relative embedding of all pairs of rows (or columns), ``[query, Dh, key]``."""
        table = rel_pos.index_select(0, self.relative_index)  # [query * key, Dh]
        return table.unflatten(0, (self.grid, self.grid)).transpose(1, 2)

    def position_bias(self, q: Tensor) -> Tensor:
        """Compute the scores' bias ``[B, H, T, T]`` from unscaled queries ``[B, H, T, Dh]``."""
        n = self.grid
        q = q.unflatten(2, (n, n))  # [B, H, n, n, Dh]
        bias_h = torch.matmul(q, self._table(self.rel_pos_h))  # [B, H, qh, qw, kh]
        bias_w = torch.matmul(q.transpose(2, 3), self._table(self.rel_pos_w)).transpose(2, 3)
        bias = bias_h.unsqueeze(-1) + bias_w.unsqueeze(-2)  # [B, H, qh, qw, kh, kw]
        return bias.flatten(4, 5).flatten(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, n * n, C]`` to ``[B, n * n, C]``."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, T, Dh]
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.position_bias(q))
        return self.proj(out.transpose(1, 2).flatten(2))


class SamBlock(nn.Module):
    """Pre-norm block on a ``[B, g, g, C]`` grid; ``window`` 0 means global attention."""

    def __init__(self, config: SamConfig, window: int) -> None:
        """Create the sublayers."""
        super().__init__()
        self.grid, self.window = config.grid, window
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = RelativePositionAttention(config.width, config.heads, window or config.grid)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = Mlp(config.width, config.mlp_width, config.activation)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, g, g, C]`` to ``[B, g, g, C]``."""
        h = self.norm1(x)
        x = x + (self._windowed(h) if self.window else self._global(h))
        return x + self.mlp(self.norm2(x))

    def _global(self, x: Tensor) -> Tensor:
        return self.attn(x.flatten(1, 2)).unflatten(1, (self.grid, self.grid))

    def _windowed(self, x: Tensor) -> Tensor:
        """Attend inside ``window × window`` tiles; zeros pad the grid to a multiple of the tile."""
        g, w = self.grid, self.window
        pad = -g % w
        tiles = (g + pad) // w
        if pad:
            x = F.pad(x, (0, 0, 0, pad, 0, pad))
        x = x.unflatten(2, (tiles, w)).unflatten(1, (tiles, w)).transpose(2, 3)  # [B, t, t, w, w, C]
        x = self.attn(x.flatten(3, 4).flatten(0, 2))  # [B * t * t, w * w, C]
        x = x.unflatten(0, (-1, tiles, tiles)).unflatten(3, (w, w)).transpose(2, 3)
        x = x.flatten(3, 4).flatten(1, 2)  # [B, g + pad, g + pad, C]
        return x[:, :g, :g] if pad else x


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of ``[B, C, H, W]``."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``[B, C, H, W]`` over its channels."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def build_neck(config: SamConfig) -> nn.Sequential:
    """Build a neck: 1×1 and 3×3 convolutions with norms, ``width`` → ``neck_width`` channels."""
    return nn.Sequential(
        nn.Conv2d(config.width, config.neck_width, 1, bias=False),
        ChannelNorm(config.neck_width, eps=1e-6),
        nn.Conv2d(config.neck_width, config.neck_width, 3, padding=1, bias=False),
        ChannelNorm(config.neck_width, eps=1e-6),
    )


class SamEncoder(ConstantModule):
    """Encoder of normalized pixels; ``output_grid`` is SigLIP's token grid."""

    upsample: Tensor

    def __init__(self, config: SamConfig, output_grid: int) -> None:
        """Create the blocks, necks and convolutions."""
        super().__init__()
        self.grid, self.output_grid = config.grid, output_grid
        self.first_global = config.global_layers[0]
        self.patch_embed = PatchEmbed(config.width, config.patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid, config.grid, config.width))
        self.blocks = nn.ModuleList(
            SamBlock(config, 0 if layer in config.global_layers else config.window_size)
            for layer in range(config.layers)
        )
        self.neck = build_neck(config)
        self.neck_hd = build_neck(config)
        middle, last = config.downsample_widths
        self.downsamples = nn.Sequential(
            nn.Conv2d(config.neck_width, middle, 3, stride=2, padding=1, bias=False),
            nn.Conv2d(middle, last, 3, stride=2, padding=1, bias=False),
        )
        self.hd_alpha = nn.Parameter(torch.zeros(1))
        self.register_constants()

    def constants(self) -> dict[str, Tensor]:
        """Compute the matrix of the upsampling, ``[4 * output_grid, g]``."""
        return {"upsample": bilinear_matrix(self.grid, 4 * self.output_grid, antialias=False)}

    def _branch(self, neck: nn.Module, x: Tensor) -> Tensor:
        """Map ``[B, g, g, C]`` to ``[B, C', output_grid, output_grid]`` through a neck."""
        return self.downsamples(resize(neck(x.permute(0, 3, 1, 2)), self.upsample))

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode ``[B, 3, N, N]`` as ``[B, output_grid**2, downsample_widths[-1]]``."""
        x = self.patch_embed(pixels).permute(0, 2, 3, 1) + self.pos_embed  # [B, g, g, C]
        first_global = x
        for layer, block in enumerate(self.blocks):
            x = block(x)
            if layer == self.first_global:
                first_global = x
        out = self._branch(self.neck, x) + self._branch(self.neck_hd, first_global) * self.hd_alpha
        return out.flatten(2).transpose(1, 2)  # [B, T, C']
