"""The interface between the HTTP front end and the services that answer requests."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from dsvl_export.serving.errors import RequestError, quoted, unavailable
from dsvl_export.serving.images import ImageLimits
from dsvl_export.serving.protocol import Conversation
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.manifest import TOKENIZER
from runtimes.generation.sampling import GenerationOptions
from runtimes.job import Step
from runtimes.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServeOptions:
    """Options of the HTTP front end.

    Attributes:
        token: the bearer token that requests must have; None requires none.
        local: whether requests must name this machine as their host.
        max_new_tokens: maximum length of an answer, if the request does not set one.
        drafts: use speculative decoding for an answer that is generated alone.
        seconds: time after which a request is canceled.
        max_body_bytes: maximum size of a request.
        images: limits of the images of a request.
        origins: origins of other web pages that can send requests, such as ``https://host:port``;
            ``*`` allows all.
    """

    token: str | None = None
    local: bool = False
    max_new_tokens: int = 512
    drafts: bool = True
    seconds: float = 300.0
    max_body_bytes: int = 32_000_000
    images: ImageLimits = field(default_factory=ImageLimits)
    origins: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelRequest:
    """A request to a model.

    ``stream`` asks for every step of the answer, otherwise only the last one is sent. The request
    is canceled after ``seconds``.
    """

    model: str
    conversation: Conversation
    generation: GenerationOptions
    stream: bool
    seconds: float


@dataclass(frozen=True)
class ModelStatus:
    """The current state of a model; None stands for a number that is not known in this process."""

    model: str
    running: int
    waiting: int | None = None
    slots: int | None = None
    images_encoded: int | None = None


class AnswerStream(ABC):
    """The answer to one request, step by step; ``model`` is the name of the model that answers."""

    model: str

    async def first(self) -> Step:
        """Return the first step, or the last one if the request does not stream.

        If it fails, the stream is closed.

        Raises:
            RequestError: the request cannot be answered.
            UserError: the prompt is invalid, or the time is over.
        """
        try:
            step = await self._begin()
        except BaseException:
            self.close()
            raise
        if step.answer:
            self.close()
        return step

    @abstractmethod
    async def _begin(self) -> Step: ...

    @abstractmethod
    async def next(self) -> Step:
        """Return the next step.

        Raises:
            RequestError: the model failed.
            DeadlineError: the time of the request is over.
        """

    @abstractmethod
    def close(self) -> None:
        """Release all resources of the request, in any state; can be called again."""


class BundleWatch:
    """Notices changes of the files of a bundle; created before any of them is read."""

    def __init__(self, bundle: Bundle) -> None:
        """Record the current state of the files."""
        self._bundle, manifest = bundle, bundle.manifest
        self._files = sorted(
            {
                manifest.token_embedding,
                TOKENIZER,
                *(path for item in manifest.artifacts for path in item.files),
                *(item.file for item in manifest.adapters),
                *(path for path in manifest.files if path.startswith("prefix/")),
            }
        )
        self._adapters = {item.file for item in manifest.adapters}
        self._stamps = self._stamp()

    @property
    def fingerprint(self) -> str:
        """A hash that is the same for the same files in any folder."""
        lines = [f"{path} {self._bundle.manifest.files[path].sha256}\n" for path in self._files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def changed(self, adapter: str | None = None) -> str | None:
        """Return a message that names a changed file, or None.

        Args:
            adapter: file of the adapter that is used; changes of other adapters do not count.
        """
        stamps = self._stamp()
        for file in self._files:
            used = file == adapter or file not in self._adapters
            if used and stamps[file] != self._stamps[file]:
                return f"{file} of the bundle changed while it was served; start the server again."
        return None

    def _stamp(self) -> dict[str, tuple[int, int, int] | None]:
        """Return inode, size and time of each file; None for a missing one."""
        stamps: dict[str, tuple[int, int, int] | None] = {}
        for file in self._files:
            try:
                status = (self._bundle.folder / file).stat()
            except OSError:
                stamps[file] = None
            else:
                stamps[file] = (status.st_ino, status.st_size, status.st_mtime_ns)
        return stamps


def adapter_model(base: str, adapter: str, default: str) -> str:
    """Return the name of the model that an adapter makes of a base model.

    It is the adapter's own with the default model, and ``BASE:NAME`` with others.
    """
    return adapter if base == default else f"{base}:{adapter}"


def split_model(name: str, default: str) -> tuple[str, str | None]:
    """Return the base model, ``<backend>/<precision>``, and the adapter of a model's name."""
    base, _, adapter = name.partition(":")
    return (base, adapter or None) if "/" in base else (default, base)


class Service(ABC):
    """Answers requests to the models of a bundle."""

    def __init__(
        self, bundle: Bundle, watch: BundleWatch, tokenizer: Tokenizer, names: Sequence[str], default: str
    ) -> None:
        """Keep what all services have.

        Args:
            bundle: the bundle that is served.
            watch: notices changes of its files.
            tokenizer: of the bundle.
            names: names of the models, ``<backend>/<precision>``, and of those with adapters.
            default: the model that the name of the bundle's folder stands for.
        """
        self.bundle, self.watch, self.tokenizer = bundle, watch, tokenizer
        self.names, self.default = list(names), default

    @property
    @abstractmethod
    def open_models(self) -> list[str]:
        """Names of the models that are open; others must be opened first."""

    @abstractmethod
    def submit(self, request: ModelRequest) -> AnswerStream:
        """Return the answer to a request.

        Raises:
            RequestError: there is no such model, or the bundle has changed.
        """

    @abstractmethod
    def model_status(self) -> Iterable[ModelStatus]:
        """Return the state of the open models."""

    @abstractmethod
    def close(self) -> None:
        """Finish all requests; blocks."""

    def health_problem(self) -> str | None:
        """Return a message that says why no request can be answered, or None; may block."""
        return self.watch.changed()

    def resolve_model(self, name: str) -> str:
        """Return the name of the model that a request names.

        Raises:
            RequestError: there is no such model, or the bundle has changed.
        """
        found = self.find_model(name)
        if found is None:
            raise RequestError(
                404, f"There is no model {quoted(name)}; use one of {', '.join(self.names)}.",
                code="model_not_found", param="model",
            )  # fmt: skip
        base, adapter = split_model(found, self.default)
        file = self.bundle.adapters(*base.split("/"))[adapter].file if adapter else None
        if (reason := self.watch.changed(file)) is not None:
            raise unavailable(reason)
        return found

    def find_model(self, name: str) -> str | None:
        """Return the listed name of a model.

        The name of the bundle's folder stands for the default model, and ``BASE:NAME`` for an
        adapter that is listed as ``NAME``.
        """
        if name in (self.default, self.bundle.folder.name):
            return self.default
        if name in self.names:
            return name
        base, _, adapter = name.partition(":")
        return adapter if base == self.default and adapter in self.names else None
