"""The complete reference model, as its components."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reference.model.config import ModelConfig
from reference.model.decoder import Decoder
from reference.model.vision import Adaptor, VisionEncoder


class DeepSeekVL(nn.Module):
    """DeepSeek-VL (arXiv 2403.05525) or Janus: four components, named as in the contracts."""

    def __init__(self, config: ModelConfig) -> None:
        """Create the components."""
        super().__init__()
        self.config = config
        self.vision_encoder = VisionEncoder(config.vision)
        self.adaptor = Adaptor(config.adaptor)
        self.token_embedding = nn.Embedding(config.decoder.vocab_size, config.decoder.width)
        self.decoder = Decoder(config.decoder)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Encode preprocessed pixels ``[B, 3, N, N]`` as image embeddings ``[B, T, D]``."""
        return self.adaptor(*self.vision_encoder(pixel_values))

    def merge(self, input_ids: Tensor, image_embeds: Tensor, image_token_id: int) -> Tensor:
        """Embed tokens ``[B, S]``; image tokens get ``image_embeds [N, T, D]`` in order.

        Returns:
            ``[B, S, D]``.
        """
        embeds = self.token_embedding(input_ids)
        mask = (input_ids == image_token_id).unsqueeze(-1)
        return embeds.masked_scatter(mask, image_embeds.to(embeds.dtype))

    def logits(self, inputs_embeds: Tensor) -> Tensor:
        """Compute teacher-forced logits ``[B, S, V]`` float32 from embeddings ``[B, S, D]``."""
        batch, length = inputs_embeds.shape[:2]
        rows = torch.arange(length, device=inputs_embeds.device)
        cache = self.decoder.new_cache(batch, length)
        return self.decoder(inputs_embeds, rows.expand(batch, length), rows, cache)
