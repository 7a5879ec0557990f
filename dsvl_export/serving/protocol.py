"""The OpenAI chat-completions protocol: requests read and checked."""

from __future__ import annotations

import secrets
from codecs import BOM_UTF8
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Optional, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from dsvl_export.serving.errors import RequestError
from dsvl_export.serving.parameters import check_unsupported
from runtimes.bundle.files import parse_json
from runtimes.errors import UserError
from runtimes.generation.sampling import GenerationOptions
from runtimes.text.prompt import IMAGE, Message, Part

MOST_STOPS, MOST_STOP_CHARACTERS, MOST_TOP = 16, 1_000, 20
MOST_ITEMS = 16_384  # messages of a request, and parts of a message
MOST_VALUES = 500_000  # of a body, counted by its brackets and commas, also those in texts
MOST_SENTENCE = 300  # characters of what pydantic says
LEAST_TOP_P = 1e-9  # keeps the most likely token alone, as 0 does in the protocol


def _whole(value: Any) -> Any:
    """3.0, as some clients write integers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# The bounds stand before the validator: behind it, the OpenAPI document would not have them.
Positive = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
TopK = Annotated[int, Field(ge=-1), BeforeValidator(_whole)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64), BeforeValidator(_whole)]
TopLogprobs = Annotated[int, Field(ge=0, le=MOST_TOP), BeforeValidator(_whole)]
StopText = Annotated[str, Field(min_length=1, max_length=MOST_STOP_CHARACTERS)]


class _Fields(BaseModel):
    """An object of a request. What it has beside these fields is ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class TextPart(_Fields):
    type: Literal["text", "input_text"]
    text: str


class RefusalPart(_Fields):
    type: Literal["refusal"]
    refusal: str


class ImageURL(_Fields):
    url: str


class ImagePart(_Fields):
    """An image as chat completions have it; ``input_image`` is the name in OpenAI's newer protocol."""

    type: Literal["image_url", "input_image"]
    image_url: Union[str, ImageURL]

    @property
    def url(self) -> str:
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


class URLSource(_Fields):
    type: Literal["url"]
    url: str


class Base64Source(_Fields):
    type: Literal["base64"]
    media_type: str
    data: str

    @property
    def url(self) -> str:
        return f"data:{self.media_type};base64,{self.data}"


class SourcePart(_Fields):
    """An image as Anthropic's protocol has it."""

    type: Literal["image"]
    source: Annotated[Union[URLSource, Base64Source], Field(discriminator="type")]

    @property
    def url(self) -> str:
        return self.source.url


AnyPart = Union[TextPart, RefusalPart, ImagePart, SourcePart]
Parts = Annotated[
    list[Annotated[AnyPart, Field(discriminator="type")]], Field(max_length=MOST_ITEMS, fail_fast=True)
]


class ChatMessage(_Fields):
    """A message; ``tool_calls`` and ``function_call`` may be there without a value, as clients send them."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Union[str, Parts, None] = None
    tool_calls: Annotated[Optional[list[Any]], Field(max_length=0)] = None
    function_call: None = None
    audio: None = None


class StreamOptions(_Fields):
    include_usage: Optional[bool] = None


class ChatRequest(_Fields):
    """A request; ``top_k``, ``repetition_penalty`` and ``ignore_eos`` are additions to the protocol.

    A parameter that is null has its default.
    """

    model_config = ConfigDict(extra="allow")

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_ITEMS, fail_fast=True)]
    stream: Optional[bool] = None
    stream_options: Optional[StreamOptions] = None
    max_tokens: Optional[Positive] = None
    max_completion_tokens: Optional[Positive] = None
    temperature: Optional[float] = Field(None, ge=0, le=2)
    top_p: Optional[float] = Field(None, ge=0, le=1)
    top_k: Optional[TopK] = None
    repetition_penalty: Optional[float] = Field(None, ge=0.01, le=100)
    seed: Optional[Seed] = None
    ignore_eos: Optional[bool] = None
    stop: Union[StopText, Annotated[list[StopText], Field(max_length=MOST_STOPS)], None] = None
    logprobs: Optional[bool] = None
    top_logprobs: Optional[TopLogprobs] = None

    @property
    def wants_usage(self) -> bool:
        """Of a stream."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def options(self, longest: int, drafts: bool) -> GenerationOptions:
        """How to generate; ``longest`` are the tokens of an answer where the request does not say.

        Raises:
            RequestError: two parameters contradict each other.
        """
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if self.top_logprobs and not self.logprobs:
            raise RequestError(400, "top_logprobs needs logprobs: true.", param="top_logprobs")
        limits = [each for each in (self.max_completion_tokens, self.max_tokens) if each is not None]
        if len(set(limits)) > 1:
            raise RequestError(
                400, "max_tokens and max_completion_tokens differ; give one of them.", param="max_tokens"
            )
        given = {
            name: value
            for name in ("temperature", "top_p", "top_k", "repetition_penalty", "ignore_eos")
            if (value := getattr(self, name)) is not None
        }
        if "top_p" in given:
            given["top_p"] = max(given["top_p"], LEAST_TOP_P)
        if "top_k" in given:
            given["top_k"] = max(given["top_k"], 0)  # -1 keeps all, as in vLLM
        given["seed"] = secrets.randbits(63) if self.seed is None else self.seed % (1 << 63)
        tokens = limits[0] if limits else longest
        options = GenerationOptions(tokens, stop=tuple(stop), drafts=drafts, **given)
        return replace(options, logprobs=self.top_logprobs or 0) if self.logprobs else options


