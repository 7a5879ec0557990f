"""The components of a bundle chained: text and images → input embeddings → logits."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np

from runtimes.cache import KVCache
from runtimes.embedding import TokenEmbedding
from runtimes.errors import UserError
from runtimes.images import ImageSource
from runtimes.preprocess import PreprocessSpec, preprocess
from runtimes.session import ComponentSession, DecoderSession
from runtimes.text.tokenizer import Tokenizer, expand_images

PREFILL_CHUNK = 512  # tokens
Key = tuple[str, int]  # ("", token id) or (image digest, index of the image token)


class PromptImage:
    """An image of a prompt, decoded; images of one ``digest`` are the same.

    Args:
        pixels: ``[3, N, N]`` float32, preprocessed.
    """

    def __init__(self, pixels: np.ndarray) -> None:
        self.digest = hashlib.sha256(pixels.tobytes()).hexdigest()
        self._pixels: np.ndarray | None = pixels

    @property
    def decoded(self) -> bool:
        """Whether ``decode`` has nothing to do."""
        return self._pixels is not None

    def decode(self) -> np.ndarray:
        """The pixels ``[3, N, N]`` float32; any thread may call it.

        Raises:
            UserError: an encoded image is damaged.
        """
        assert self._pixels is not None
        return self._pixels

    def release(self) -> None:
        """Forget what ``decode`` can make again."""


class EncodedImage(PromptImage):
    """An image of a prompt that stays an encoded file until its pixels are needed, and after that.

    A prompt that waits takes no more memory than its files: pixels are 12 MB for 1024 px, whatever the file.
    """

    def __init__(self, file: bytes, spec: PreprocessSpec) -> None:
        self.digest = hashlib.sha256(file).hexdigest()
        self._file, self._spec, self._pixels = file, spec, None

    def decode(self) -> np.ndarray:
        if self._pixels is None:
            self._pixels = preprocess(self._file, self._spec)
        return self._pixels

    def release(self) -> None:
        self._pixels = None


@dataclass(frozen=True)
class Prompt:
    """A prompt before anything is computed.

    ``keys`` say what each position of ``tokens`` stands for; ``images`` maps digests to images in the order
    in which they first appear.
    """

    tokens: list[int]
    keys: list[Key]
    images: dict[str, PromptImage]

    def check_fits(self, capacity: int) -> None:
        """Raise UserError where the prompt is longer than a KV cache."""
        if len(self.keys) > capacity:
            raise UserError(
                f"The prompt has {len(self.keys)} tokens but the KV cache holds {capacity};"
                " shorten it or open the bundle with a larger capacity."
            )

    def shared_with(self, keys: Sequence[Key]) -> int:
        """Length of the beginning that a cache with ``keys`` already holds.

        At least one token is left to prefill, since its logits are needed.
        """
        shared, limit = 0, min(len(keys), len(self.keys) - 1)
        while shared < limit and keys[shared] == self.keys[shared]:
            shared += 1
        return shared


class Chain:
    """Vision encoder → adaptor → decoder, with the embeddings of recent images kept.

    Args:
        prefill_chunk: tokens per decoder call while a prompt is read; bounds the memory.
        kept_images: image embeddings kept, by content.
        exact_rows: whether the decoder's logits of several tokens in one call are those of single calls but
            for float rounding; else no drafts are made.
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
        exact_rows: bool = True,
    ) -> None:
        self.tokenizer, self.preprocessing, self.embedding = tokenizer, preprocessing, embedding
        self.vision_encoder, self.adaptor, self.decoder = vision_encoder, adaptor, decoder
        self.prefill_chunk, self.kept_images, self.exact_rows = prefill_chunk, kept_images, exact_rows
        self.images_encoded = 0
        self._images: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = Lock()  # an encoder may run beside the decoder
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

    def encode_image(self, image: PromptImage) -> np.ndarray:
        """``[T, D]`` embeddings of an image, computed once per content."""
        with self._lock:
            known = self._images.get(image.digest)
            if known is not None:
                self._images.move_to_end(image.digest)
                return known
        embeds: np.ndarray = self.adapt(self.encode_pixels(image.decode()[None]))[0]
        image.release()
        with self._lock:
            self.images_encoded += 1
            self._images[image.digest] = embeds
            if len(self._images) > self.kept_images:
                self._images.popitem(last=False)
        return embeds

    def is_encoded(self, image: PromptImage) -> bool:
        """Whether the embeddings of an image are kept, so that it is not decoded again."""
        return image.digest in self._images

    def placed_images(self, prompt: Prompt, start: int) -> list[PromptImage]:
        """Images that have a place from ``start`` on, in the order in which ``embed_stepwise`` takes them."""
        placed = {digest for digest, _ in prompt.keys[start:]}
        return [image for digest, image in prompt.images.items() if digest in placed]

    def embed_tokens(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """``[..., D]`` embeddings of text tokens."""
        return self.embedding.lookup(np.asarray(tokens, dtype=np.int64), self._embeds_dtype)

    def merge(self, tokens: np.ndarray, image_embeds: np.ndarray) -> np.ndarray:
        """``[S, D]``: tokens ``[S]`` with the image tokens replaced, in order, by ``[n, T, D]``."""
        embeds = self.embed_tokens(tokens)
        places = tokens == self.tokenizer.spec.image_token_id
        embeds[places] = image_embeds.reshape(-1, embeds.shape[1])
        return embeds

    def prepare(self, text: str, images: Sequence[ImageSource | PromptImage]) -> Prompt:
        """Tokenize and preprocess; no session is used, so that any thread may do it.

        Raises:
            UserError: placeholders and images do not match, or an image cannot be read.
        """
        return self.prepare_tokens(self.tokenizer.encode(text), images)

    def prepare_tokens(self, ids: Sequence[int], images: Sequence[ImageSource | PromptImage]) -> Prompt:
        """As ``prepare``, of a prompt that is tokenized already."""
        spec = self.tokenizer.spec
        tokens = expand_images(ids, spec, len(images))
        keys: list[Key] = [("", int(token)) for token in tokens]
        slots = np.flatnonzero(tokens == spec.image_token_id).reshape(len(images), spec.image_tokens)
        prepared: dict[str, PromptImage] = {}
        for source, places in zip(images, slots, strict=True):
            if isinstance(source, PromptImage):
                image = source
            else:
                image = PromptImage(preprocess(source, self.preprocessing))
            prepared.setdefault(image.digest, image)
            for index, place in enumerate(places):
                keys[place] = (image.digest, index)
        return Prompt(tokens.tolist(), keys, prepared)

    def embed(self, prompt: Prompt, start: int = 0) -> np.ndarray:
        """Embeddings ``[S - start, D]`` of a prompt's positions from ``start`` on."""
        *_, embeds = self.embed_stepwise(prompt, start)
        return embeds

    def embed_stepwise(self, prompt: Prompt, start: int) -> Iterator[np.ndarray]:
        """As ``embed``, stopping after each image; what is yielded last is complete.

        Only images that have a place behind ``start`` are encoded.
        """
        places: dict[str, list[int]] = {}
        for place, (digest, _) in enumerate(prompt.keys[start:]):
            places.setdefault(digest, []).append(place)
        embeds = self.embed_tokens(prompt.tokens[start:])
        yield embeds
        for image in self.placed_images(prompt, start):
            here = places[image.digest]
            indices = [prompt.keys[start + place][1] for place in here]
            embeds[here] = self.encode_image(image)[indices]
            yield embeds

    def embed_prompt(self, text: str, images: Sequence[ImageSource]) -> np.ndarray:
        """``prepare`` and ``embed``: ``[S, D]``."""
        return self.embed(self.prepare(text, images))

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
