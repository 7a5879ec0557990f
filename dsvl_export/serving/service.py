"""What the HTTP face asks of those who answer, in this process or elsewhere."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from dsvl_export.serving.errors import RequestError, quoted, unavailable
from dsvl_export.serving.images import ImageLimits
from dsvl_export.serving.protocol import Conversation
from runtimes.bundle.bundle import Bundle
from runtimes.generation.sampling import GenerationOptions
from runtimes.scheduler import Step
from runtimes.text.tokenizer import Tokenizer

TOKENIZER = "tokenizer/tokenizer.json"


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
        origins: of web pages elsewhere that may ask, as ``https://host:port``; ``*`` is every one.
    """

    token: str | None = None
    local: bool = False
    longest: int = 512
    drafts: bool = True
    seconds: float = 300.0
    body: int = 32_000_000
    images: ImageLimits = field(default_factory=ImageLimits)
    origins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Work:
    """What a request asks for.

    ``stream`` wants every step, else the last one alone; after ``seconds`` it is given up.
    """

    model: str
    talk: Conversation
    generation: GenerationOptions
    stream: bool
    seconds: float


@dataclass(frozen=True)
class Figures:
    """What a model is doing at this moment; None is not known here."""

    model: str
    running: int
    waiting: int | None = None
    slots: int | None = None
    images_encoded: int | None = None


class Exchange(ABC):
    """A request and its answer; ``model`` is the name of the one that answers."""

    model: str

    async def first(self) -> Step:
        """The first step, or the last where no others are wanted; whatever fails gives back what is held.

        Raises:
            RequestError: the request cannot be answered.
            UserError: its prompt is bad, or it is late.
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
        """Raises RequestError where the model fails, DeadlineError where the time is over."""

    @abstractmethod
    def close(self) -> None:
        """Give back what is held, whatever came of the request; may be called again."""


class BundleWatch:
    """What a bundle is when the watch is made, which is before any of it is read."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle, manifest = bundle, bundle.manifest
        self._files = sorted(
            {
                manifest.token_embedding,
                TOKENIZER,
                *(path for item in manifest.artifacts for path in item.files),
            }
        )
        self._stamps = self._stamp()

    @property
    def fingerprint(self) -> str:
        """The same for the same files, wherever they lie."""
        lines = [f"{path} {self._bundle.manifest.files[path].sha256}\n" for path in self._files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def changed(self) -> str | None:
        """A sentence that names a file which is not what it was."""
        stamps = self._stamp()
        file = next((file for file in self._files if stamps[file] != self._stamps[file]), None)
        return file and f"{file} of the bundle changed while it was served; start the server again."

    def _stamp(self) -> dict[str, tuple[int, int, int] | None]:
        """Place, size and time of each file that is read while it is served; None where it is gone."""
        found: dict[str, tuple[int, int, int] | None] = {}
        for file in self._files:
            try:
                status = (self._bundle.folder / file).stat()
            except OSError:
                found[file] = None
            else:
                found[file] = (status.st_ino, status.st_size, status.st_mtime_ns)
        return found


class Service(ABC):
    """A bundle that answers.

    Args:
        names: of the models that can be asked, ``<backend>/<precision>``.
        default: the one that the bundle's own name stands for.
    """

    def __init__(
        self, bundle: Bundle, watch: BundleWatch, tokenizer: Tokenizer, names: Sequence[str], default: str
    ) -> None:
        self.bundle, self.watch, self.tokenizer = bundle, watch, tokenizer
        self.names, self.default = list(names), default

    @property
    @abstractmethod
    def open(self) -> list[str]:
        """Models that answer at once; others are opened first."""

    @abstractmethod
    def exchange(self, work: Work) -> Exchange:
        """Raises RequestError: there is no such model, or the bundle has changed."""

    @abstractmethod
    def figures(self) -> Iterable[Figures]: ...

    @abstractmethod
    def close(self) -> None:
        """Finish all requests; blocks."""

    def ailing(self) -> str | None:
        """Why nothing can be answered now, in a sentence; may block."""
        return self.watch.changed()

    def named(self, name: str) -> str:
        """The model of a name; raises RequestError where it cannot be asked."""
        if (reason := self.watch.changed()) is not None:
            raise unavailable(reason)
        name = self.default if name == self.bundle.folder.name else name
        if name not in self.names and name != self.default:
            raise RequestError(
                404, f"There is no model {quoted(name)} here, only {', '.join(self.names)}.",
                code="model_not_found", param="model",
            )  # fmt: skip
        return name
