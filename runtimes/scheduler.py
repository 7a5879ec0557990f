"""Continuous batching: conversations share a fixed pool of KV cache rows and decode together."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from time import perf_counter
from typing import TypeVar

import numpy as np

from runtimes.chain import Chain, Key, Prompt
from runtimes.generation.decoding import SpeculativeSequence, decode_step
from runtimes.generation.sampling import GenerationOptions
from runtimes.job import BusyError, ClosedError, DeadlineError, Deliver, Job, Step
from runtimes.structured.grammars import Grammar, Grammars

CHUNK = 128  # tokens of a prompt that are prefilled between two decode steps of the others
SWEEP_SECONDS = 0.2  # between two checks of deadlines while only images are encoded
MIN_COPY_TOKENS = 64  # a shorter prefix is computed again instead of copied

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class Scheduler:
    """Answers requests in the order of their arrival, as many at once as there are rows.

    A thread runs the sessions. It alternates between one decode step of all answers, in one call,
    and one piece of prefill (an image, or some tokens of a prompt) of one request. So a new request
    does not wait for a long answer, and a long prompt does not stop the other answers. A second
    thread decodes image files and, if the chain is ``concurrent``, encodes the images. A free row
    keeps its content: a prompt with the same prefix prefills only the rest, also in another row.

    Requests may have different adapters, each with a ``Chain`` of its own. Those of one adapter are
    decoded in one call, and prefixes are only reused with the same adapter.
    """

    def __init__(
        self,
        chain: Chain,
        capacity: int,
        slots: int = 8,
        queue: int = 64,
        chunk: int = CHUNK,
        grammars: Grammars | None = None,
    ) -> None:
        """Allocate the rows and start the threads.

        Args:
            chain: the components.
            capacity: tokens per row.
            slots: number of rows, which is the number of answers that are decoded together.
            queue: number of requests that may wait for a row.
            chunk: tokens of a prompt that are prefilled between two decode steps of the others.
            grammars: compiles response formats; None makes it.

        Raises:
            UserError: the decoder supports fewer rows than ``slots``.
        """
        self.chain, self.capacity, self.slots, self.queue, self.chunk = chain, capacity, slots, queue, chunk
        self.grammars = grammars or Grammars(chain.tokenizer, chain.vocabulary)
        self._vision = ThreadPoolExecutor(1, "vision")
        self._cache = chain.decoder.new_cache(slots, capacity)
        self._keys: list[list[Key]] = [[] for _ in range(slots)]  # content of each row, by position
        self._chains = [chain] * slots  # which computed that content
        self._used = [0.0] * slots  # when each row was last freed
        self._waiting: deque[Job] = deque()
        self._jobs: dict[int, Job] = {}  # by row
        self._prefilling: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a row."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of requests that have a row."""
        return len(self._jobs)

    def submit(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        deliver: Deliver,
        seconds: float | None = None,
        every_step: bool = True,
        chain: Chain | None = None,
        grammar: Grammar | None = None,
    ) -> Job:
        """Queue a request.

        Args:
            prompt: the prepared prompt.
            options: how to generate.
            deliver: called in the scheduler's thread with each ``Step``, or with the error that
                ends the request; it must not block.
            seconds: time until the deadline of the request; None is no deadline.
            every_step: whether to deliver every step, or only the last one.
            chain: the components, with an adapter; None uses those of the scheduler. Equal adapters
                must have the same object.
            grammar: the compiled response format of the options; None compiles it.

        Returns:
            the job, which can be canceled.

        Raises:
            UserError: the prompt exceeds the capacity, or the response format cannot be used; see
                ``Grammars.fitting``.
            BusyError: the queue is full.
            ClosedError: the scheduler is closing.
        """
        prompt.check_fits(self.capacity)
        if grammar is None:
            grammar = self.grammars.fitting(options.format, len(prompt.keys), self.capacity)
        job = Job(prompt, options, deliver, seconds, every_step, chain or self.chain, grammar)
        with self._changed:
            if self._closing:
                raise ClosedError("The server is stopping and accepts no more requests.")
            if len(self._waiting) + len(self._jobs) >= self.slots + self.queue:
                raise BusyError(
                    f"{self.slots} requests are being answered and {self.queue} are waiting;"
                    " try again in a moment."
                )
            self._waiting.append(job)
            self._changed.notify()
        return job

    def stream(self, prompt: Prompt, options: GenerationOptions) -> Iterator[Step]:
        """Submit a request and stream its steps; closing the generator early cancels it.

        Yields:
            the steps of the answer.

        Raises:
            UserError: see ``submit``; also the error that ends the request.
        """
        steps: SimpleQueue[Step | Exception] = SimpleQueue()
        job = self.submit(prompt, options, steps.put)
        try:
            while True:
                step = steps.get()
                if isinstance(step, Exception):
                    raise step
                yield step
                if step.answer:
                    return
        finally:
            job.cancel()

    def close(self) -> None:
        """Finish all running and waiting requests and end the threads."""
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
                self._drop_expired()
                self._admit()
                self._prefill_one()
                self._decode_all()
            except Exception as error:  # a defect here must not leave clients waiting forever
                log.exception("The scheduler failed")
                for job in [*self._jobs.values(), *self._take_waiting()]:
                    self._end(job, error)
            with self._changed:
                if self._jobs and all(job.is_encoding for job in self._jobs.values()):
                    self._changed.wait(SWEEP_SECONDS)

    def _take_waiting(self) -> list[Job]:
        with self._changed:
            jobs, self._waiting = list(self._waiting), deque()
        return jobs

    def _drop_expired(self) -> None:
        """End requests that were canceled or have reached their deadline."""
        now = perf_counter()
        with self._changed:
            jobs = [*self._jobs.values(), *self._waiting]
        for job in jobs:
            if job.canceled:
                self._end(job)
            elif job.deadline is not None and now > job.deadline:
                spent = now - job.started
                self._end(job, DeadlineError(f"The answer was not complete after {spent:.0f} seconds."))

    def _admit(self) -> None:
        """Assign free rows to the requests that have waited longest."""
        while len(self._jobs) < self.slots:
            with self._changed:
                if not self._waiting:
                    return
                job = self._waiting.popleft()
            job.row = self._assign_row(job.prompt, job.chain)
            self._jobs[job.row] = job
            job.prefill = self._prefill(job)
            self._prefilling.append(job)

    def _assign_row(self, prompt: Prompt, chain: Chain) -> int:
        """Return a free row that holds the longest prefix of the prompt that any row has."""
        shared = [
            prompt.shared_prefix_length(keys) if owner is chain else 0
            for keys, owner in zip(self._keys, self._chains, strict=True)
        ]
        lost = [len(keys) - count for keys, count in zip(self._keys, shared, strict=True)]
        free = [row for row in range(self.slots) if row not in self._jobs]
        best = max(range(self.slots), key=shared.__getitem__)
        row = min(free, key=self._used.__getitem__)
        if best in free and lost[best] <= lost[row]:
            row = best  # keeps what other conversations could continue
        elif shared[best] >= shared[row] + MIN_COPY_TOKENS:
            self._cache.copy_prefix(best, row, shared[best])
            shared[row] = shared[best]
        self._keys[row], self._chains[row] = prompt.keys[: shared[row]], chain
        self._cache.lengths[row] = shared[row]
        return row

    def _prefill(self, job: Job) -> Iterator[None]:
        """Prefill a prompt piece by piece, and sample the first token."""
        row, keys = self._cache.row(job.row), job.prompt.keys
        reused = job.chain.load_prefix(job.prompt, row, row.length)
        self._keys[job.row] = keys[:reused]
        embeds = yield from self._embed(job, reused)
        job.prompt = replace(job.prompt, images={})  # frees their memory
        while True:
            start = row.length - reused
            part = embeds[None, start : start + self._chunk()]
            logits = job.chain.decoder.decode(part, np.array([part.shape[1] - 1]), row)[0]
            self._keys[job.row] = keys[: row.length]
            if row.length == len(keys):
                break
            yield
        job.sequence = SpeculativeSequence(
            job.chain, job.prompt.tokens, job.options, job.started, self.capacity, job.grammar
        )
        job.sequence.answer.reused_tokens = reused
        self._accept_logits(job, logits)

    def _embed(self, job: Job, start: int) -> Generator[None, None, np.ndarray]:
        """Encode a prompt's images one at a time; return the embeddings from ``start`` on."""
        steps = self.chain.embed_stepwise(job.prompt, start)
        embeds = next(steps)
        for image in self.chain.images_from(job.prompt, start):
            if self.chain.concurrent and not self.chain.is_encoded(image):
                embeds = yield from self._run_aside(job, partial(next, steps))
            else:
                if not (image.decoded or self.chain.is_encoded(image)):
                    yield from self._run_aside(job, image.decode)
                embeds = next(steps)
            yield
        return embeds

    def _run_aside(self, job: Job, task: Callable[[], Result]) -> Generator[None, None, Result]:
        """Run a task of prefill in the second thread while the other answers continue."""
        job.encoding = self._vision.submit(task)
        job.encoding.add_done_callback(self._wake)
        yield
        result: Result = job.encoding.result()
        return result

    def _chunk(self) -> int:
        """Tokens of one piece of prefill: fewer while other answers wait for it."""
        chunk = self.chain.prefill_chunk
        return min(self.chunk, chunk) if any(job.sequence for job in self._jobs.values()) else chunk

    def _prefill_one(self) -> None:
        """Run one piece of prefill; prompts take turns unless their image is being encoded."""
        self._prefilling = deque(job for job in self._prefilling if self._jobs.get(job.row) is job)
        job = next((job for job in self._prefilling if not job.is_encoding), None)
        if job is None:
            return
        assert job.prefill
        self._prefilling.remove(job)
        try:
            next(job.prefill)
            self._prefilling.append(job)
        except StopIteration:
            pass
        except Exception as error:  # of a session; it ends only this request
            self._end(job, error)

    def _decode_all(self) -> None:
        """Run one decode step of every answer: one call for each adapter."""
        by_chain: dict[Chain, dict[int, Job]] = {}
        for row, job in sorted(self._jobs.items()):
            if job.sequence:
                by_chain.setdefault(job.chain, {})[row] = job
        for chain, jobs in by_chain.items():
            self._decode(chain, jobs)

    def _decode(self, chain: Chain, jobs: dict[int, Job]) -> None:
        """Run one decode step of the answers of one adapter, by row."""
        if len(jobs) > 1:  # idle rows that are full may lose a token; see decode_step
            for row in set(range(self.slots)) - jobs.keys():
                self._keys[row] = self._keys[row][: self.capacity - 1]
        active = {row: job.sequence for row, job in jobs.items() if job.sequence}
        try:
            logits, seconds = decode_step(chain, self._cache, active)
        except Exception as error:  # of the decoder; no answer can continue
            for job in jobs.values():
                self._end(job, error)
            return
        for job, rows in zip(jobs.values(), logits, strict=True):
            self._accept_logits(job, rows, seconds)

    def _accept_logits(self, job: Job, logits: np.ndarray, seconds: float | None = None) -> None:
        """Sample from ``logits [K, V]`` and deliver the new text."""
        assert job.sequence
        answer, row = job.sequence.answer, self._cache.row(job.row)
        before, prompt_length = len(answer.logprobs), len(job.prompt.keys)
        try:
            text = job.sequence.accept_logits(logits, row, seconds)
        except Exception as error:  # of this answer only, such as logits that are not finite
            self._end(job, error)
            return
        keys = self._keys[job.row]
        written = answer.tokens[len(keys) - prompt_length : row.length - prompt_length]
        keys.extend(("", token) for token in written)
        if job.sequence.finished:
            self._end(job, Step(text, tuple(answer.logprobs[before:]), answer))
        elif job.every_step:
            self._deliver(job, Step(text, tuple(answer.logprobs[before:])))

    def _end(self, job: Job, last: Step | Exception | None = None) -> None:
        """Free the row or queue entry of a request and deliver its last step or error."""
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

    def _deliver(self, job: Job, step: Step | Exception) -> None:
        if not job.canceled:
            try:
                job.deliver(step)
            except Exception:  # the receiver is gone
                job.cancel()
