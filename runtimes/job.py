"""A request to the scheduler, the steps of its answer, and the errors that end it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Union

from runtimes.chain import Chain, Prompt
from runtimes.errors import UserError
from runtimes.generation.answer import Answer
from runtimes.generation.decoding import SpeculativeSequence
from runtimes.generation.sampling import GenerationOptions, TokenLogprobs
from runtimes.structured.grammars import Grammar


class BusyError(UserError):
    """The queue is full; no other request is accepted now."""


class ClosedError(UserError):
    """The scheduler is closing; no more requests are accepted."""


class DeadlineError(UserError):
    """A request reached its deadline before its answer was complete."""


@dataclass(frozen=True)
class Step:
    """One step of an answer.

    Args:
        text: the new text.
        logprobs: entries of the new tokens, if requested.
        answer: the complete answer, in the last step only.
    """

    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    answer: Answer | None = None


Deliver = Callable[[Union[Step, Exception]], None]


class Job:
    """One request, from submission to its last step."""

    def __init__(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        deliver: Deliver,
        seconds: float | None,
        every_step: bool,
        chain: Chain,
        grammar: Grammar | None = None,
    ) -> None:
        """Create a job; see ``Scheduler.submit`` for the arguments."""
        self.chain, self.grammar = chain, grammar
        self.prompt, self.options, self.deliver, self.every_step = prompt, options, deliver, every_step
        self.started = perf_counter()
        self.deadline = None if seconds is None else self.started + seconds
        self.canceled = False
        self.row = -1
        self.prefill: Iterator[None] | None = None
        self.encoding: Future[Any] | None = None  # an image in the second thread
        self.sequence: SpeculativeSequence | None = None  # after prefill

    @property
    def is_encoding(self) -> bool:
        """Whether an image is being decoded or encoded in the second thread."""
        return self.encoding is not None and not self.encoding.done()

    def cancel(self) -> None:
        """Cancel the request; any thread may call this.

        Nothing is delivered after the cancellation took effect.
        """
        self.canceled = True
