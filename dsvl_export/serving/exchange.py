"""One request on its way: its model leased, its images read, its prompt queued, its steps as they come."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from time import perf_counter

from fastapi.concurrency import run_in_threadpool

from dsvl_export.serving.errors import INTERNAL, RequestError
from dsvl_export.serving.images import ImageLimits, read_image
from dsvl_export.serving.models import Model, Models
from dsvl_export.serving.protocol import Conversation
from runtimes.chain import Prompt
from runtimes.prompt import format_chat
from runtimes.sampling import GenerationOptions
from runtimes.scheduler import BusyError, Job, LateError, Step

AT_ONCE = 2  # requests whose images are decoded at a time
CHARACTERS = 128  # that a token stands for at most; more of them are not even tokenized

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServeOptions:
    """What the server takes.

    Args:
        token: the bearer token that requests must have; None asks for none.
        local: whether requests must name this machine as their host.
        longest: tokens of an answer where the request does not say.
        drafts: whether an answer that is written alone may guess what repeats.
        seconds: after which a request is given up.
        body: bytes of a request.
        images: of a request.
    """

    token: str | None = None
    local: bool = False
    longest: int = 512
    drafts: bool = True
    seconds: float = 300.0
    body: int = 32_000_000
    images: ImageLimits = field(default_factory=ImageLimits)


@dataclass(frozen=True)
class Work:
    """What a request asks for; ``stream`` wants every step, else the last one alone."""

    model: str
    talk: Conversation
    generation: GenerationOptions
    stream: bool


class Preparing:
    """What all requests share before they are queued.

    Args:
        most: requests on their way at a time.
    """

    def __init__(self, most: int) -> None:
        self.most, self.now = most, 0
        self.turn = asyncio.Semaphore(AT_ONCE)


class Exchange:
    """A request and its answer; ``close`` gives back what it holds, whatever came of it."""

    model: Model  # once there is a first step

    def __init__(self, models: Models, work: Work, options: ServeOptions, preparing: Preparing) -> None:
        self._models, self._work, self._options, self._preparing = models, work, options, preparing
        self._leased: Model | None = None
        self._job: Job | None = None
        self._steps: asyncio.Queue[Step | Exception] = asyncio.Queue()

    async def first(self) -> Step:
        """The first step, or the last where no others are wanted; whatever fails gives back what is held.

        Raises:
            RequestError: the request cannot be answered.
            UserError: its prompt is bad, or it is late.
        """
        try:
            await self._queue()
            step = await self.next()
        except BaseException:
            self.close()
            raise
        if step.answer:
            self.close()
        return step

    async def _queue(self) -> None:
        """Lease the model, read the request and submit it, all within its time."""
        preparing, until = self._preparing, perf_counter() + self._options.seconds
        if preparing.now >= preparing.most:
            raise BusyError(f"{preparing.most} requests are being read; try again in a moment.")
        preparing.now += 1
        try:
            prompt = await asyncio.wait_for(self._prepared(), self._options.seconds)
        except asyncio.TimeoutError as error:
            raise LateError("The request was not read within its time; the server is busy.") from error
        finally:
            preparing.now -= 1
        self._submit(prompt, until - perf_counter())

    async def next(self) -> Step:
        """Raises RequestError where the model fails, LateError where the time is over."""
        step = await self._steps.get()
        if isinstance(step, LateError):
            raise step
        if isinstance(step, Exception):
            log.error("an answer failed", exc_info=step)
            raise RequestError(500, INTERNAL, "server_error") from step
        return step

    def close(self) -> None:
        if self._job:
            self._job.cancel()
            self._job = None
        if self._leased:
            self._models.release(self._leased)
            self._leased = None

    async def _prepared(self) -> Prompt:
        while (model := self._models.lease(self._work.model)) is None:
            await run_in_threadpool(self._models.ensure, self._work.model)
        self.model = self._leased = model
        async with self._preparing.turn:
            return await run_in_threadpool(prepare, model, self._work.talk, self._options.images)

    def _submit(self, prompt: Prompt, seconds: float) -> None:
        loop, steps = asyncio.get_running_loop(), self._steps

        def deliver(step: Step | Exception) -> None:
            loop.call_soon_threadsafe(steps.put_nowait, step)

        self._job = self.model.scheduler.submit(
            prompt, self._work.generation, deliver, seconds, self._work.stream
        )


def prepare(model: Model, talk: Conversation, limits: ImageLimits) -> Prompt:
    """Read the images and tokenize; raises RequestError or UserError."""
    chain, capacity = model.pipeline.chain, model.scheduler.capacity
    system = model.pipeline.system_prompt if talk.system is None else talk.system
    text = format_chat(talk.turns, system)
    least = len(text) // CHARACTERS + len(talk.urls) * chain.tokenizer.spec.image_tokens
    if least > capacity:
        raise RequestError(
            400, f"The prompt has at least {least} tokens but the KV cache holds {capacity}; shorten it."
        )
    images = [read_image(url, limits, f"image {place}") for place, url in enumerate(talk.urls, 1)]
    return chain.prepare(text, images)
