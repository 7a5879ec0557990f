"""The open models of a served bundle: one for each backend and precision, opened on demand."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from time import monotonic

from dsvl_export.serving.errors import RequestError, unavailable
from dsvl_export.serving.service import adapter_model, split_model
from runtimes.bundle.bundle import Bundle
from runtimes.cache import cache_bytes
from runtimes.chain import Chain
from runtimes.decoders import check_adapter
from runtimes.errors import UserError
from runtimes.execution import execution
from runtimes.memory import available_memory, decoder_weights, required_memory
from runtimes.pipeline import Pipeline, check_files
from runtimes.scheduler import Scheduler
from runtimes.structured.grammars import Grammars
from runtimes.units import size

MAX_SLOTS = 8
CACHE_FRACTION = 2  # without --slots, KV caches can take the free memory divided by this

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelOptions:
    """Options for opening models.

    Attributes:
        backend: of the model that is opened first; None is the bundle's first.
        precision: of the model that is opened first; None is the bundle's first.
        device: device to run on; None is the backend's default.
        threads: number of CPU threads; None is the backend's choice.
        capacity: of the KV cache, in tokens; None is the bundle's.
        slots: number of requests answered at a time; None is up to ``MAX_SLOTS``, if memory allows.
        queue: number of requests that can wait.
        keep: number of models open at a time; the least recently used model is closed.
        verify: check the SHA-256 of the files before they are loaded.
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
    """An open model with its scheduler; ``leases`` counts the requests that use it."""

    def __init__(self, name: str, pipeline: Pipeline, scheduler: Scheduler, cache_bytes: int) -> None:
        """Keep an open pipeline.

        Args:
            name: ``<backend>/<precision>``.
            pipeline: the open pipeline.
            scheduler: runs the requests of the pipeline.
            cache_bytes: largest size of the KV caches of all slots.
        """
        self.name, self.pipeline, self.scheduler = name, pipeline, scheduler
        self.cache_bytes = cache_bytes
        self.leases, self.used = 0, monotonic()
        self.chains: dict[str | None, Chain] = {None: pipeline.chain}  # by open adapter


def runnable_models(bundle: Bundle, device: str | None) -> list[str]:
    """Return the names of the models of a bundle that this machine can run."""
    return ["/".join(choice) for choice in bundle.choices() if execution(bundle, *choice, device).runnable]


