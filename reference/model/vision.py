"""The vision tower and the adaptor, from pixels to image embeddings of the decoder's width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reference.model.config import GELU_APPROXIMATIONS, AdaptorConfig, NormalizationConfig, VisionConfig
from reference.model.constants import ConstantModule
from reference.model.resize import bilinear_matrix, resize
from reference.model.sam import SamEncoder
from reference.model.siglip import SiglipEncoder


class Normalize(ConstantModule):
    """Per-channel normalization of RGB in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: NormalizationConfig) -> None:
        """Create the constants."""
        super().__init__()
        self.config = config
        self.register_constants()

    def constants(self) -> dict[str, Tensor]:
        """Compute ``mean`` and ``std``, ``[1, 3, 1, 1]``."""
        mean, std = torch.tensor(self.config.mean), torch.tensor(self.config.std)
        return {"mean": mean.reshape(1, 3, 1, 1), "std": std.reshape(1, 3, 1, 1)}

    def forward(self, image: Tensor) -> Tensor:
        """Normalize ``[B, 3, N, N]``."""
        return (image - self.mean) / self.std


class VisionEncoder(ConstantModule):
    """SigLIP alone, or SAM at high and SigLIP at low resolution.

    The hybrid tower takes one image in [0, 1], downscales it for the low branch by antialiased
    bilinear interpolation, and normalizes each branch with its own constants.
    """

    low_resize: Tensor

    def __init__(self, config: VisionConfig) -> None:
        """Create the branches."""
        super().__init__()
        self.config = config
        self.low = SiglipEncoder(config.siglip)
        self.low_norm = Normalize(config.low_norm) if config.low_norm else nn.Identity()
        self.high: SamEncoder | None = None
        if config.sam:
            self.high = SamEncoder(config.sam, config.siglip.grid)
            self.high_norm = Normalize(config.high_norm) if config.high_norm else nn.Identity()
        self.register_constants()

    def constants(self) -> dict[str, Tensor]:
        """Compute the matrix that downscales the image for the low branch, if there are two."""
        if self.config.sam is None:
            return {}
        sizes = self.config.sam.image_size, self.config.siglip.image_size
        return {"low_resize": bilinear_matrix(*sizes, antialias=True)}

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Encode pixels ``[B, 3, N, N]``.

        Returns:
            ``(low [B, T, C],)``, or ``(high [B, T, C'], low [B, T, C])`` of the hybrid tower.
        """
        if self.high is None:
            return (self.low(self.low_norm(pixel_values)),)
        high = self.high(self.high_norm(pixel_values))
        low = self.low(self.low_norm(resize(pixel_values, self.low_resize)))
        return high, low


class Adaptor(nn.Module):
    """Adaptor from vision features to embeddings: ``mlp_gelu``, or its split form for two branches.

    The split form projects each branch to half the width and concatenates them, **high first**.
    """

    def __init__(self, config: AdaptorConfig) -> None:
        """Create the layers."""
        super().__init__()
        self.hybrid = config.high_width is not None
        if config.high_width is not None:
            self.high_up_proj = nn.Linear(config.high_width, config.width // 2)
            self.low_up_proj = nn.Linear(config.low_width, config.width // 2)
            layers: list[nn.Module] = []
        else:
            layers = [nn.Linear(config.low_width, config.width)]
        for _ in range(1, config.depth):
            gelu = nn.GELU(approximate=GELU_APPROXIMATIONS[config.activation])
            layers += [gelu, nn.Linear(config.width, config.width)]
        self.layers = nn.Sequential(*layers)

    def forward(self, *features: Tensor) -> Tensor:
        """Map the outputs of ``VisionEncoder`` to embeddings ``[B, T, D]``."""
        if self.hybrid:
            high, low = features
            return self.layers(torch.cat([self.high_up_proj(high), self.low_up_proj(low)], dim=-1))
        (low,) = features
        return self.layers(low)
