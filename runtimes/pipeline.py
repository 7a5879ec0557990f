"""``Pipeline``: open a bundle and ask it about images. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from time import perf_counter
from typing import Any, Union

from runtimes.backends.registry import load_backend
from runtimes.bundle.bundle import Artifact, Bundle
from runtimes.cache import KVCache, cache_bytes
from runtimes.chain import Chain, Key, Prompt
from runtimes.embedding import TokenEmbedding
from runtimes.errors import UserError
from runtimes.generation.decoding import Answer, Decoding, generate
from runtimes.generation.sampling import GenerationOptions
from runtimes.images import ImageSource
from runtimes.memory import widening
from runtimes.session import SessionOptions
from runtimes.text.prompt import Message, PromptText, format_chat, place_images
from runtimes.text.tokenizer import Tokenizer

AnyMessage = Union[Message, Mapping[str, Any]]
GREEDY = GenerationOptions()
PARTS = ("vision_encoder", "adaptor", "decoder")  # components that a session runs


MOST_STREAMS = 16  # open at once; each has a KV cache


@dataclass
class _Conversation:
    """A KV cache, what it holds, position by position, and whether an open stream uses it."""

    cache: KVCache
    keys: list[Key] = field(default_factory=list)
    open: bool = False


class Pipeline:
    """A model that answers: components of one backend and precision, and a KV cache that is reused.

    The cache of the last conversation is kept: a prompt that begins like the last one (the next
    turn of a chat, another question about the same image) prefills only what is new.

    Several threads may use one pipeline. They take turns: a call (``chat``, ``generate``,
    ``generate_batch``) runs from its beginning to its end, a stream one step at a time. Streams may be
    interleaved, in one thread or in several: each open stream has a KV cache of its own until it ends, is
    closed, or is no longer referenced. At most 16 can be open. ``Scheduler`` and ``serve`` decode several
    requests together, which is faster.

    Args:
        capacity: tokens of that cache.
        longest: the most that a cache can have, where the decoder was compiled for so many.
    """

    def __init__(self, chain: Chain, system_prompt: str, capacity: int, longest: int | None = None) -> None:
        self.chain, self.system_prompt, self.capacity = chain, system_prompt, capacity
        self.longest = longest
        self._conversations: list[_Conversation] = []  # of open streams, and the last one
        self._turn = RLock()  # sessions run one call at a time

    @classmethod
    def open(
        cls,
        bundle: str | Path | Bundle,
        backend: str | None = None,
        precision: str | None = None,
        *,
        threads: int | None = None,
        device: str | None = None,
        capacity: int | None = None,
        verify: bool = True,
    ) -> Pipeline:
        """Open the components of a bundle.

        Args:
            bundle: the bundle or its folder.
            backend: which of the bundle's backends; None selects the first.
            precision: which of the bundle's precisions; None selects the first.
            threads: number of CPU threads; None lets the backend choose.
            device: one of the backend's ``devices()``; None is the backend's default. ``cpu`` runs
                the ONNX files that TensorRT engines are built from, in ONNX Runtime.
            capacity: tokens of the KV cache; None is the bundle's default.
            verify: whether to check the SHA-256 of each file that is loaded.

        Raises:
            UserError: the bundle is damaged, does not have the requested artifacts, or its backend
                is not installed.
        """
        if not isinstance(bundle, Bundle):
            bundle = Bundle.open(bundle)
        manifest = bundle.manifest
        backend, precision = bundle.select(backend, precision)
        artifacts = {part: bundle.artifact(part, backend, precision) for part in PARTS}
        positions = int(manifest.model["decoder"]["max_positions"])
        if capacity is not None and not 1 <= capacity <= positions:
            raise UserError(f"The capacity must lie between 1 and the model's {positions}, got {capacity}.")
        if verify:
            check_files(bundle, backend, precision)
        for artifact in artifacts.values():
            for path in artifact.files:
                bundle.path(path)  # links that lead outside are checked in any case
        module, options = load_backend(backend), SessionOptions(threads, device)
        for artifact in artifacts.values():
            state = module.execution(artifact, device)
            if state.kind == "not run":
                raise UserError(f"{backend} {precision} of {bundle.folder} cannot run here: {state.by}.")
        contracts = manifest.contracts[precision]
        files = {part: bundle.path(artifact.files[0]) for part, artifact in artifacts.items()}
        chain = Chain(
            Tokenizer(bundle.path("tokenizer/tokenizer.json"), manifest.prompt),
            manifest.preprocessing,
            TokenEmbedding(bundle.path(manifest.token_embedding)),
            module.open_component(files["vision_encoder"], contracts["vision_encoder"], options),
            module.open_component(files["adaptor"], contracts["adaptor"], options),
            module.open_decoder(files["decoder"], contracts["decoder"], options),
            exact_rows=artifacts["decoder"].exact_rows,
        )
        longest = compiled_capacity(artifacts["decoder"], device)
        most = min(manifest.default_capacity, longest or manifest.default_capacity)
        return cls(chain, manifest.prompt.system_prompt, capacity or most, longest)

    def chat(
        self,
        messages: Sequence[AnyMessage] | str,
        images: Sequence[ImageSource] = (),
        options: GenerationOptions = GREEDY,
    ) -> Answer:
        """Answer the last user message of a conversation.

        Args:
            messages: messages (``Message``, or dictionaries with ``role`` and ``content``), or one
                question as a string. Contents are text, also where they spell a control token. In a
                user's text, each ``<image_placeholder>`` is the place of an image where there are as
                many as images; without any, the images come before the first user message. A content of
                parts places them exactly: ``["Compare", IMAGE, "and", IMAGE]``, or dictionaries of type
                ``text`` and ``image``. A system message at the beginning replaces the system prompt.
            images: one per place, in order.

        Raises:
            UserError: images and their places do not match, or the prompt exceeds the capacity.
        """
        with self._turn:
            return self._last(self.stream_chat(messages, images, options))

    def stream_chat(
        self,
        messages: Sequence[AnyMessage] | str,
        images: Sequence[ImageSource] = (),
        options: GenerationOptions = GREEDY,
    ) -> Iterator[tuple[str, Answer]]:
        """As ``chat``, yielding each new piece of text with the answer so far."""
        images = _listed(images)
        return self.stream(self.format(messages, len(images)), images, options)

    def format(self, messages: Sequence[AnyMessage] | str, images: int) -> PromptText:
        """The prompt of a conversation with a number of images; see ``place_images`` for where they go."""
        if isinstance(messages, str):
            messages = [Message("user", messages)]
        turns = [item if isinstance(item, Message) else Message.from_dict(item) for item in messages]
        if not turns or turns[-1].role != "user":
            raise UserError("The conversation must end with a user message.")
        template = self.chain.tokenizer.spec.template
        return format_chat(place_images(turns, images), self.system_prompt, template)

    def generate(
        self, prompt: str, images: Sequence[ImageSource] = (), options: GenerationOptions = GREEDY
    ) -> Answer:
        """Continue a raw prompt; see ``chat`` for the rest.

        In a raw prompt, every control token that is spelled is that token, ``<image_placeholder>`` included:
        do not build it from other people's text. What ``format`` returns keeps text and control tokens apart.
        """
        with self._turn:
            return self._last(self.stream(prompt, images, options))

    def stream(
        self, prompt: str, images: Sequence[ImageSource] = (), options: GenerationOptions = GREEDY
    ) -> Iterator[tuple[str, Answer]]:
        """As ``generate``, yielding each new piece of text with the answer so far.

        Raises:
            UserError: as ``generate``; also where too many streams are open.
        """
        started = perf_counter()
        asked = self.chain.prepare(prompt, _listed(images))
        asked.check_fits(self.capacity)
        with self._turn:
            conversation = self._conversation()
            conversation.open = True
        steps = self._steps(asked, conversation, options, started)
        try:
            while True:
                with self._turn:
                    step = next(steps, None)
                if step is None:
                    return
                yield step
        finally:
            conversation.open = False

    def _steps(
        self, asked: Prompt, conversation: _Conversation, options: GenerationOptions, started: float
    ) -> Iterator[tuple[str, Answer]]:
        """Each new piece of text with the answer so far."""
        cache, shared = conversation.cache, asked.shared_with(conversation.keys)
        cache.rewind(cache.length - shared)
        # Until the prompt is in, the cache vouches only for what it shares with the last one.
        conversation.keys = asked.keys[:shared]
        logits = self.chain.prefill(self.chain.embed(asked, shared), cache)
        conversation.keys = list(asked.keys)
        decoding = Decoding(self.chain, asked.tokens, options, started)
        answer = decoding.writer.answer
        answer.reused_tokens = shared
        for (piece,) in generate(self.chain, [logits], cache, [decoding]):
            written = answer.tokens[: cache.length - len(asked.keys)]
            conversation.keys = asked.keys + [("", token) for token in written]
            yield piece, answer

    def generate_batch(
        self,
        requests: Sequence[tuple[str, Sequence[ImageSource]]],
        options: GenerationOptions = GREEDY,
    ) -> list[Answer]:
        """Continue several prompts at once; the answers equal those of one prompt at a time."""
        if not requests:
            return []
        started = perf_counter()
        prompts = [self.chain.prepare(text, _listed(images)) for text, images in requests]
        for prompt in prompts:
            prompt.check_fits(self.capacity)
        with self._turn:
            return self._batch(prompts, options, started)

    def _batch(self, prompts: Sequence[Prompt], options: GenerationOptions, started: float) -> list[Answer]:
        cache = self.chain.decoder.new_cache(len(prompts), self.capacity)
        logits = [
            self.chain.prefill(self.chain.embed(prompt), cache.row(row)) for row, prompt in enumerate(prompts)
        ]
        decodings = [Decoding(self.chain, prompt.tokens, options, started) for prompt in prompts]
        for _ in generate(self.chain, logits, cache, decodings):
            pass
        return [decoding.writer.answer for decoding in decodings]

    def reset(self) -> None:
        """Forget the last conversation; the cache's memory is kept."""
        with self._turn:
            for conversation in self._conversations:
                if not conversation.open:
                    conversation.keys = []

    def _conversation(self) -> _Conversation:
        """The last conversation that no open stream uses, or a new one; other unused ones are dropped."""
        unused = [each for each in self._conversations if not each.open][-1:]
        self._conversations = [each for each in self._conversations if each.open]
        if len(self._conversations) >= MOST_STREAMS:
            raise UserError(f"{MOST_STREAMS} streams of this pipeline are open; finish or close one first.")
        conversation = unused[0] if unused else _Conversation(self.chain.decoder.new_cache(1, self.capacity))
        self._conversations.append(conversation)
        return conversation

    @staticmethod
    def _last(pieces: Iterator[tuple[str, Answer]]) -> Answer:
        *_, (_, answer) = pieces
        return answer


