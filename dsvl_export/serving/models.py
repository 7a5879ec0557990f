"""The open models of a bundle that is served: one per backend and precision, opened when asked for."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from time import monotonic

from dsvl_export.parity_check.against_reference import execution
from dsvl_export.serving.errors import RequestError, unavailable
from runtimes.backends.capabilities import DeclaresConcurrency
from runtimes.backends.registry import load_backend
from runtimes.bundle.bundle import Bundle
from runtimes.cache import cache_bytes
from runtimes.errors import UserError
from runtimes.memory import available_memory
from runtimes.pipeline import Pipeline, check_files, required_memory
from runtimes.scheduler import Scheduler
from runtimes.units import size

MOST_SLOTS = 8
CACHE_SHARE = 2  # one part in so many of the free memory is for KV caches, where slots are not given

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelOptions:
    """How models are opened.

    Args:
        backend, precision: of the one that is opened first; None takes the bundle's first.
        slots: requests answered at once; None takes up to 8, as many as the memory holds caches for.
        queue: requests that may wait.
        keep: models open at a time; the one that was not used for longest goes.
    """

    backend: str | None = None
    precision: str | None = None
    device: str | None = None
    threads: int | None = None
    capacity: int | None = None
    slots: int | None = None
    queue: int = 64
    keep: int = 2
    verify: bool = True


class Model:
    """An open model with its scheduler.

    ``leases`` are the requests that use it, and ``cache_bytes`` what its KV caches may come to take.
    """

    def __init__(self, name: str, pipeline: Pipeline, scheduler: Scheduler, cache_bytes: int) -> None:
        self.name, self.pipeline, self.scheduler = name, pipeline, scheduler
        self.cache_bytes = cache_bytes
        self.leases, self.used = 0, monotonic()


def askable(bundle: Bundle, device: str | None) -> list[str]:
    """Names of the models of a bundle that can answer here."""
    return ["/".join(choice) for choice in bundle.choices() if execution(bundle, *choice, device).runnable]


class Models:
    """The open models of one bundle.

    Raises:
        UserError: the bundle cannot be opened, or its first model cannot run here.
    """

    def __init__(self, bundle: Bundle, options: ModelOptions) -> None:
        self.bundle, self.options = bundle, options
        self._open: dict[str, Model] = {}
        self._checked: dict[str, str | None] = {}  # what is wrong with the files of a model
        self._lock = threading.Lock()  # of what is open and its leases
        self._opening = threading.Lock()  # held for as long as opening takes
        first = "/".join(bundle.select(options.backend, options.precision))
        self._add(first, options.verify)

    @property
    def open(self) -> list[Model]:
        """Those that are open now."""
        return list(self._open.values())

    def lease(self, name: str) -> Model | None:
        """An open model, to be given back by ``release``; None where it is to be opened first."""
        with self._lock:
            model = self._open.get(name)
            if model:
                model.leases += 1
            return model

    def ensure(self, name: str) -> None:
        """Open a model that is not open; takes long, and others wait for it.

        Its files are checked before another model is closed for it. If it fails to open all the same, the
        models that were closed are opened again.

        Raises:
            RequestError: it cannot be opened, or not now.
        """
        with self._opening:
            if name in self._open:  # another request has opened it meanwhile
                return
            closed: list[str] = []
            try:
                if self.options.verify:
                    self._check_files(name)
                self._make_room(closed)
                self._add(name, verify=False)
            except RequestError:  # there is no room for it now
                raise
            except UserError as error:
                log.exception("%s cannot be opened", name)
                raise unavailable(str(error)) from error
            finally:
                if name not in self._open:
                    self._reopen(closed)

    def _check_files(self, name: str) -> None:
        """Check the files of a model, once: as long as the bundle is served, they are what they were."""
        if name not in self._checked:
            try:
                check_files(self.bundle, *name.split("/"))
            except UserError as error:
                self._checked[name] = str(error)
                raise
            self._checked[name] = None
        if (damage := self._checked[name]) is not None:
            raise UserError(damage)

    def _reopen(self, names: list[str]) -> None:
        for name in names:
            try:
                self._add(name, verify=False)
            except Exception:  # a request for it tries again
                log.exception("%s cannot be opened again", name)

    def _add(self, name: str, verify: bool) -> None:
        model = self._opened(name, verify)
        with self._lock:
            self._open[name] = model

    def release(self, model: Model) -> None:
        with self._lock:
            model.leases -= 1
            model.used = monotonic()

    def close(self) -> None:
        """Finish all requests."""
        for model in self.open:
            model.scheduler.close()

    def _make_room(self, closed: list[str]) -> None:
        """Close the models that were not used for longest; adds their names to ``closed``."""
        while True:
            with self._lock:
                if len(self._open) < self.options.keep:
                    return
                resting = [model for model in self._open.values() if not model.leases]
                if not resting:
                    sentence = (
                        f"{len(self._open)} models are answering; another one is opened when one rests."
                    )
                    raise unavailable(sentence)
                oldest = min(resting, key=lambda model: model.used)
                del self._open[oldest.name]
                closed.append(oldest.name)
            oldest.scheduler.close()

    def _opened(self, name: str, verify: bool) -> Model:
        options, bundle = self.options, self.bundle
        backend, precision = name.split("/")
        device = execution(bundle, backend, precision, options.device).device
        promised = sum(model.cache_bytes for model in self.open)  # caches take memory as they are filled
        free = available_memory() - promised
        needed = required_memory(bundle, backend, precision, options.capacity)
        if device == "cpu" and needed > free:
            sentence = f"{name} takes {size(needed)} of memory, {size(free)} are free."
            if self._open:
                raise UserError(sentence)
            log.warning("short of memory: %s", sentence)
        pipeline = Pipeline.open(
            bundle, backend, precision, threads=options.threads, device=device,
            capacity=options.capacity, verify=verify,
        )  # fmt: skip
        states = bundle.manifest.contracts[precision]["decoder"].states
        row = cache_bytes(states, 1, pipeline.capacity)
        fitting = (available_memory() - promised) // CACHE_SHARE // row
        most = pipeline.chain.decoder.max_batch
        slots = options.slots or max(min(MOST_SLOTS, fitting, most), 1)
        if slots > most:
            raise UserError(f"The decoder answers at most {most} requests at once; give --slots {most}.")
        module = load_backend(backend)
        concurrent = isinstance(module, DeclaresConcurrency) and module.CONCURRENT
        scheduler = Scheduler(pipeline.chain, pipeline.capacity, slots, options.queue, concurrent=concurrent)
        log.info("opened %s with %d slots of %d tokens", name, slots, pipeline.capacity)
        return Model(name, pipeline, scheduler, slots * row)
