"""The chain of a bundle's components: text and images → input embeddings → logits."""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import numpy as np

from runtimes.cache import KVCache
from runtimes.embedding import TokenEmbedding
from runtimes.errors import UserError
from runtimes.images import ImageSource
from runtimes.prefix import StoredPrefix
from runtimes.preprocess import PreprocessSpec, preprocess
from runtimes.session import ComponentSession, DecoderSession
from runtimes.text.tokenizer import Tokenizer, expand_images

PREFILL_CHUNK = 512  # tokens
Key = tuple[str, int]  # ("", token id) or (image digest, index of the image token)


class PromptImage:
    """A decoded image of a prompt; images with the same ``digest`` are the same image."""

    def __init__(self, pixels: np.ndarray) -> None:
        """Keep the preprocessed pixels ``[3, N, N]`` float32."""
        self.digest = hashlib.sha256(pixels.tobytes()).hexdigest()
        self._pixels: np.ndarray | None = pixels

    @property
    def decoded(self) -> bool:
        """Whether the pixels are in memory."""
        return self._pixels is not None

    def decode(self) -> np.ndarray:
        """Return the pixels ``[3, N, N]`` float32; any thread may call this.

        Raises:
            UserError: an encoded image is damaged.
        """
        assert self._pixels is not None
        return self._pixels

    def release(self) -> None:
        """Free pixels that ``decode`` can compute again."""


