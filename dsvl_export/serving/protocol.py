"""The OpenAI chat-completions protocol: reads and validates requests."""

from __future__ import annotations

import secrets
from codecs import BOM_UTF8
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Optional, Union

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError

from dsvl_export.serving.errors import RequestError
from dsvl_export.serving.parameters import check_unsupported
from dsvl_export.serving.response_formats import (
    MAX_TOOLS,
    AnyFormat,
    Fields,
    StructuredOutputs,
    Tool,
    ToolCall,
    ToolChoice,
    callable_tools,
    read_format,
    tools_format,
    tools_text,
)
from runtimes.bundle.files import parse_json
from runtimes.errors import UserError
from runtimes.generation.sampling import GenerationOptions
from runtimes.text.prompt import IMAGE, Message, Part

MAX_STOPS, MAX_STOP_CHARACTERS, MAX_TOP_LOGPROBS = 16, 1_000, 20
MAX_ITEMS = 16_384  # messages of a request, and parts of a message
MAX_VALUES = 500_000  # of a body: the number of its brackets and commas, those in strings included
MAX_MESSAGE = 300  # characters of an error of pydantic
Role = Literal["system", "user", "assistant"]
ROLES: dict[str, Role] = {  # of the protocol → of the prompt format
    "system": "system", "developer": "system", "user": "user", "tool": "user", "assistant": "assistant",
}  # fmt: skip
MIN_TOP_P = 1e-9  # keeps only the most probable token, as 0 does in the protocol


def _to_integer(value: Any) -> Any:
    """Convert 3.0 to 3: some clients write integers as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# The bounds come before the validator: after it, the OpenAPI document would not have them.
Positive = Annotated[int, Field(ge=1), BeforeValidator(_to_integer)]
TopK = Annotated[int, Field(ge=-1), BeforeValidator(_to_integer)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64), BeforeValidator(_to_integer)]
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), BeforeValidator(_to_integer)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class TextPart(Fields):
    """A text of a message."""

    type: Literal["text", "input_text"]
    text: str


class RefusalPart(Fields):
    """A refusal in an earlier answer."""

    type: Literal["refusal"]
    refusal: str


class ImageURL(Fields):
    """The URL of an image."""

    url: str


class ImagePart(Fields):
    """An image of chat completions; ``input_image`` is its name in OpenAI's Responses API."""

    type: Literal["image_url", "input_image"]
    image_url: Union[str, ImageURL]

    @property
    def url(self) -> str:
        """The URL of the image."""
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


class URLSource(Fields):
    """A URL as the source of an image."""

    type: Literal["url"]
    url: str


class Base64Source(Fields):
    """Base64 data as the source of an image."""

    type: Literal["base64"]
    media_type: str
    data: str

    @property
    def url(self) -> str:
        """The data URL of the image."""
        return f"data:{self.media_type};base64,{self.data}"


class SourcePart(Fields):
    """An image in the form of Anthropic's API."""

    type: Literal["image"]
    source: Annotated[Union[URLSource, Base64Source], Field(discriminator="type")]

    @property
    def url(self) -> str:
        """The URL of the image."""
        return self.source.url


AnyPart = Union[TextPart, RefusalPart, ImagePart, SourcePart]
Parts = Annotated[
    list[Annotated[AnyPart, Field(discriminator="type")]], Field(max_length=MAX_ITEMS, fail_fast=True)
]