def read_request(body: bytes) -> ChatRequest:
    """Read a request.

    Raises:
        RequestError: the body is not a request that can be answered.
    """
    raw = _read_json(body.removeprefix(BOM_UTF8))
    try:
        request = ChatRequest.model_validate(raw)
    except ValidationError as error:
        first = max(error.errors(include_input=False, include_url=False), key=_telling)
        param = _path(raw, first["loc"], first["type"] == "missing")
        sentence = f"{param or 'The body'}: {first['msg']}"[:MOST_SENTENCE]
        raise RequestError(400, f"{sentence}.", param=param) from error
    check_unsupported(request.model_extra or {}, ChatRequest.model_fields)
    return request


def _read_json(body: bytes) -> Any:
    if sum(map(body.count, (b",", b"[", b"{"))) > MOST_VALUES:  # each takes memory, even if it is empty
        raise RequestError(400, f"The body has more than {MOST_VALUES} values.", code="invalid_json")
    try:
        return parse_json(body, "The body")
    except UserError as error:
        raise RequestError(400, str(error), code="invalid_json") from error


def _telling(error: Mapping[str, Any]) -> tuple[bool, int]:
    """Of the errors of a union's branches, that of the branch which was meant says most."""
    return error["type"] != "string_type", len(error["loc"])


def _path(raw: Any, location: Sequence[int | str], missing: bool) -> str | None:
    """The place in a request, without pydantic's names of a union's branches.

    Args:
        missing: whether the last step is a field that is not there.
    """
    steps: list[str] = []
    *before, last = location or [""]
    for step in before if missing else location:
        try:
            raw = raw[step]
        except (KeyError, IndexError, TypeError):
            continue
        steps.append(str(step))
    return ".".join([*steps, str(last)] if missing else steps) or None


@dataclass(frozen=True)
class Conversation:
    """The messages of a request, system messages among them, and the images' URLs in order."""

    turns: tuple[Message, ...] = ()
    urls: tuple[str, ...] = ()


def conversation(messages: Sequence[ChatMessage], most_images: int) -> Conversation:
    """Turn the messages of a request into those of the prompt format.

    Raises:
        RequestError: the prompt format has no place for something.
    """
    turns: list[Message] = []
    urls: list[str] = []
    for index, message in enumerate(messages):
        where = f"messages.{index}"
        content = message.content
        if content is None:
            if message.role != "assistant":
                raise RequestError(400, f"{where}.content: the content is missing.", param=f"{where}.content")
            content = ""  # of a turn that was broken off
        parts: list[Part] = []
        given = [TextPart(type="text", text=content)] if isinstance(content, str) else images_first(content)
        for part in given:
            if isinstance(part, (ImagePart, SourcePart)):
                if message.role != "user":
                    raise RequestError(400, f"{where}: only user messages have images.", param=where)
                urls.append(part.url)
                parts.append(IMAGE)
            else:
                parts.append(part.text if isinstance(part, TextPart) else part.refusal)
        role = "system" if message.role == "developer" else message.role
        turns.append(Message.from_parts(role, parts))
    if len(urls) > most_images:
        raise RequestError(
            400, f"The request has {len(urls)} images, this server takes {most_images}.", param="messages"
        )
    if not turns or turns[-1].role != "user":
        raise RequestError(400, "The last message must be the user's.", param="messages")
    return Conversation(tuple(turns), tuple(urls))


def images_first(parts: Sequence[AnyPart]) -> list[AnyPart]:
    """Put the images of a message before its texts, as in training, unless they are interleaved.

    Only an order in which all texts come before all images is changed.
    """
    order = [isinstance(part, (ImagePart, SourcePart)) for part in parts]
    if order != sorted(order):
        return list(parts)
    first = order.index(True) if True in order else 0
    return [*parts[first:], *parts[:first]]
