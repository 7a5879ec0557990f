"""Several conversations on one model: a fixed pool of KV cache rows, decoded together step by step."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from queue import SimpleQueue
from time import perf_counter
from typing import Any, TypeVar, Union

import numpy as np

from runtimes.chain import Chain, Key, Prompt
from runtimes.errors import UserError
from runtimes.generation.decoding import Answer, Decoding, decode_step
from runtimes.generation.sampling import GenerationOptions, TokenLogprobs

CHUNK = 128  # tokens of a prompt that are read between two steps of the others
SWEEP_SECONDS = 0.2  # between two looks for late requests while nothing else is to be done
WORTH_COPYING = 64  # tokens; a shorter beginning is computed again

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class BusyError(UserError):
    """There is no room for another request now."""


class ClosedError(UserError):
    """No more requests are taken."""


class LateError(UserError):
    """A request's time was over before its answer was complete."""


@dataclass(frozen=True)
class Step:
    """What one step added to an answer; ``answer`` is there once it is complete."""

    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    answer: Answer | None = None


Deliver = Callable[[Union[Step, Exception]], None]


class Job:
    """One request. ``cancel`` may be called from any thread; nothing is delivered after it took effect."""

    def __init__(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        deliver: Deliver,
        seconds: float | None,
        every_step: bool,
    ) -> None:
        self.prompt, self.options, self.deliver, self.every_step = prompt, options, deliver, every_step
        self.started = perf_counter()
        self.deadline = None if seconds is None else self.started + seconds
        self.cancelled = False
        self.row = -1
        self.reading: Iterator[None] | None = None
        self.encoding: Future[Any] | None = None  # of an image that the second thread decodes or encodes
        self.decoding: Decoding | None = None  # once the prompt is read

    @property
    def encodes(self) -> bool:
        """Whether an image is being decoded or encoded in the second thread."""
        return self.encoding is not None and not self.encoding.done()

    def cancel(self) -> None:
        self.cancelled = True


