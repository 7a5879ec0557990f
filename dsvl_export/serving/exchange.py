"""Requests to models of this process: a model leased, images read, a prompt queued, steps as they come."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from time import perf_counter

from dsvl_export.serving.errors import INTERNAL, RequestError, unavailable
from dsvl_export.serving.images import ImageLimits, check_image, image_file, is_remote
from dsvl_export.serving.models import MOST_SLOTS, Model, ModelOptions, Models, askable
from dsvl_export.serving.protocol import Conversation
from dsvl_export.serving.service import TOKENIZER, BundleWatch, Exchange, Figures, Service, Work
from dsvl_export.serving.text import TextEncoder
from runtimes.bundle.bundle import Bundle
from runtimes.chain import Chain, EncodedImage, Prompt
from runtimes.scheduler import BusyError, DeadlineError, Job, Step
from runtimes.text.prompt import format_chat

AT_ONCE = 2  # images that are decoded at a time
FETCHES = 8  # images that are fetched at a time
HELD = 8  # requests of the largest size whose image files are held at a time
CHARACTERS = 128  # that a token stands for at most; more of them are not even tokenized

log = logging.getLogger(__name__)


class LocalService(Service):
    """Models of this process.

    Raises:
        UserError: as ``Models``.
    """

    def __init__(self, bundle: Bundle, choice: ModelOptions, images: ImageLimits) -> None:
        watch = BundleWatch(bundle)
        self.models = Models(bundle, choice)
        (first,) = self.models.open
        names = askable(bundle, choice.device)
        super().__init__(bundle, watch, first.pipeline.chain.tokenizer, names, first.name)
        self.images = images
        self.most, self.preparing = choice.queue + 2 * MOST_SLOTS, 0  # requests on their way to a queue
        self.text = TextEncoder(bundle.path(TOKENIZER), self.tokenizer)
        self.decoders = ThreadPoolExecutor(AT_ONCE, "images")
        self.fetchers = ThreadPoolExecutor(FETCHES, "fetched images")
        self.opener = ThreadPoolExecutor(1, "opener")  # all who wait for a model wait here
        self.held = 0  # bytes of the image files of all requests

    @property
    def open(self) -> list[str]:
        return [model.name for model in self.models.open]

    def exchange(self, work: Work) -> LocalExchange:
        return LocalExchange(self, work)

    def figures(self) -> Iterable[Figures]:
        for model in self.models.open:
            at = model.scheduler
            yield Figures(model.name, at.running, at.waiting, at.slots, at.chain.images_encoded)

    def close(self) -> None:
        self.models.close()
        self.text.close()
        for threads in (self.decoders, self.fetchers, self.opener):
            threads.shutdown()


class LocalExchange(Exchange):
    """A request to a model of this process."""

    def __init__(self, service: LocalService, work: Work) -> None:
        self.model = service.named(work.model)
        self._service, self._work = service, work
        self._leased: Model | None = None
        self._job: Job | None = None
        self._held = 0  # bytes of its image files
        self._steps: asyncio.Queue[Step | Exception] = asyncio.Queue()

    async def _begin(self) -> Step:
        await self._queue()
        return await self.next()

    async def _queue(self) -> None:
        """Lease the model, read the request and submit it, all within its time."""
        service, until = self._service, perf_counter() + self._work.seconds
        if service.preparing >= service.most:
            raise BusyError(f"{service.most} requests are being read; try again in a moment.")
        service.preparing += 1
        try:
            prompt = await asyncio.wait_for(self._prepared(), self._work.seconds)
        except asyncio.TimeoutError as error:
            raise DeadlineError("The request was not read within its time; the server is busy.") from error
        finally:
            service.preparing -= 1
        self._submit(prompt, until - perf_counter())

    async def next(self) -> Step:
        """What was written since, in one step."""
        step = await self._steps.get()
        if isinstance(step, DeadlineError):
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
        if self._job:
            self._job.cancel()
            self._job = None
        if self._leased:
            self._service.models.release(self._leased)
            self._leased = None
        self._service.held -= self._held
        self._held = 0

    async def _prepared(self) -> Prompt:
        service, models = self._service, self._service.models
        while (model := models.lease(self.model)) is None:
            await asyncio.get_running_loop().run_in_executor(service.opener, models.ensure, self.model)
        self._leased = model
        chain, capacity, talk = model.pipeline.chain, model.scheduler.capacity, self._work.talk
        spec = chain.tokenizer.spec
        text = format_chat(talk.turns, model.pipeline.system_prompt, spec.template)
        least = len(text) // CHARACTERS + len(talk.urls) * spec.image_tokens
        if least > capacity:
            raise RequestError(
                400, f"The prompt has at least {least} tokens but the KV cache holds {capacity}; shorten it."
            )
        self._work = replace(self._work, talk=Conversation())  # its URLs are large
        images = [await self._image(chain, url, f"image {place}") for place, url in enumerate(talk.urls, 1)]
        return chain.prepare_tokens(await service.text.encode(text), images)

    async def _image(self, chain: Chain, url: str, where: str) -> EncodedImage:
        """Read and check the file of an image. Requests take turns, an image at a time."""
        service, loop = self._service, asyncio.get_running_loop()
        threads = service.fetchers if is_remote(url) else service.decoders
        file = await loop.run_in_executor(threads, image_file, url, service.images, where)
        self._hold(len(file))
        return await loop.run_in_executor(service.decoders, checked_image, chain, file, service.images, where)

    def _hold(self, size: int) -> None:
        service, most = self._service, self._service.images.bytes
        if self._held + size > most:
            raise RequestError(
                400, f"The images of the request have more than {most} bytes.", param="messages"
            )
        if service.held + size > HELD * most:
            raise unavailable("Too many large images are waiting; try again in a moment.")
        self._held += size
        service.held += size

    def _submit(self, prompt: Prompt, seconds: float) -> None:
        loop, steps = asyncio.get_running_loop(), self._steps

        def deliver(step: Step | Exception) -> None:
            loop.call_soon_threadsafe(steps.put_nowait, step)

        assert self._leased
        self._job = self._leased.scheduler.submit(
            prompt, self._work.generation, deliver, seconds, self._work.stream
        )


def checked_image(chain: Chain, file: bytes, limits: ImageLimits, where: str) -> EncodedImage:
    """The image of a file; it is decoded, to see whether it can be, unless the encoder has had it already."""
    image = EncodedImage(file, chain.preprocessing)
    if not chain.is_encoded(image):
        check_image(file, limits, where)
    return image
