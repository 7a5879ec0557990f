"""The models of a bundle that is served: one per backend and precision, opened when they are asked for."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from time import monotonic

from dsvl_export.ladder.against_reference import execution
from dsvl_export.serving.errors import RequestError
from dsvl_export.units import size
from runtimes.backends import load_backend
from runtimes.bundle import Bundle
from runtimes.cache import cache_bytes
from runtimes.errors import UserError
from runtimes.memory import available_memory
from runtimes.pipeline import Pipeline, needed_memory
from runtimes.scheduler import Scheduler

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
    """An open model with its scheduler."""

    def __init__(self, name: str, pipeline: Pipeline, scheduler: Scheduler) -> None:
        self.name, self.pipeline, self.scheduler = name, pipeline, scheduler
        self.used = monotonic()

    @property
    def idle(self) -> bool:
        return not (self.scheduler.running or self.scheduler.waiting)


class Models:
    """The models of one bundle.

    Raises:
        UserError: the bundle cannot be opened, or the one that is opened first cannot run here.
    """

    def __init__(self, bundle: Bundle, options: ModelOptions) -> None:
        self.bundle, self.options = bundle, options
        self._open: dict[str, Model] = {}
        self._lock = threading.Lock()
        manifest = bundle.manifest
        self._watched = [manifest.token_embedding, "tokenizer/tokenizer.json"]
        self._watched += [file for artifact in manifest.artifacts for file in artifact.files]
        self._stamps = self._stamp()
        self.default = "/".join(bundle.select(options.backend, options.precision))
        self.names = [
            "/".join(choice)
            for choice in bundle.choices()
            if execution(bundle, *choice, options.device).judgeable
        ]
        self.get(self.default)

    @property
    def open(self) -> list[Model]:
        """Those that are open now."""
        return list(self._open.values())

    def changed(self) -> str | None:
        """A file of the bundle that is no longer what was opened."""
        stamps = self._stamp()
        return next((file for file in self._watched if stamps[file] != self._stamps[file]), None)

    def get(self, name: str) -> Model:
        """A model by its name, ``<backend>/<precision>``, or by the bundle's for the default one.

        Raises:
            RequestError: there is none of that name, there is no room for it now, or the bundle has changed.
            UserError: it cannot be opened.
        """
        if (file := self.changed()) is not None:
            raise RequestError(
                503,
                f"{file} of the bundle changed while it was served; start the server again.",
                "server_error",
            )
        name = self.default if name == self.bundle.folder.name else name
        with self._lock:
            if name not in self._open:
                if name not in self.names and name != self.default:
                    raise RequestError(
                        404,
                        f"There is no model {name!r} here, only {', '.join(self.names)}.",
                        code="model_not_found",
                        param="model",
                    )
                self._make_room()
                self._open[name] = self._opened(*name.split("/"))
            model = self._open[name]
            model.used = monotonic()
            return model

    def close(self) -> None:
        """Finish all requests."""
        for model in self.open:
            model.scheduler.close()

    def _make_room(self) -> None:
        while len(self._open) >= self.options.keep:
            idle = [model for model in self._open.values() if model.idle]
            if not idle:
                raise RequestError(
                    503,
                    f"{len(self._open)} models are answering; another one is opened when one of them rests.",
                    "server_error",
                    headers={"Retry-After": "5"},
                )
            oldest = min(idle, key=lambda model: model.used)
            oldest.scheduler.close()
            del self._open[oldest.name]

    def _opened(self, backend: str, precision: str) -> Model:
        options, bundle = self.options, self.bundle
        device = execution(bundle, backend, precision, options.device).device
        capacity = min(options.capacity or bundle.manifest.default_capacity, bundle.manifest.default_capacity)
        needed, free = needed_memory(bundle, backend, precision, 1), available_memory()
        if device == "cpu" and needed > free and self._open:
            raise RequestError(
                503,
                f"{backend}/{precision} takes {size(needed)} of memory, {size(free)} are free.",
                "server_error",
            )
        pipeline = Pipeline.open(
            bundle, backend, precision, threads=options.threads, device=device,
            capacity=options.capacity, verify=options.verify,
        )  # fmt: skip
        states = bundle.manifest.contracts[precision]["decoder"].states
        fitting = available_memory() // CACHE_SHARE // cache_bytes(states, 1, capacity)
        most = pipeline.chain.decoder.most_batch
        slots = options.slots or max(min(MOST_SLOTS, fitting, most), 1)
        if slots > most:
            raise UserError(f"The decoder answers at most {most} requests at once; give --slots {most}.")
        concurrent = getattr(load_backend(backend), "CONCURRENT", False)
        scheduler = Scheduler(pipeline.chain, pipeline.capacity, slots, options.queue, concurrent=concurrent)
        log.info("opened %s/%s with %d slots of %d tokens", backend, precision, slots, pipeline.capacity)
        return Model(f"{backend}/{precision}", pipeline, scheduler)

    def _stamp(self) -> dict[str, tuple[int, int, int] | None]:
        """Place, size and time of each file that is read while it is served; None where it is gone."""
        found: dict[str, tuple[int, int, int] | None] = {}
        for file in self._watched:
            try:
                status = (self.bundle.folder / file).stat()
            except OSError:
                found[file] = None
            else:
                found[file] = (status.st_ino, status.st_size, status.st_mtime_ns)
        return found
