"""The components of a bundle chained: text and images → input embeddings → logits."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtimes.cache import KVCache
from runtimes.embedding import TokenEmbedding
from runtimes.preprocess import ImageSource, PreprocessSpec, preprocess
from runtimes.session import ComponentSession, DecoderSession
from runtimes.tokenizer import Tokenizer, expand_images

PREFILL_CHUNK = 512  # tokens
Key = tuple[str, int]  # ("", token id) or (image digest, index of the image token)


@dataclass(frozen=True)
class PromptInputs:
    """A prompt ready for the decoder: ``embeds [S, D]`` and, per position, what it stands for."""

    embeds: np.ndarray
    keys: list[Key]
    tokens: list[int]


class Chain:
    """Vision encoder → adaptor → decoder, with the embeddings of recent images kept.

    Args:
        prefill_chunk: tokens per decoder call while a prompt is read; bounds the memory.
        kept_images: image embeddings kept, by content.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        preprocessing: PreprocessSpec,
        embedding: TokenEmbedding,
        vision_encoder: ComponentSession,
        adaptor: ComponentSession,
        decoder: DecoderSession,
        prefill_chunk: int = PREFILL_CHUNK,
        kept_images: int = 16,
    ) -> None:
        self.tokenizer, self.preprocessing, self.embedding = tokenizer, preprocessing, embedding
        self.vision_encoder, self.adaptor, self.decoder = vision_encoder, adaptor, decoder
        self.prefill_chunk, self.kept_images = prefill_chunk, kept_images
        self.images_encoded = 0
        self._images: OrderedDict[str, np.ndarray] = OrderedDict()
        self._embeds_dtype = np.dtype(decoder.contract.inputs[0].dtype)

    def encode_pixels(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """``[B, 3, N, N]`` → the vision features by name.

        One image at a time: the attention of SAM at 1024 px takes gigabytes for each.
        """
        (spec,) = self.vision_encoder.contract.inputs
        each = [self.vision_encoder.run({spec.name: one[None].astype(spec.dtype)}) for one in pixels]
        return {name: np.concatenate([features[name] for features in each]) for name in each[0]}

    def adapt(self, features: dict[str, np.ndarray]) -> np.ndarray:
        """Vision features → ``[B, T, D]`` image embeddings."""
        output, *_ = self.adaptor.contract.outputs
        return self.adaptor.run(features)[output.name]

    def encode_image(self, image: ImageSource) -> tuple[str, np.ndarray]:
        """Digest of the preprocessed image and its ``[T, D]`` embeddings, computed once per content."""
        pixels = preprocess(image, self.preprocessing)
        digest = hashlib.sha256(pixels.tobytes()).hexdigest()
        if digest not in self._images:
            self._images[digest] = self.adapt(self.encode_pixels(pixels[None]))[0]
            self.images_encoded += 1
        self._images.move_to_end(digest)
        embeds = self._images[digest]
        if len(self._images) > self.kept_images:
            self._images.popitem(last=False)
        return digest, embeds

    def embed_tokens(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """``[..., D]`` embeddings of text tokens."""
        return self.embedding.lookup(np.asarray(tokens, dtype=np.int64), self._embeds_dtype)

    def merge(self, tokens: np.ndarray, image_embeds: np.ndarray) -> np.ndarray:
        """``[S, D]``: tokens ``[S]`` with the image tokens replaced, in order, by ``[n, T, D]``."""
        embeds = self.embed_tokens(tokens)
        places = tokens == self.tokenizer.spec.image_token_id
        embeds[places] = image_embeds.reshape(-1, embeds.shape[1])
        return embeds

    def embed_prompt(self, text: str, images: Sequence[ImageSource]) -> PromptInputs:
        """Tokenize, encode the images and put them in their places.

        Raises:
            UserError: placeholders and images do not match, or an image cannot be read.
        """
        spec = self.tokenizer.spec
        tokens = expand_images(self.tokenizer.encode(text), spec, len(images))
        embeds = self.embed_tokens(tokens)
        keys: list[Key] = [("", int(token)) for token in tokens]
        slots = np.flatnonzero(tokens == spec.image_token_id).reshape(len(images), spec.image_tokens)
        for image, places in zip(images, slots, strict=True):
            digest, image_embeds = self.encode_image(image)
            embeds[places] = image_embeds
            for index, place in enumerate(places):
                keys[place] = (digest, index)
        return PromptInputs(embeds, keys, tokens.tolist())

    def prefill(self, embeds: np.ndarray, cache: KVCache) -> np.ndarray:
        """Read ``[S, D]`` into a one-row cache, in chunks; logits ``[V]`` after the last token."""
        logits = np.empty(0)
        for start in range(0, len(embeds), self.prefill_chunk):
            chunk = embeds[None, start : start + self.prefill_chunk]
            logits = self.decoder.decode(chunk, np.array([chunk.shape[1] - 1]), cache)[0, 0]
        return logits

    def decode(self, tokens: np.ndarray, cache: KVCache) -> np.ndarray:
        """``tokens [B, S]`` behind what the cache holds → the logits after each, ``[B, S, V]``."""
        embeds = self.embed_tokens(tokens)  # [B, S, D]
        return self.decoder.decode(embeds, np.arange(embeds.shape[1]), cache)
