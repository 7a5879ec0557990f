"""``Pipeline``: open a bundle and generate answers about images, without torch."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from time import perf_counter
from typing import Any, Union

from runtimes.backends.capabilities import DeclaresConcurrency
from runtimes.backends.registry import load_backend
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.manifest import Artifact
from runtimes.bundle.mixes import device_of
from runtimes.cache import KVCache
from runtimes.chain import Chain, Key, Prompt
from runtimes.decoders import Decoders, find_adapter
from runtimes.embedding import TokenEmbedding
from runtimes.errors import UserError
from runtimes.execution import component_executions
from runtimes.generation.answer import Answer
from runtimes.generation.decoding import SpeculativeSequence, generate
from runtimes.generation.sampling import GenerationOptions
from runtimes.images import ImageSource
from runtimes.session import ComponentSession, SessionOptions
from runtimes.structured.grammars import Grammar, Grammars
from runtimes.text.prompt import Message, PromptText, format_chat, place_images
from runtimes.text.tokenizer import Tokenizer

AnyMessage = Union[Message, Mapping[str, Any]]
GREEDY = GenerationOptions()
MAX_STREAMS = 16  # open at the same time; each has a KV cache


@dataclass
class _Conversation:
    """A KV cache, the content of each of its positions, and whether an open stream uses it."""

    cache: KVCache
    keys: list[Key] = field(default_factory=list)
    open: bool = False


class Pipeline:
    """A model that answers prompts with images, with a KV cache that is reused.

    The cache of the last conversation is kept: a prompt with the same prefix (the next turn of a
    chat, another question about the same image) prefills only what is new.

    Several threads may use one pipeline; they take turns. A call (``chat``, ``generate``,
    ``generate_batch``) runs from start to end, a stream one step at a time. Streams may be
    interleaved, in one thread or in several: each open stream has a KV cache of its own until it
    ends, is closed, or is no longer referenced. At most 16 streams can be open. ``Scheduler`` and
    ``serve`` decode several requests together, which is faster.
    """

    def __init__(
        self,
        chain: Chain,
        system_prompt: str,
        capacity: int,
        max_capacity: int | None = None,
        decoders: Decoders | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        """Use a chain of open sessions; ``Pipeline.open`` opens those of a bundle.

        Args:
            chain: the components.
            system_prompt: the system prompt of conversations without one of their own.
            capacity: tokens of the KV cache.
            max_capacity: the capacity that the decoder was compiled for; None if any is possible.
            decoders: opens decoders for ``with_adapter``.
            grammars: compiles response formats; None makes it.
        """
        self.chain, self.system_prompt, self.capacity = chain, system_prompt, capacity
        self.max_capacity, self._decoders = max_capacity, decoders
        self.grammars = grammars or Grammars(chain.tokenizer, chain.vocabulary)
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
        adapter: str | None = None,
    ) -> Pipeline:
        """Open the components of a bundle.

        Args:
            bundle: the bundle or its folder.
            backend: which of the bundle's backends, or ``mixed``; None selects the first, or the
                first that has the adapter.
            precision: which of the bundle's precisions, or the name of a mix; None selects like
                ``backend``.
            threads: number of CPU threads; None lets the backend choose.
            device: one of the backend's ``devices()``; None is the backend's default. ``cpu`` runs
                the ONNX files that TensorRT engines are built from, in ONNX Runtime. Components can
                have devices of their own: ``vision_encoder=gpu,decoder=cpu``.
            capacity: tokens of the KV cache; None is the bundle's default.
            verify: whether to check the SHA-256 of each file that is loaded.
            adapter: the LoRA adapter of the bundle to answer with; None answers without one.

        Raises:
            UserError: the bundle is damaged, does not have the requested artifacts, or its backend
                is not installed.
        """
        if not isinstance(bundle, Bundle):
            bundle = Bundle.open(bundle)
        manifest = bundle.manifest
        backend, precision = bundle.select(backend, precision, adapter)
        artifacts = bundle.artifacts(backend, precision)
        positions = int(manifest.model["decoder"]["max_positions"])
        if capacity is not None and not 1 <= capacity <= positions:
            raise UserError(f"The capacity must be between 1 and the model's {positions}, got {capacity}.")
        if adapter is not None:
            find_adapter(bundle, artifacts["decoder"], adapter)
        if verify:
            check_files(bundle, backend, precision)
        for artifact in artifacts.values():
            for path in artifact.files:
                bundle.path(path)  # rejects links that lead outside the bundle
        executions = component_executions(bundle, backend, precision, device)
        for state in executions.values():
            if state.kind == "not run":
                raise UserError(f"{backend} {precision} of {bundle.folder} cannot run here: {state.by}.")

        def open_component(component: str) -> ComponentSession:
            options = SessionOptions(threads, device_of(device, component))
            item, contract = artifacts[component], bundle.contract(component, backend, precision)
            return load_backend(item.backend).open_component(bundle.path(item.files[0]), contract, options)

        decoders = Decoders(
            bundle, artifacts["decoder"], SessionOptions(threads, device_of(device, "decoder")), verify
        )
        chain = Chain(
            Tokenizer(bundle.path("tokenizer/tokenizer.json"), manifest.prompt),
            manifest.preprocessing,
            TokenEmbedding(bundle.path(manifest.token_embedding)),
            open_component("vision_encoder"),
            open_component("adaptor"),
            decoders.open(adapter),
            exact_rows=artifacts["decoder"].exact_rows,
            concurrent=_may_run_in_parallel(artifacts.values()),
            separate_devices=executions["vision_encoder"].device != executions["decoder"].device,
            prefix=decoders.prefix(adapter),
        )
        max_capacity = compiled_capacity(artifacts["decoder"], device_of(device, "decoder"))
        default = min(manifest.default_capacity, max_capacity or manifest.default_capacity)
        return cls(chain, manifest.prompt.system_prompt, capacity or default, max_capacity, decoders)

    def with_adapter(self, name: str | None) -> Pipeline:
        """Return a pipeline that answers with another adapter of the bundle; None is without one.

        Both take turns on the same sessions and share the image embeddings. Each has KV caches of
        its own, because what they hold depends on the adapter.

        Raises:
            UserError: there is no such adapter, or it cannot be opened.
        """
        if self._decoders is None:
            raise UserError("This pipeline has no bundle with adapters; use Pipeline.open.")
        chain = self.chain.with_decoder(self._decoders.open(name), self._decoders.prefix(name))
        other = Pipeline(
            chain, self.system_prompt, self.capacity, self.max_capacity, self._decoders, self.grammars
        )
        other._turn = self._turn
        return other

    def chat(
        self,
        messages: Sequence[AnyMessage] | str,
        images: Sequence[ImageSource] = (),
        options: GenerationOptions = GREEDY,
    ) -> Answer:
        """Answer the last user message of a conversation.

        Args:
            messages: messages (``Message``, or dictionaries with ``role`` and ``content``), or one
                question as a string. Contents are text, even if they spell a control token. In a
                user's text, each ``<image_placeholder>`` is the position of an image if there are
                as many as images; without placeholders, the images come before the first user
                message. Content parts give exact positions: ``["Compare", IMAGE, "and", IMAGE]``,
                or dictionaries of type ``text`` and ``image``. A system message at the beginning
                replaces the system prompt.
            images: one per position, in order.
            options: how to generate.

        Raises:
            UserError: images and their positions do not match, or the prompt exceeds the capacity.
        """
        with self._turn:
            return self._last(self.stream_chat(messages, images, options))

    def stream_chat(
        self,
        messages: Sequence[AnyMessage] | str,
        images: Sequence[ImageSource] = (),
        options: GenerationOptions = GREEDY,
    ) -> Generator[tuple[str, Answer]]:
        """Answer like ``chat``, as a stream.

        Yields:
            each new piece of text, and the answer so far.
        """
        images = _as_list(images)
        return self.stream(self.format(messages, len(images)), images, options)

    def format(self, messages: Sequence[AnyMessage] | str, images: int) -> PromptText:
        """Format the prompt of a conversation with a number of images.

        See ``place_images`` for the positions of the images.

        Raises:
            UserError: the conversation does not end with a user message, or images and their
                positions do not match.
        """
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
        """Continue a raw prompt; see ``chat`` for the arguments.

        In a raw prompt, every spelled control token is that token, including
        ``<image_placeholder>``: do not build it from untrusted text. The result of ``format`` keeps
        text and control tokens apart.
        """
        with self._turn:
            return self._last(self.stream(prompt, images, options))

    def stream(
        self, prompt: str, images: Sequence[ImageSource] = (), options: GenerationOptions = GREEDY
    ) -> Generator[tuple[str, Answer]]:
        """Continue a raw prompt like ``generate``, as a stream.

        Yields:
            each new piece of text, and the answer so far.

        Raises:
            UserError: see ``generate``; also if too many streams are open.
        """
        started = perf_counter()
        prepared = self.chain.prepare(prompt, _as_list(images))
        grammar = self._check_fits(prepared, options)
        with self._turn:
            conversation = self._conversation()
            conversation.open = True
        steps = self._steps(prepared, conversation, options, started, grammar)
        try:
            while True:
                with self._turn:
                    step = next(steps, None)
                if step is None:
                    return
                yield step
        finally:
            conversation.open = False

    def _check_fits(self, prompt: Prompt, options: GenerationOptions) -> Grammar | None:
        """Check that a prompt and its answer fit into the KV cache; return the compiled format."""
        prompt.check_fits(self.capacity)
        return self.grammars.fitting(options.format, len(prompt.keys), self.capacity)

    def _steps(
        self,
        prompt: Prompt,
        conversation: _Conversation,
        options: GenerationOptions,
        started: float,
        grammar: Grammar | None,
    ) -> Iterator[tuple[str, Answer]]:
        cache, shared = conversation.cache, prompt.shared_prefix_length(conversation.keys)
        cache.rewind(cache.length - shared)
        # If prefill fails, only the shared prefix is known to be in the cache.
        conversation.keys = prompt.keys[:shared]
        shared = self.chain.load_prefix(prompt, cache, shared)
        conversation.keys = prompt.keys[:shared]
        logits = self.chain.prefill_prompt(prompt, shared, cache)
        conversation.keys = list(prompt.keys)
        sequence = SpeculativeSequence(self.chain, prompt.tokens, options, started, self.capacity, grammar)
        answer = sequence.answer
        answer.reused_tokens = shared
        for (text,) in generate(self.chain, [logits], cache, [sequence]):
            written = answer.tokens[: cache.length - len(prompt.keys)]
            conversation.keys = prompt.keys + [("", token) for token in written]
            yield text, answer

    def generate_batch(
        self,
        requests: Sequence[tuple[str, Sequence[ImageSource]]],
        options: GenerationOptions = GREEDY,
    ) -> list[Answer]:
        """Continue several prompts together; the answers equal those of one prompt at a time."""
        if not requests:
            return []
        started = perf_counter()
        prompts = [self.chain.prepare(text, _as_list(images)) for text, images in requests]
        grammars = [self._check_fits(prompt, options) for prompt in prompts]
        with self._turn:
            return self._batch(prompts, options, started, grammars)

    def _batch(
        self,
        prompts: Sequence[Prompt],
        options: GenerationOptions,
        started: float,
        grammars: Sequence[Grammar | None],
    ) -> list[Answer]:
        cache = self.chain.decoder.new_cache(len(prompts), self.capacity)
        logits = []
        for row, prompt in enumerate(prompts):
            start = self.chain.load_prefix(prompt, cache.row(row), 0)
            logits.append(self.chain.prefill_prompt(prompt, start, cache.row(row)))
        sequences = [
            SpeculativeSequence(self.chain, prompt.tokens, options, started, self.capacity, grammar)
            for prompt, grammar in zip(prompts, grammars, strict=True)
        ]
        for _ in generate(self.chain, logits, cache, sequences):
            pass
        return [sequence.answer for sequence in sequences]

    def reset(self) -> None:
        """Forget the last conversation; the memory of its cache is kept."""
        with self._turn:
            for conversation in self._conversations:
                if not conversation.open:
                    conversation.keys = []

    def _conversation(self) -> _Conversation:
        """Return the last unused conversation or a new one; drop other unused ones."""
        unused = [conversation for conversation in self._conversations if not conversation.open][-1:]
        self._conversations = [conversation for conversation in self._conversations if conversation.open]
        if len(self._conversations) >= MAX_STREAMS:
            raise UserError(f"{MAX_STREAMS} streams of this pipeline are open; finish or close one first.")
        conversation = unused[0] if unused else _Conversation(self.chain.decoder.new_cache(1, self.capacity))
        self._conversations.append(conversation)
        return conversation

    @staticmethod
    def _last(pieces: Iterator[tuple[str, Answer]]) -> Answer:
        *_, (_, answer) = pieces
        return answer


def check_files(bundle: Bundle, backend: str, precision: str) -> None:
    """Check the SHA-256 of all files that a pipeline loads.

    Raises:
        UserError: a file differs from the manifest.
    """
    paths = [path for item in bundle.artifacts(backend, precision).values() for path in item.files]
    bundle.check([*paths, bundle.manifest.token_embedding, "tokenizer/tokenizer.json"])


def _may_run_in_parallel(artifacts: Iterable[Artifact]) -> bool:
    """Whether the sessions of artifacts may run at the same time, in several threads."""
    modules = [load_backend(item.backend) for item in artifacts]
    return all(isinstance(module, DeclaresConcurrency) and module.CONCURRENT for module in modules)


def compiled_capacity(decoder: Artifact, device: str | None) -> int | None:
    """Return the tokens of the KV cache that a decoder was compiled for; None if it accepts any.

    A TensorRT engine has the capacity that it was built for; on ``cpu``, its ONNX file runs.
    """
    return decoder.engine.capacity if decoder.engine and device != "cpu" else decoder.capacity


def _as_list(images: Sequence[ImageSource] | ImageSource) -> Sequence[ImageSource]:
    """Accept a single image instead of a list of images."""
    return images if isinstance(images, (list, tuple)) else [images]  # type: ignore[list-item]
