"""The service that answers with models in this process.

A request leases a model, reads its images, queues its prompt in the scheduler and receives the
steps.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from time import perf_counter

from dsvl_export.serving.errors import INTERNAL, RequestError, unavailable
from dsvl_export.serving.images import ImageLimits, check_image, image_file, is_remote
from dsvl_export.serving.models import (
    MAX_SLOTS,
    Model,
    ModelOptions,
    Models,
    runnable_models,
)
from dsvl_export.serving.protocol import Conversation
from dsvl_export.serving.response_formats import name_parameters
from dsvl_export.serving.service import (
    TOKENIZER,
    AnswerStream,
    BundleWatch,
    ModelRequest,
    ModelStatus,
    Service,
    adapter_model,
    split_model,
)
from dsvl_export.serving.text import TextEncoder
from runtimes.bundle.bundle import Bundle
from runtimes.chain import Chain, EncodedImage, Prompt
from runtimes.job import BusyError, DeadlineError, Job, Step
from runtimes.structured.grammars import Grammar
from runtimes.structured.response_format import FormatError
from runtimes.text.prompt import Message, format_chat

DECODED_AT_ONCE = 2  # images that are decoded at a time
DOWNLOADED_AT_ONCE = 8  # images that are downloaded at a time
MAX_LARGEST_REQUESTS = 8  # requests of the maximum size whose image files are in memory at a time
MAX_TOKEN_CHARACTERS = 128  # of one token; a longer prompt is refused before it is tokenized

log = logging.getLogger(__name__)


class LocalService(Service):
    """Answers with models in this process."""

    def __init__(self, bundle: Bundle, options: ModelOptions, images: ImageLimits) -> None:
        """Open the first model.

        Raises:
            UserError: as ``Models``.
        """
        watch = BundleWatch(bundle)
        self.models = Models(bundle, options)
        (first,) = self.models.open_models
        bases = runnable_models(bundle, options.device)
        adapters = [
            adapter_model(base, adapter, first.name)
            for base in bases
            for adapter in bundle.adapters(*base.split("/"))
        ]
        names = bases + adapters
        super().__init__(bundle, watch, first.pipeline.chain.tokenizer, names, first.name)
        self.images = images
        # Requests that are read and not queued yet.
        self.max_preparing, self.preparing = options.queue + 2 * MAX_SLOTS, 0
        self.text = TextEncoder(bundle.path(TOKENIZER), self.tokenizer)
        self.decoders = ThreadPoolExecutor(DECODED_AT_ONCE, "images")
        self.downloaders = ThreadPoolExecutor(DOWNLOADED_AT_ONCE, "downloads")
        self.opener = ThreadPoolExecutor(1, "opener")  # opens one model at a time
        self.compilers = ThreadPoolExecutor(1, "formats")  # compiles one response format at a time
        self.held = 0  # bytes of the image files of all requests

    @property
    def open_models(self) -> list[str]:
        """Names of the open models."""
        return self.models.open_names

    def submit(self, request: ModelRequest) -> LocalAnswerStream:
        """Return the answer to a request; see ``Service.submit``."""
        return LocalAnswerStream(self, request)

    def model_status(self) -> Iterable[ModelStatus]:
        """Yield the state of the open models."""
        for model in self.models.open_models:
            scheduler = model.scheduler
            yield ModelStatus(
                model.name, scheduler.running, scheduler.waiting, scheduler.slots,
                scheduler.chain.images_encoded,
            )  # fmt: skip

    def close(self) -> None:
        """Finish all requests; end the tokenizer and the threads."""
        self.models.close()
        self.text.close()
        for threads in (self.decoders, self.downloaders, self.opener, self.compilers):
            threads.shutdown()


class LocalAnswerStream(AnswerStream):
    """The answer of a model in this process."""

    def __init__(self, service: LocalService, request: ModelRequest) -> None:
        """Prepare an answer.

        Raises:
            RequestError: as ``Service.submit``.
        """
        self.model = service.resolve_model(request.model)
        self._service, self._request = service, request
        self._leased: Model | None = None
        self._job: Job | None = None
        self._held = 0  # bytes of its image files
        self._grammar: Grammar | None = None  # of its response format
        self._steps: asyncio.Queue[Step | Exception] = asyncio.Queue()

    async def _begin(self) -> Step:
        await self._queue()
        return await self.next()

    async def _queue(self) -> None:
        """Lease the model, read the request and queue its prompt, all within its time."""
        service, deadline = self._service, perf_counter() + self._request.seconds
        if service.preparing >= service.max_preparing:
            raise BusyError(f"{service.max_preparing} requests are being read; try again in a moment.")
        service.preparing += 1
        try:
            prompt = await asyncio.wait_for(self._prepare(), self._request.seconds)
        except asyncio.TimeoutError as error:
            raise DeadlineError("The request was not read in time; the server is busy.") from error
        finally:
            service.preparing -= 1
        self._submit(prompt, deadline - perf_counter())

    async def next(self) -> Step:
        """Return all that was generated since the last call, as one step."""
        step = await self._steps.get()
        if isinstance(step, (DeadlineError, FormatError)):
            raise step
        if isinstance(step, Exception):
            log.error("an answer failed", exc_info=step)
            raise RequestError(500, INTERNAL, "server_error") from step
        while not self._steps.empty():
            more = self._steps.get_nowait()
            if isinstance(more, Exception):
                self._steps.put_nowait(more)
                break
            step = Step(step.text + more.text, step.logprobs + more.logprobs, more.answer)
        return step

    def close(self) -> None:
        """Cancel the job, and release the model and the images."""
        if self._job:
            self._job.cancel()
            self._job = None
        if self._leased:
            self._service.models.release(self._leased)
            self._leased = None
        self._service.held -= self._held
        self._held = 0

    async def _prepare(self) -> Prompt:
        """Lease the model, check the length of the prompt, tokenize it and read its images."""
        service, models = self._service, self._service.models
        while (model := models.lease(self.model)) is None:
            await asyncio.get_running_loop().run_in_executor(service.opener, models.ensure, self.model)
        self._leased = model
        chain, capacity = model.pipeline.chain, model.scheduler.capacity
        conversation = self._request.conversation
        spec = chain.tokenizer.spec
        text = format_chat(*with_tools(conversation, model.pipeline.system_prompt), spec.template)
        min_tokens = len(text) // MAX_TOKEN_CHARACTERS + len(conversation.urls) * spec.image_tokens
        if min_tokens > capacity:
            raise RequestError(
                400,
                f"The prompt has at least {min_tokens} tokens but the KV cache holds {capacity}; shorten it.",
            )
        self._request = replace(self._request, conversation=Conversation())  # frees its data URLs
        images = [
            await self._read_image(chain, url, f"image {number}")
            for number, url in enumerate(conversation.urls, 1)
        ]
        prompt = chain.prepare_tokens(await service.text.encode(text), images)
        if self._request.generation.format:
            try:
                self._grammar = await asyncio.get_running_loop().run_in_executor(
                    service.compilers, model.scheduler.grammars.fitting, self._request.generation.format,
                    len(prompt.keys), capacity,
                )  # fmt: skip
            except FormatError as error:
                if conversation.tools:
                    raise RequestError(400, name_parameters(str(error)), param="tools") from error
                raise
        return prompt

    async def _read_image(self, chain: Chain, url: str, where: str) -> EncodedImage:
        """Read and check the file of an image; the images of all requests share the threads."""
        service, loop = self._service, asyncio.get_running_loop()
        threads = service.downloaders if is_remote(url) else service.decoders
        file = await loop.run_in_executor(threads, image_file, url, service.images, where)
        self._hold(len(file))
        return await loop.run_in_executor(
            service.decoders, validate_image, chain, file, service.images, where
        )

    def _hold(self, size: int) -> None:
        """Count the bytes of an image file; raise RequestError if there are too many."""
        service, max_bytes = self._service, self._service.images.bytes
        if self._held + size > max_bytes:
            raise RequestError(
                400, f"The images of the request have more than {max_bytes} bytes.", param="messages"
            )
        if service.held + size > MAX_LARGEST_REQUESTS * max_bytes:
            raise unavailable("Too many large images are waiting; try again in a moment.")
        self._held += size
        service.held += size

    def _submit(self, prompt: Prompt, seconds: float) -> None:
        """Queue the prompt in the scheduler, which delivers the steps to this event loop."""
        loop, steps = asyncio.get_running_loop(), self._steps

        def deliver(step: Step | Exception) -> None:
            loop.call_soon_threadsafe(steps.put_nowait, step)

        assert self._leased
        _, adapter = split_model(self.model, self._service.default)
        chain = self._leased.chains[adapter]
        self._job = self._leased.scheduler.submit(
            prompt, self._request.generation, deliver, seconds, self._request.stream, chain, self._grammar
        )


def with_tools(conversation: Conversation, system: str) -> tuple[tuple[Message, ...], str]:
    """Return the messages and the default system prompt, with what is said of the tools.

    It follows the system prompt, or the system message that a conversation begins with.
    """
    turns, text = conversation.turns, conversation.tools
    if not text:
        return turns, system
    if turns and turns[0].role == "system":
        first = Message("system", "\n\n".join([*map(str, turns[0].parts), text]))
        return (first, *turns[1:]), system
    return turns, f"{system}\n\n{text}" if system.strip() else text


def validate_image(chain: Chain, file: bytes, limits: ImageLimits, where: str) -> EncodedImage:
    """Return the image of a file after checking it, unless its embeddings are cached already.

    Raises:
        RequestError: the file is not an image within the limits.
    """
    image = EncodedImage(file, chain.preprocessing)
    if not chain.is_encoded(image):
        check_image(file, limits, where)
    return image
