"""Holding a scheduler, so that what follows comes in a known order."""

from __future__ import annotations

import threading

from runtimes.scheduler import Scheduler


class Gate:
    """Holds a scheduler before its next step, until ``open`` is set."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.open, sweep = threading.Event(), scheduler._drop_expired

        def wait() -> None:
            assert self.open.wait(60)
            sweep()

        scheduler._drop_expired = wait  # type: ignore[method-assign]