def check_files(bundle: Bundle, backend: str, precision: str) -> None:
    """The SHA-256 of all that a pipeline loads; raises UserError where one is another."""
    paths = [path for part in PARTS for path in bundle.artifact(part, backend, precision).files]
    bundle.check([*paths, bundle.manifest.token_embedding, "tokenizer/tokenizer.json"])


def compiled_capacity(decoder: Artifact, device: str | None) -> int | None:
    """Tokens of the KV cache that a decoder was compiled for; None where it takes any.

    An engine for the GPU holds what it was built for; on ``cpu``, its ONNX file runs instead.
    """
    return decoder.engine.capacity if decoder.engine and device != "cpu" else decoder.capacity


def needed_memory(bundle: Bundle, backend: str, precision: str, capacity: int | None) -> int:
    """Bytes that weights, a KV cache and activations take while a bundle runs on a CPU."""
    contract = bundle.manifest.contracts[precision]["decoder"]
    artifacts = [bundle.artifact(part, backend, precision) for part in PARTS]
    engines = {artifact.engine.file for artifact in artifacts if artifact.engine}
    files = {file for artifact in artifacts for file in artifact.files} - engines
    weights = sum(bundle.manifest.files[file].bytes for file in files)
    usual = min(bundle.manifest.default_capacity, artifacts[-1].capacity or bundle.manifest.default_capacity)
    tokens = capacity or usual
    cache = cache_bytes(contract.states, 1, tokens)
    active = max(item.activation_bytes + tokens * item.activation_bytes_per_token for item in artifacts)
    return widening(backend, contract) * (weights + active) + cache


def _listed(images: Sequence[ImageSource] | ImageSource) -> Sequence[ImageSource]:
    """One image given instead of a list of images."""
    return images if isinstance(images, (list, tuple)) else [images]  # type: ignore[list-item]