class Scheduler:
    """Answers requests in the order in which they come, as many at once as the pool has rows.

    A thread of its own runs the sessions. In turns it decodes one token of every answer, in one call, and
    does one piece of reading (an image, or some tokens of a prompt) for one of the prompts that have a row.
    So a late request does not wait for a long one, and a long prompt does not stop the others. A second
    thread decodes image files and, if ``concurrent``, encodes the images. A row that is free keeps what it
    holds: a prompt that begins so reads only the rest, also in another row.

    Args:
        capacity: tokens of each row.
        slots: rows, the answers written at once.
        queue: requests that may wait for a row.
        chunk: tokens of a prompt that are read between two steps of the others.
        concurrent: whether the encoder may run beside the decoder, in a second thread.

    Raises:
        UserError: the decoder takes fewer sequences together than there are slots.
    """

    def __init__(
        self,
        chain: Chain,
        capacity: int,
        slots: int = 8,
        queue: int = 64,
        chunk: int = CHUNK,
        concurrent: bool = False,
    ) -> None:
        self.chain, self.capacity, self.slots, self.queue, self.chunk = chain, capacity, slots, queue, chunk
        self._vision, self._concurrent = ThreadPoolExecutor(1, "vision"), concurrent
        self._cache = chain.decoder.new_cache(slots, capacity)
        self._keys: list[list[Key]] = [[] for _ in range(slots)]  # what each row holds
        self._used = [0.0] * slots  # when each row was last left
        self._waiting: deque[Job] = deque()
        self._jobs: dict[int, Job] = {}  # by row
        self._readers: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests without a row."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests with a row."""
        return len(self._jobs)

    def submit(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        deliver: Deliver,
        seconds: float | None = None,
        every_step: bool = True,
    ) -> Job:
        """Queue a request.

        Args:
            deliver: called in the scheduler's thread with each ``Step``, or with the error that ends the
                request; it must not block.
            seconds: after which the request is given up, counted from now.
            every_step: False delivers the last one alone.

        Raises:
            UserError: the prompt exceeds the capacity.
            BusyError: the queue is full.
            ClosedError: the scheduler is closing.
        """
        prompt.check_fits(self.capacity)
        job = Job(prompt, options, deliver, seconds, every_step)
        with self._changed:
            if self._closing:
                raise ClosedError("The server is stopping; it takes no more requests.")
            if len(self._waiting) + len(self._jobs) >= self.slots + self.queue:
                raise BusyError(
                    f"{self.slots} requests are being answered and {self.queue} are waiting;"
                    " try again in a moment."
                )
            self._waiting.append(job)
            self._changed.notify()
        return job

    def stream(self, prompt: Prompt, options: GenerationOptions) -> Iterator[Step]:
        """A request's steps, as they come; leaving early cancels it.

        Raises:
            UserError: as ``submit``, and what ends the request.
        """
        found: SimpleQueue[Step | Exception] = SimpleQueue()
        job = self.submit(prompt, options, found.put)
        try:
            while True:
                step = found.get()
                if isinstance(step, Exception):
                    raise step
                yield step
                if step.answer:
                    return
        finally:
            job.cancel()

    def close(self) -> None:
        """Finish what is running and waiting, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        self._vision.shutdown()

    def _wake(self, *_: object) -> None:
        with self._changed:
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._jobs or self._closing):
                    self._changed.wait()
                if not (self._waiting or self._jobs):
                    return
            try:
                self._sweep()
                self._admit()
                self._read()
                self._write()
            except Exception as error:  # a fault of ours must not leave every client waiting
                log.exception("The scheduler failed")
                for job in [*self._jobs.values(), *self._take_waiting()]:
                    self._end(job, error)
            with self._changed:
                if self._jobs and all(job.encodes for job in self._jobs.values()):
                    self._changed.wait(SWEEP_SECONDS)

    def _take_waiting(self) -> list[Job]:
        with self._changed:
            jobs, self._waiting = list(self._waiting), deque()
        return jobs

    def _sweep(self) -> None:
        """Drop requests that were given up or are late."""
        now = perf_counter()
        with self._changed:
            jobs = [*self._jobs.values(), *self._waiting]
        for job in jobs:
            if job.cancelled:
                self._end(job)
            elif job.deadline is not None and now > job.deadline:
                spent = now - job.started
                self._end(job, LateError(f"The answer was not complete after {spent:.0f} seconds."))

    def _admit(self) -> None:
        """Give rows to the requests that have waited longest."""
        while len(self._jobs) < self.slots:
            with self._changed:
                if not self._waiting:
                    return
                job = self._waiting.popleft()
            job.row = self._place(job.prompt)
            self._jobs[job.row] = job
            job.reading = self._reading(job)
            self._readers.append(job)

    def _place(self, prompt: Prompt) -> int:
        """A free row that holds, or is given, as much of the prompt's beginning as any row does."""
        shared = [prompt.shared_with(keys) for keys in self._keys]
        lost = [len(keys) - count for keys, count in zip(self._keys, shared, strict=True)]
        free = [row for row in range(self.slots) if row not in self._jobs]
        best = max(range(self.slots), key=shared.__getitem__)
        row = min(free, key=self._used.__getitem__)
        if best in free and lost[best] <= lost[row]:
            row = best  # what another conversation could go on with stays
        elif shared[best] >= shared[row] + WORTH_COPYING:
            self._cache.copy_prefix(best, row, shared[best])
            shared[row] = shared[best]
        self._keys[row] = prompt.keys[: shared[row]]
        self._cache.lengths[row] = shared[row]
        return row

    def _reading(self, job: Job) -> Iterator[None]:
        """Read a prompt piece by piece."""
        row, keys = self._cache.row(job.row), job.prompt.keys
        reused = row.length
        embeds = yield from self._embedding(job, reused)
        job.prompt = replace(job.prompt, images={})  # they are not needed any more
        while True:
            start = row.length - reused
            part = embeds[None, start : start + self._chunk()]
            logits = self.chain.decoder.decode(part, np.array([part.shape[1] - 1]), row)[0]
            self._keys[job.row] = keys[: row.length]
            if row.length == len(keys):
                break
            yield
        job.decoding = Decoding(self.chain, job.prompt.tokens, job.options, job.started)
        job.decoding.writer.answer.reused_tokens = reused
        self._take(job, logits)

    def _embedding(self, job: Job, start: int) -> Generator[None, None, np.ndarray]:
        """Decode and encode a prompt's images, one at a time; embeddings from ``start`` on."""
        steps = self.chain.embed_stepwise(job.prompt, start)
        embeds = next(steps)
        for image in self.chain.placed_images(job.prompt, start):
            if self._concurrent and not self.chain.is_encoded(image):
                embeds = yield from self._aside(job, partial(next, steps))
            else:
                if not (image.decoded or self.chain.is_encoded(image)):
                    yield from self._aside(job, image.decode)
                embeds = next(steps)
            yield
        return embeds

    def _aside(self, job: Job, work: Callable[[], Result]) -> Generator[None, None, Result]:
        """Run one piece of reading in the second thread; the others' answers go on."""
        job.encoding = self._vision.submit(work)
        job.encoding.add_done_callback(self._wake)
        yield
        found: Result = job.encoding.result()
        return found

    def _chunk(self) -> int:
        """Tokens to read at once: fewer while somebody's answer waits for it."""
        most = self.chain.prefill_chunk
        return min(self.chunk, most) if any(job.decoding for job in self._jobs.values()) else most

    def _read(self) -> None:
        """One piece of one prompt; prompts take turns, but for those whose image is being encoded."""
        self._readers = deque(job for job in self._readers if self._jobs.get(job.row) is job)
        job = next((job for job in self._readers if not job.encodes), None)
        if job is None:
            return
        assert job.reading
        self._readers.remove(job)
        try:
            next(job.reading)
            self._readers.append(job)
        except StopIteration:
            pass
        except Exception as error:  # of a session: this request's alone
            self._end(job, error)

    def _write(self) -> None:
        """One step of every answer."""
        jobs = {row: job for row, job in sorted(self._jobs.items()) if job.decoding}
        if not jobs:
            return
        if len(jobs) > 1:  # full rows that are idle may lose a token
            for row in set(range(self.slots)) - jobs.keys():
                self._keys[row] = self._keys[row][: self.capacity - 1]
        active = {row: job.decoding for row, job in jobs.items() if job.decoding}
        try:
            logits, seconds = decode_step(self.chain, self._cache, active)
        except Exception as error:  # of the decoder: nobody's answer can go on
            for job in jobs.values():
                self._end(job, error)
            return
        for job, rows in zip(jobs.values(), logits, strict=True):
            self._take(job, rows, seconds)

    def _take(self, job: Job, logits: np.ndarray, seconds: float | None = None) -> None:
        """Deliver what ``logits [K, V]`` add to an answer."""
        assert job.decoding
        answer, row = job.decoding.writer.answer, self._cache.row(job.row)
        before, asked = len(answer.logprobs), job.prompt.keys
        try:
            text = job.decoding.take(logits, row, seconds)
        except Exception as error:  # of this answer alone: its logits are not finite, say
            self._end(job, error)
            return
        keys = self._keys[job.row]
        written = answer.tokens[len(keys) - len(asked) : row.length - len(asked)]
        keys.extend(("", token) for token in written)
        if job.decoding.writer.finished:
            self._end(job, Step(text, tuple(answer.logprobs[before:]), answer))
        elif job.every_step:
            self._deliver(job, Step(text, tuple(answer.logprobs[before:])))

    def _end(self, job: Job, last: Step | Exception | None = None) -> None:
        """Free a request's place, and deliver what ends it."""
        if job.encoding:
            job.encoding.cancel()
        if self._jobs.get(job.row) is job:
            del self._jobs[job.row]
            self._used[job.row] = perf_counter()
        else:
            with self._changed:
                if job in self._waiting:
                    self._waiting.remove(job)
        if last is not None:
            self._deliver(job, last)

    def _deliver(self, job: Job, what: Step | Exception) -> None:
        if not job.cancelled:
            try:
                job.deliver(what)
            except Exception:  # who waited for it is gone
                job.cancel()