class EncodedImage(PromptImage):
    """An image of a prompt that is kept as an encoded file and decoded only while it is used.

    A waiting prompt takes no more memory than its files: pixels of 1024 px take 12 MB, whatever the
    size of the file.
    """

    def __init__(self, file: bytes, spec: PreprocessSpec) -> None:
        """Keep the content of an image file and how to preprocess it."""
        self.digest = hashlib.sha256(file).hexdigest()
        self._file, self._spec, self._pixels = file, spec, None

    def decode(self) -> np.ndarray:
        """Decode the file if its pixels are not in memory; see ``PromptImage.decode``."""
        if self._pixels is None:
            self._pixels = preprocess(self._file, self._spec)
        return self._pixels

    def release(self) -> None:
        """Free the pixels; the file is kept."""
        self._pixels = None


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt with its images, before any component has run.

    Args:
        tokens: token ids ``[S]``, images expanded.
        keys: content of each position; equal keys have equal embeddings.
        images: the images by digest, in the order in which they first appear.
    """

    tokens: list[int]
    keys: list[Key]
    images: dict[str, PromptImage]

    def check_fits(self, capacity: int) -> None:
        """Check that the prompt fits into a KV cache.

        Raises:
            UserError: it has more tokens than ``capacity``.
        """
        if len(self.keys) > capacity:
            raise UserError(
                f"The prompt has {len(self.keys)} tokens but the KV cache holds {capacity};"
                " shorten it or open the bundle with a larger capacity."
            )

    def shared_prefix_length(self, keys: Sequence[Key]) -> int:
        """Return the length of the prefix that a cache with ``keys`` already holds.

        At least one token is left to prefill, because its logits are needed.
        """
        shared, limit = 0, min(len(keys), len(self.keys) - 1)
        while shared < limit and keys[shared] == self.keys[shared]:
            shared += 1
        return shared


class Chain:
    """Vision encoder → adaptor → decoder, with a cache of image embeddings."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        preprocessing: PreprocessSpec,
        embedding: TokenEmbedding,
        vision_encoder: ComponentSession,
        adaptor: ComponentSession,
        decoder: DecoderSession,
        prefill_chunk: int = PREFILL_CHUNK,
        max_cached_images: int = 16,
        exact_rows: bool = True,
        concurrent: bool = False,
        separate_devices: bool = False,
        prefix: StoredPrefix | None = None,
    ) -> None:
        """Chain sessions of one bundle.

        Args:
            tokenizer: the bundle's tokenizer and prompt settings.
            preprocessing: how images become pixel values.
            embedding: the table of token embeddings.
            vision_encoder: session of the vision encoder.
            adaptor: session of the adaptor.
            decoder: session of the decoder.
            prefill_chunk: tokens per decoder call in prefill; bounds the memory.
            max_cached_images: number of images whose embeddings are kept, by content.
            exact_rows: whether logits of a multi-token call equal those of single-token calls
                except for float rounding; otherwise there are no speculative tokens.
            concurrent: whether the vision encoder may run in parallel with the decoder, in another
                thread.
            separate_devices: whether the vision encoder and the decoder run on different devices;
                on one, working at the same time takes longer than one after the other.
            prefix: the KV prefix of the system prompt, for this decoder.
        """
        self.tokenizer, self.preprocessing, self.embedding = tokenizer, preprocessing, embedding
        self.vision_encoder, self.adaptor, self.decoder = vision_encoder, adaptor, decoder
        self.prefill_chunk, self.max_cached_images, self.exact_rows = (
            prefill_chunk,
            max_cached_images,
            exact_rows,
        )
        self.concurrent, self.separate_devices = concurrent, separate_devices
        self.prefix, self.images_encoded = prefix, 0
        self._images: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = Lock()  # an encoder may run in parallel with the decoder
        self._embeds_dtype = np.dtype(decoder.contract.inputs[0].dtype)

    @property
    def vocabulary(self) -> int:
        """Number of logits of a token."""
        (logits,) = (spec for spec in self.decoder.contract.outputs if spec.name == "logits")
        return int(logits.shape[-1])

    def with_decoder(self, decoder: DecoderSession, prefix: StoredPrefix | None = None) -> Chain:
        """Return a chain with another decoder; they share the cache of image embeddings.

        Args:
            decoder: the other decoder.
            prefix: the KV prefix of the system prompt, for that decoder.
        """
        other = copy.copy(self)
        other.decoder, other.prefix, other.images_encoded = decoder, prefix, 0
        return other

    def encode_pixels(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Encode ``pixels [B, 3, N, N]`` to vision features by name.

        Images are encoded one at a time: SAM's attention at 1024 px takes gigabytes per image.
        """
        (spec,) = self.vision_encoder.contract.inputs
        outputs = [self.vision_encoder.run({spec.name: image[None].astype(spec.dtype)}) for image in pixels]
        return {name: np.concatenate([output[name] for output in outputs]) for name in outputs[0]}

    def adapt(self, features: dict[str, np.ndarray]) -> np.ndarray:
        """Compute image embeddings ``[B, T, D]`` from vision features."""
        output, *_ = self.adaptor.contract.outputs
        return self.adaptor.run(features)[output.name]

    def encode_image(self, image: PromptImage) -> np.ndarray:
        """Return the embeddings ``[T, D]`` of an image, computed once per content."""
        with self._lock:
            cached = self._images.get(image.digest)
            if cached is not None:
                self._images.move_to_end(image.digest)
                return cached
        embeds: np.ndarray = self.adapt(self.encode_pixels(image.decode()[None]))[0]
        image.release()
        with self._lock:
            self.images_encoded += 1
            self._images[image.digest] = embeds
            if len(self._images) > self.max_cached_images:
                self._images.popitem(last=False)
        return embeds

    def is_encoded(self, image: PromptImage) -> bool:
        """Whether the embeddings of an image are cached, so that it is not decoded again."""
        return image.digest in self._images

    def images_from(self, prompt: Prompt, start: int) -> list[PromptImage]:
        """Return the images at or after position ``start``, in the order of ``embed_stepwise``."""
        placed = {digest for digest, _ in prompt.keys[start:]}
        return [image for digest, image in prompt.images.items() if digest in placed]

    def embed_tokens(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the embeddings ``[..., D]`` of text tokens ``[...]``."""
        return self.embedding.lookup(np.asarray(tokens, dtype=np.int64), self._embeds_dtype)

    def merge(self, tokens: np.ndarray, image_embeds: np.ndarray) -> np.ndarray:
        """Embed tokens, with image tokens replaced by image embeddings.

        Args:
            tokens: ids ``[S]``, images expanded.
            image_embeds: ``[n, T, D]``, in the order of the images.

        Returns:
            ``[S, D]``.
        """
        embeds = self.embed_tokens(tokens)
        places = tokens == self.tokenizer.spec.image_token_id
        embeds[places] = image_embeds.reshape(-1, embeds.shape[1])
        return embeds

    def prepare(self, text: str, images: Sequence[ImageSource | PromptImage]) -> Prompt:
        """Tokenize a prompt and preprocess its images; uses no session, so any thread may call it.

        Raises:
            UserError: placeholders and images do not match, or an image is not readable.
        """
        return self.prepare_tokens(self.tokenizer.encode(text), images)

    def prepare_tokens(self, ids: Sequence[int], images: Sequence[ImageSource | PromptImage]) -> Prompt:
        """Preprocess the images of a prompt that is already tokenized; see ``prepare``."""
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
        """Return the embeddings ``[S - start, D]`` of a prompt's positions from ``start`` on."""
        *_, embeds = self.embed_stepwise(prompt, start)
        return embeds

    def embed_stepwise(self, prompt: Prompt, start: int) -> Iterator[np.ndarray]:
        """Compute ``embed`` image by image; only images at or after ``start`` are encoded.

        Yields:
            the embeddings ``[S - start, D]`` so far; the last ones are complete.
        """
        places: dict[str, list[int]] = {}
        for place, (digest, _) in enumerate(prompt.keys[start:]):
            places.setdefault(digest, []).append(place)
        embeds = self.embed_tokens(prompt.tokens[start:])
        yield embeds
        for image in self.images_from(prompt, start):
            image_places = places[image.digest]
            indices = [prompt.keys[start + place][1] for place in image_places]
            embeds[image_places] = self.encode_image(image)[indices]
            yield embeds

    def embed_prompt(self, text: str, images: Sequence[ImageSource]) -> np.ndarray:
        """Prepare and embed a prompt: ``[S, D]``."""
        return self.embed(self.prepare(text, images))

    def load_prefix(self, prompt: Prompt, cache: KVCache, held: int) -> int:
        """Load the stored prefix into a one-row cache if the prompt begins with it.

        Args:
            prompt: the prompt.
            cache: a cache of one row; it is left alone if it holds as much already, or would have
                to copy all of its memory.
            held: tokens of the prompt that it holds.

        Returns:
            tokens of the prompt that it holds now; at least one is left to prefill.
        """
        if self.prefix is None or not cache.writes_parts:
            return held
        tokens = self.prefix.tokens.tolist()
        if not held < len(tokens) < len(prompt.tokens) or prompt.tokens[: len(tokens)] != tokens:
            return held
        self.prefix.write(cache)
        return len(tokens)

    def prefill_prompt(self, prompt: Prompt, start: int, cache: KVCache) -> np.ndarray:
        """Prefill a prompt from position ``start`` on, and encode its images.

        If sessions may run in parallel, on different devices, the text before the first image is
        prefilled while that image is encoded.

        Returns:
            logits ``[V]`` of the last token.
        """
        places = (place for place in range(start, len(prompt.keys)) if prompt.keys[place][0])
        place = next(places, start)
        if self.concurrent and self.separate_devices and place > start:
            first = prompt.images[prompt.keys[place][0]]
            if not self.is_encoded(first):
                with ThreadPoolExecutor(1) as pool:
                    encoding = pool.submit(self.encode_image, first)
                    self.prefill(self.embed_tokens(prompt.tokens[start:place]), cache)
                    encoding.result()
                start = place
        return self.prefill(self.embed(prompt, start), cache)

    def prefill(self, embeds: np.ndarray, cache: KVCache) -> np.ndarray:
        """Prefill a one-row cache in chunks.

        Args:
            embeds: ``[S, D]``, appended to the cache.
            cache: a cache of one row.

        Returns:
            logits ``[V]`` of the last token.
        """
        logits = np.empty(0)
        for start in range(0, len(embeds), self.prefill_chunk):
            chunk = embeds[None, start : start + self.prefill_chunk]
            logits = self.decoder.decode(chunk, np.array([chunk.shape[1] - 1]), cache)[0, 0]
        return logits

    def decode(self, tokens: np.ndarray, cache: KVCache, first: int = 0) -> np.ndarray:
        """Append tokens to the cache.

        Args:
            tokens: ids ``[B, S]``.
            cache: a cache of B rows.
            first: the first token whose logits are needed.

        Returns:
            logits ``[B, S - first, V]``.
        """
        embeds = self.embed_tokens(tokens)  # [B, S, D]
        return self.decoder.decode(embeds, np.arange(first, embeds.shape[1]), cache)
