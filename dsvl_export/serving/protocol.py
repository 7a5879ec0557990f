"""The OpenAI chat-completions protocol: requests read and checked, answers written."""

from __future__ import annotations

import json
import math
import secrets
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Optional, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dsvl_export.serving.errors import RequestError
from runtimes.generate import Answer
from runtimes.prompt import IMAGE, Message, Part
from runtimes.sampling import GenerationOptions, TokenLogprobs
from runtimes.tokenizer import Tokenizer

FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "capacity": "length"}
MOST_STOPS, MOST_TOP = 16, 20
MOST_ITEMS = 16_384  # messages of a request, and parts of a message
# Parameters that would change the answer, and those of their values that do not; all others are ignored.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
}


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class ImageURL(BaseModel):
    url: str


class ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: ImageURL


AnyPart = Annotated[Union[TextPart, ImagePart], Field(discriminator="type")]


class ChatMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Union[str, Annotated[list[AnyPart], Field(max_length=MOST_ITEMS, fail_fast=True)], None]


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """A request; ``top_k``, ``repetition_penalty`` and ``ignore_eos`` are additions to the protocol."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_ITEMS, fail_fast=True)]
    stream: bool = False
    stream_options: Optional[StreamOptions] = None
    max_tokens: Optional[int] = Field(None, ge=1)
    max_completion_tokens: Optional[int] = Field(None, ge=1)
    temperature: Optional[float] = Field(None, ge=0, le=2)
    top_p: Optional[float] = Field(None, gt=0, le=1)
    top_k: Optional[int] = Field(None, ge=0)
    repetition_penalty: Optional[float] = Field(None, ge=0.01, le=100)
    seed: Optional[int] = None
    ignore_eos: Optional[bool] = None
    stop: Union[str, list[str], None] = None
    logprobs: Optional[bool] = None
    top_logprobs: Optional[int] = Field(None, ge=0, le=MOST_TOP)

    @property
    def wants_usage(self) -> bool:
        """Of a stream."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def options(self, longest: int, drafts: bool) -> GenerationOptions:
        """How to generate; ``longest`` are the tokens of an answer where the request does not say."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > MOST_STOPS or not all(stop):
            raise RequestError(
                400, f"stop takes up to {MOST_STOPS} strings, none of them empty.", param="stop"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError(400, "top_logprobs needs logprobs: true.", param="top_logprobs")
        given = {
            name: value
            for name in ("temperature", "top_p", "top_k", "repetition_penalty", "ignore_eos")
            if (value := getattr(self, name)) is not None
        }
        given["seed"] = secrets.randbits(63) if self.seed is None else self.seed % (1 << 63)
        tokens = self.max_completion_tokens or self.max_tokens or longest
        options = GenerationOptions(tokens, stop=tuple(stop), drafts=drafts, **given)
        return replace(options, logprobs=self.top_logprobs or 0) if self.logprobs else options


def read_request(body: bytes) -> ChatRequest:
    """Raises RequestError, in one sentence, where the body is no request that can be answered."""
    try:
        raw = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, "The body is not valid JSON.", code="invalid_json") from error
    try:
        request = ChatRequest.model_validate(raw)
    except ValidationError as error:
        first = max(error.errors(include_input=False, include_url=False), key=_telling)
        # Without pydantic's names of a union's branches.
        path = [str(each) for each in first["loc"] if each != "str" and "[" not in str(each)]
        param = ".".join(path) or None
        raise RequestError(400, f"{param or 'The body'}: {first['msg']}.", param=param) from error
    for name, value in (request.model_extra or {}).items():
        if name in NEUTRAL and value is not None and value not in NEUTRAL[name]:
            raise RequestError(400, f"The parameter {name} is not supported; leave it out.", param=name)
    return request


def _telling(error: Mapping[str, Any]) -> tuple[bool, int]:
    """Of the errors of a union's branches, that of the branch which was meant says most."""
    return "str" not in error["loc"], len(error["loc"])


@dataclass(frozen=True)
class Conversation:
    """The messages of a request, system messages among them, and the images' URLs in order."""

    turns: tuple[Message, ...]
    urls: tuple[str, ...]


def conversation(messages: Sequence[ChatMessage], most_images: int) -> Conversation:
    """Raises RequestError for what the prompt format has no place for."""
    turns: list[Message] = []
    urls: list[str] = []
    for index, message in enumerate(messages):
        where = f"messages.{index}"
        content = message.content
        if content is None:
            if message.role != "assistant":
                raise RequestError(400, f"{where}: the content is missing.", param=where)
            content = ""  # of a turn that was broken off
        parts: list[Part] = []
        for part in [TextPart(type="text", text=content)] if isinstance(content, str) else content:
            if isinstance(part, ImagePart):
                if message.role != "user":
                    raise RequestError(400, f"{where}: only user messages have images.", param=where)
                urls.append(part.image_url.url)
                parts.append(IMAGE)
            else:
                parts.append(part.text)
        role = "system" if message.role == "developer" else message.role
        turns.append(Message.of_parts(role, parts))
    if len(urls) > most_images:
        raise RequestError(
            400, f"The request has {len(urls)} images, this server takes {most_images}.", param="messages"
        )
    if not turns or turns[-1].role != "user":
        raise RequestError(400, "The last message must be the user's.", param="messages")
    return Conversation(tuple(turns), tuple(urls))


class Completion:
    """Writes one answer, whole or in chunks."""

    def __init__(self, model: str, tokenizer: Tokenizer) -> None:
        self.model, self.created = model, int(time.time())
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._tokenizer = tokenizer

    def whole(self, answer: Answer) -> dict[str, Any]:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": self._logprobs(answer.logprobs) if answer.logprobs else None,
            "finish_reason": FINISH_REASONS[answer.finish_reason],
        }
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage(answer)}

    def chunk(
        self,
        text: str = "",
        logprobs: Sequence[TokenLogprobs] = (),
        reason: str | None = None,
        first: bool = False,
        usage: bool = False,
    ) -> dict[str, Any]:
        """What a step added.

        Args:
            reason: why the answer ended, in the last chunk.
            first: the chunk that opens the message.
            usage: whether another chunk will tell the usage.
        """
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if text or first:
            delta["content"] = text
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": self._logprobs(logprobs) if logprobs else None,
            "finish_reason": reason and FINISH_REASONS[reason],
        }
        later = {"usage": None} if usage else {}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **later}

    def usage_chunk(self, answer: Answer) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage(answer)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """Of all tokens that are text, which the end of the answer is not."""
        eos = self._tokenizer.spec.eos_id
        content = [
            {
                **self._logprob(entry.token, entry.logprob),
                "top_logprobs": [self._logprob(token, value) for token, value in entry.top],
            }
            for entry in entries
            if entry.token != eos
        ]
        return {"content": content, "refusal": None}

    def _logprob(self, token: int, value: float) -> dict[str, Any]:
        (piece,) = self._tokenizer.pieces([token])
        # JSON has no infinity; this is what the protocol says for very unlikely tokens.
        value = value if math.isfinite(value) else -9999.0
        whole = "\ufffd" not in piece  # else it is a part of a character
        return {"token": piece, "logprob": value, "bytes": list(piece.encode()) if whole else None}


def usage(answer: Answer) -> dict[str, Any]:
    """Token counts; of the prompt's, ``cached_tokens`` were there already."""
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": len(answer.tokens),
        "total_tokens": answer.prompt_tokens + len(answer.tokens),
        "prompt_tokens_details": {"cached_tokens": answer.reused_tokens},
    }