class ChatMessage(Fields):
    """A message; clients may send ``function_call`` and ``audio`` without a value."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Union[str, Parts, None] = None
    tool_calls: Annotated[Optional[list[ToolCall]], Field(max_length=MAX_TOOLS)] = None
    tool_call_id: Optional[str] = None
    function_call: None = None
    audio: None = None


class StreamOptions(Fields):
    """Options of a stream."""

    include_usage: Optional[bool] = None


class ChatRequest(Fields):
    """A request; ``top_k``, ``repetition_penalty`` and ``ignore_eos`` extend the protocol.

    A parameter that is null has its default value.
    """

    model_config = ConfigDict(extra="allow")

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
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
    stop: Union[StopText, Annotated[list[StopText], Field(max_length=MAX_STOPS)], None] = None
    logprobs: Optional[bool] = None
    top_logprobs: Optional[TopLogprobs] = None
    response_format: Optional[AnyFormat] = None
    structured_outputs: Optional[StructuredOutputs] = None
    tools: Annotated[Optional[list[Tool]], Field(max_length=MAX_TOOLS)] = None
    tool_choice: Optional[ToolChoice] = None

    @property
    def callable_tools(self) -> list[Tool]:
        """The tools that the answer may call.

        Raises:
            RequestError: see ``response_formats.callable_tools``.
        """
        return callable_tools(self.tools or [], self.tool_choice)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def options(self, max_new_tokens: int, drafts: bool) -> GenerationOptions:
        """Return the options for the generation.

        Args:
            max_new_tokens: maximum length of the answer, if the request does not set one.
            drafts: use speculative decoding.

        Raises:
            RequestError: two parameters contradict each other.
        """
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if self.top_logprobs and not self.logprobs:
            raise RequestError(400, "top_logprobs needs logprobs: true.", param="top_logprobs")
        limits = [limit for limit in (self.max_completion_tokens, self.max_tokens) if limit is not None]
        if len(set(limits)) > 1:
            raise RequestError(
                400, "max_tokens and max_completion_tokens differ; pass one of them.", param="max_tokens"
            )
        sampling = {
            name: value
            for name in ("temperature", "top_p", "top_k", "repetition_penalty", "ignore_eos")
            if (value := getattr(self, name)) is not None
        }
        if "top_p" in sampling:
            sampling["top_p"] = max(sampling["top_p"], MIN_TOP_P)
        if "top_k" in sampling:
            sampling["top_k"] = max(sampling["top_k"], 0)  # -1 samples from all tokens, as in vLLM
        sampling["seed"] = secrets.randbits(63) if self.seed is None else self.seed % (1 << 63)
        tokens, tools = limits[0] if limits else max_new_tokens, self.callable_tools
        wanted = read_format(self.response_format, self.structured_outputs)
        if tools and wanted:
            raise RequestError(
                400,
                "A response format and tools exclude each other, unless tool_choice is none.",
                param="tools",
            )
        form = tools_format(tools, self.tool_choice) if tools else wanted
        options = GenerationOptions(tokens, stop=tuple(stop), drafts=drafts, response_format=form, **sampling)
        return replace(options, logprobs=self.top_logprobs or 0) if self.logprobs else options


def read_request(body: bytes) -> ChatRequest:
    """Read and validate the body of a request.

    Raises:
        RequestError: the body is not a valid request.
    """
    raw = _read_json(body.removeprefix(BOM_UTF8))
    try:
        request = ChatRequest.model_validate(raw)
    except ValidationError as error:
        first = max(error.errors(include_input=False, include_url=False), key=_error_rank)
        param = _path(raw, first["loc"], first["type"] == "missing")
        message = f"{param or 'The body'}: {first['msg']}"[:MAX_MESSAGE]
        raise RequestError(400, f"{message}.", param=param) from error
    check_unsupported(request.model_extra or {}, ChatRequest.model_fields)
    return request


def _read_json(body: bytes) -> Any:
    """Parse a body with a limited number of values."""
    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_VALUES:  # even an empty value takes memory
        raise RequestError(400, f"The body has more than {MAX_VALUES} values.", code="invalid_json")
    try:
        return parse_json(body, "The body")
    except UserError as error:
        raise RequestError(400, str(error), code="invalid_json") from error


def _error_rank(error: Mapping[str, Any]) -> tuple[bool, int]:
    """Rank the errors of a union's branches: the deepest is that of the intended branch."""
    return error["type"] != "string_type", len(error["loc"])


def _path(raw: Any, location: Sequence[int | str], missing: bool) -> str | None:
    """Return the path in a request, without pydantic's names of a union's branches.

    Args:
        raw: the request.
        location: keys and indices of the error.
        missing: whether the last key is a field that is missing.
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
    """The messages of a request, system messages included.

    Args:
        turns: the messages.
        urls: the URLs of the images, in order.
        tools: what the prompt says of the tools that the answer may call; empty without tools.
    """

    turns: tuple[Message, ...] = ()
    urls: tuple[str, ...] = ()
    tools: str = ""


def parse_conversation(
    messages: Sequence[ChatMessage], max_images: int, tools: Sequence[Tool] = ()
) -> Conversation:
    """Convert the messages of a request to those of the prompt format.

    The results of tools become messages of the user.

    Args:
        messages: of the request.
        max_images: largest number of images.
        tools: tools that the answer may call.

    Raises:
        RequestError: the prompt format does not support the messages.
    """
    turns: list[Message] = []
    urls: list[str] = []
    called: dict[str, str] = {}  # id of a tool call → name of its function
    for index, message in enumerate(messages):
        where = f"messages.{index}"
        content = message.content
        if content is None:
            if message.role != "assistant":
                raise RequestError(400, f"{where}.content: the content is missing.", param=f"{where}.content")
            content = [] if message.tool_calls else ""  # an answer that was interrupted
        parts: list[Part] = []
        ordered = [TextPart(type="text", text=content)] if isinstance(content, str) else images_first(content)
        for part in ordered:
            if isinstance(part, (ImagePart, SourcePart)):
                if message.role != "user":
                    raise RequestError(400, f"{where}: only user messages can have images.", param=where)
                urls.append(part.url)
                parts.append(IMAGE)
            else:
                parts.append(part.text if isinstance(part, TextPart) else part.refusal)
        for call in message.tool_calls or []:
            called[call.id] = call.function.name
            parts.append(call.text)
        if message.role == "tool":
            if message.tool_call_id not in called:
                param = f"{where}.tool_call_id"
                raise RequestError(400, f"{param}: no earlier message has a call with this id.", param=param)
            parts = [f"Result of {called[message.tool_call_id]}: " + "\n".join(map(str, parts))]
        turns.append(Message.from_parts(ROLES[message.role], parts))
    if len(urls) > max_images:
        raise RequestError(
            400, f"The request has {len(urls)} images; the limit is {max_images}.", param="messages"
        )
    if not turns or turns[-1].role != "user":
        raise RequestError(400, "The last message must be the user's.", param="messages")
    return Conversation(tuple(turns), tuple(urls), tools_text(tools) if tools else "")


def images_first(parts: Sequence[AnyPart]) -> list[AnyPart]:
    """Put the images of a message before its texts, as in training, unless they are interleaved.

    Only a message in which all texts come before all images changes.
    """
    order = [isinstance(part, (ImagePart, SourcePart)) for part in parts]
    if order != sorted(order):
        return list(parts)
    first = order.index(True) if True in order else 0
    return [*parts[first:], *parts[:first]]
