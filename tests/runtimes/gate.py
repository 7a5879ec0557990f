"""Holding a scheduler, so that what follows comes in a known order."""

from __future__ import annotations

import threading

from runtimes.scheduler import Scheduler


class Gate:
    """Holds a scheduler before its next step, until ``open`` is set."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.open, sweep = threading.Event(), scheduler._sweep

        def wait() -> None:
            assert self.open.wait(60)
            sweep()

        scheduler._sweep = wait  # type: ignore[method-assign]
