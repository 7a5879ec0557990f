"""Requests to models of this process: a model leased, images read, a prompt queued, steps as they come."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

from fastapi.concurrency import run_in_threadpool

from dsvl_export.serving.errors import INTERNAL, RequestError
from dsvl_export.serving.images import ImageLimits, read_image
from dsvl_export.serving.models import MOST_SLOTS, Model, ModelOptions, Models, askable
from dsvl_export.serving.protocol import Conversation
from dsvl_export.serving.service import BundleWatch, Exchange, Figures, Service, Work
from runtimes.bundle import Bundle
from runtimes.chain import Prompt
from runtimes.prompt import format_chat
from runtimes.scheduler import BusyError, Job, LateError, Step

AT_ONCE = 2  # requests whose images are decoded at a time
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
        self.turn = asyncio.Semaphore(AT_ONCE)
        self.opener = ThreadPoolExecutor(1, "opener")  # all who wait for a model wait here

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
        self.opener.shutdown()


class LocalExchange(Exchange):
    """A request to a model of this process."""

    def __init__(self, service: LocalService, work: Work) -> None:
        self.model = service.named(work.model)
        self._service, self._work = service, work
        self._leased: Model | None = None
        self._job: Job | None = None
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
            raise LateError("The request was not read within its time; the server is busy.") from error
        finally:
            service.preparing -= 1
        self._submit(prompt, until - perf_counter())

    async def next(self) -> Step:
        """What was written since, in one step."""
        step = await self._steps.get()
        if isinstance(step, LateError):
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

    async def _prepared(self) -> Prompt:
        service, models = self._service, self._service.models
        while (model := models.lease(self.model)) is None:
            await asyncio.get_running_loop().run_in_executor(service.opener, models.ensure, self.model)
        self._leased = model
        async with service.turn:
            return await run_in_threadpool(prepare, model, self._work.talk, service.images)

    def _submit(self, prompt: Prompt, seconds: float) -> None:
        loop, steps = asyncio.get_running_loop(), self._steps

        def deliver(step: Step | Exception) -> None:
            loop.call_soon_threadsafe(steps.put_nowait, step)

        assert self._leased
        self._job = self._leased.scheduler.submit(
            prompt, self._work.generation, deliver, seconds, self._work.stream
        )


def prepare(model: Model, talk: Conversation, limits: ImageLimits) -> Prompt:
    """Read the images and tokenize; raises RequestError or UserError."""
    chain, capacity = model.pipeline.chain, model.scheduler.capacity
    spec = chain.tokenizer.spec
    text = format_chat(talk.turns, model.pipeline.system_prompt, spec.template)
    least = len(text) // CHARACTERS + len(talk.urls) * spec.image_tokens
    if least > capacity:
        raise RequestError(
            400, f"The prompt has at least {least} tokens but the KV cache holds {capacity}; shorten it."
        )
    images = [read_image(url, limits, f"image {place}") for place, url in enumerate(talk.urls, 1)]
    return chain.prepare(text, images)