class Models:
    """The open models of one bundle."""

    def __init__(self, bundle: Bundle, options: ModelOptions) -> None:
        """Open the first model.

        Raises:
            UserError: the bundle or the model cannot be opened here.
        """
        self.bundle, self.options = bundle, options
        self._open: dict[str, Model] = {}
        self._checked: dict[str, str | None] = {}  # model → what is wrong with its files
        self._grammars: Grammars | None = None  # of all models, which have the bundle's tokenizer
        self._lock = threading.Lock()  # guards the open models and their leases
        self._opening = threading.Lock()  # held while a model is opened
        self.default = "/".join(bundle.select(options.backend, options.precision))
        self._add(self.default, options.verify)

    @property
    def open_models(self) -> list[Model]:
        """The models that are open now."""
        return list(self._open.values())

    @property
    def open_names(self) -> list[str]:
        """The names of the open models, those with adapters included."""
        names = []
        for model in self.open_models:
            adapters = [adapter for adapter in list(model.chains) if adapter]
            names += [model.name, *(adapter_model(model.name, item, self.default) for item in adapters)]
        return names

    def lease(self, name: str) -> Model | None:
        """Return the open base model of a model, to be returned with ``release``.

        None if it or its adapter must be opened first.
        """
        base, adapter = split_model(name, self.default)
        with self._lock:
            model = self._open.get(base)
            if model is None or adapter not in model.chains:
                return None
            model.leases += 1
            return model

    def ensure(self, name: str) -> None:
        """Open a model and its adapter if they are not open; slow, and one model at a time.

        The files are checked before another model is closed. If the model cannot be opened then,
        the closed models are opened again.

        Raises:
            RequestError: the model cannot be opened, or not now.
        """
        base, adapter = split_model(name, self.default)
        with self._opening:
            closed: list[str] = []
            try:
                if base not in self._open:  # else another request has opened it
                    if self.options.verify:
                        self._check_files(base)
                    self._make_room(closed)
                    self._add(base, verify=False)
                if adapter and adapter not in self._open[base].chains:
                    self._open_adapter(self._open[base], adapter)
            except RequestError:  # all other models are in use
                raise
            except UserError as error:
                log.exception("%s cannot be opened", name)
                raise unavailable(str(error)) from error
            finally:
                if base not in self._open:
                    self._reopen(closed)

    def _open_adapter(self, model: Model, adapter: str) -> None:
        """Open an adapter; the first one loads the decoder's weights once more.

        Raises:
            UserError: it cannot be opened.
        """
        backend, precision = model.name.split("/")
        if self.options.verify:
            check_adapter(self.bundle, self.bundle.adapters(backend, precision)[adapter])
        on_cpu = execution(self.bundle, backend, precision, self.options.device).device == "cpu"
        if on_cpu and list(model.chains) == [None]:
            self._check_memory(
                f"{model.name} with adapters", decoder_weights(self.bundle, backend, precision)
            )
        model.chains[adapter] = model.pipeline.with_adapter(adapter).chain

    def _check_memory(self, name: str, needed: int) -> None:
        """Check that bytes are free beside the KV caches of the open models, which fill later.

        Raises:
            UserError: they are not.
        """
        free = available_memory() - sum(model.cache_bytes for model in self.open_models)
        if needed > free:
            raise UserError(f"{name} needs {size(needed)} of memory, but only {size(free)} are free.")

    def _check_files(self, name: str) -> None:
        """Check the files of a model once; ``BundleWatch`` notices later changes."""
        if name not in self._checked:
            try:
                check_files(self.bundle, *name.split("/"))
            except UserError as error:
                self._checked[name] = str(error)
                raise
            self._checked[name] = None
        if (message := self._checked[name]) is not None:
            raise UserError(message)

    def _reopen(self, names: list[str]) -> None:
        """Open models again after another one failed to open."""
        for name in names:
            try:
                self._add(name, verify=False)
            except Exception:  # the next request for it tries again
                log.exception("%s cannot be opened again", name)

    def _add(self, name: str, verify: bool) -> None:
        """Open a model and add it to the open ones."""
        model = self._open_model(name, verify)
        with self._lock:
            self._open[name] = model

    def release(self, model: Model) -> None:
        """Return a model that was leased."""
        with self._lock:
            model.leases -= 1
            model.used = monotonic()

    def close(self) -> None:
        """Finish all requests."""
        for model in self.open_models:
            model.scheduler.close()

    def _make_room(self, closed: list[str]) -> None:
        """Close the least recently used models, and add their names to ``closed``."""
        while True:
            with self._lock:
                if len(self._open) < self.options.keep:
                    return
                idle = [model for model in self._open.values() if not model.leases]
                if not idle:
                    raise unavailable(
                        f"{len(self._open)} models are answering; try again when one of them is idle."
                    )
                oldest = min(idle, key=lambda model: model.used)
                del self._open[oldest.name]
                closed.append(oldest.name)
            oldest.scheduler.close()

    def _open_model(self, name: str, verify: bool) -> Model:
        """Open a model, if there is memory for it."""
        options, bundle = self.options, self.bundle
        backend, precision = name.split("/")
        device = execution(bundle, backend, precision, options.device).device
        reserved = sum(model.cache_bytes for model in self.open_models)  # caches fill later
        if device == "cpu":
            try:
                self._check_memory(name, required_memory(bundle, backend, precision, options.capacity))
            except UserError as error:
                if self._open:
                    raise
                log.warning("low memory: %s", error)
        pipeline = Pipeline.open(
            bundle, backend, precision, threads=options.threads, device=device,
            capacity=options.capacity, verify=verify,
        )  # fmt: skip
        self._grammars = pipeline.grammars = self._grammars or pipeline.grammars
        states = bundle.contract("decoder", backend, precision).states
        slot_bytes = cache_bytes(states, 1, pipeline.capacity)
        fitting = (available_memory() - reserved) // CACHE_FRACTION // slot_bytes
        max_batch = pipeline.chain.decoder.max_batch
        slots = options.slots or max(min(MAX_SLOTS, fitting, max_batch), 1)
        if slots > max_batch:
            raise UserError(
                f"The decoder answers at most {max_batch} requests at a time; pass --slots {max_batch}."
            )
        scheduler = Scheduler(
            pipeline.chain, pipeline.capacity, slots, options.queue, grammars=pipeline.grammars
        )
        log.info("opened %s with %d slots of %d tokens", name, slots, pipeline.capacity)
        return Model(name, pipeline, scheduler, slots * slot_bytes)
