"""The OpenAI chat-completions protocol: answers."""

from __future__ import annotations

import math
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any

from runtimes.generation.answer import Answer
from runtimes.generation.sampling import TokenLogprobs
from runtimes.text.tokenizer import Tokenizer

CALL = re.compile(r'\{"name": "([a-zA-Z0-9_-]+)", "arguments": ')
FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "capacity": "length"}


class Completion:
    """Formats one answer, as one document or in chunks."""

    def __init__(self, model: str, tokenizer: Tokenizer, tools: bool = False) -> None:
        """Start an answer of a model, with a new id.

        Args:
            model: name of the model.
            tokenizer: of the bundle.
            tools: whether an answer that begins with a brace is the call of a tool.
        """
        self.model, self.created = model, int(time.time())
        self._call = ToolCallParser() if tools else None
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._tokenizer = tokenizer

    def completion(self, answer: Answer) -> dict[str, Any]:
        """Return the answer as a ``chat.completion``."""
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if self._call and (call := self._call.parse(answer.text, answer.finish_reason == "eos")):
            message |= {"content": None, "tool_calls": [call]}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": self._logprobs(answer.logprobs) if answer.logprobs else None,
            "finish_reason": self._reason(answer.finish_reason),
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
        """Return a step of the answer as a ``chat.completion.chunk``.

        Args:
            text: text that the step adds.
            logprobs: log probabilities of the tokens that the step adds.
            reason: why the answer ended, in the last chunk.
            first: whether the chunk opens the message.
            usage: whether a later chunk will contain the usage.
        """
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if self._call:
            text, calls = self._call.feed(text, reason is not None, reason == "eos")
            if calls:
                delta["tool_calls"] = calls
        if text or (first and not self._call):
            delta["content"] = text
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": self._logprobs(logprobs) if logprobs else None,
            "finish_reason": reason and self._reason(reason),
        }
        later = {"usage": None} if usage else {}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **later}

    def usage_chunk(self, answer: Answer) -> dict[str, Any]:
        """Return the chunk with the token counts."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage(answer)}

    def _reason(self, reason: str) -> str:
        called = self._call is not None and self._call.complete
        return "tool_calls" if called else FINISH_REASONS[reason]

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """Return the log probabilities of all tokens except the end-of-sentence token."""
        ends = self._tokenizer.spec.eos_ids
        content = [
            {
                **self._logprob(entry.token, entry.logprob),
                "top_logprobs": [self._logprob(token, value) for token, value in entry.top],
            }
            for entry in entries
            if entry.token not in ends
        ]
        return {"content": content, "refusal": None}

    def _logprob(self, token: int, value: float) -> dict[str, Any]:
        (piece,) = self._tokenizer.pieces([token])
        # JSON has no infinity; the protocol uses this value for very improbable tokens.
        value = value if math.isfinite(value) else -9999.0
        return {"token": piece, "logprob": value, "bytes": list(self._tokenizer.token_bytes(token))}


class ToolCallParser:
    """Reads the call of a tool from an answer ``{"name": NAME, "arguments": ARGUMENTS}``.

    The answer has exactly this form, since its response format allows no other.
    """

    def __init__(self) -> None:
        """Start with no text."""
        self.complete = False
        self._id = f"call_{uuid.uuid4().hex[:24]}"
        self._text, self._named, self._is_text = "", False, False

    def parse(self, text: str, complete: bool) -> dict[str, Any] | None:
        """Return the call of an answer; None if it is text. ``feed`` has the arguments."""
        beginning, calls = self.feed(text, True, complete)
        if beginning or not calls:
            return None
        return {key: value for key, value in calls[0].items() if key != "index"}

    def feed(self, text: str, last: bool, complete: bool) -> tuple[str, list[dict[str, Any]]]:
        """Return the new content and the new parts of the call, of which one is empty.

        Args:
            text: new text of the answer.
            last: whether the answer ends with it.
            complete: whether the answer is complete, and not cut at a limit or a stop string.
        """
        self._text += text
        if self._is_text or (not self._named and self._text and not self._text.startswith("{")):
            self._is_text, content, self._text = True, self._text, ""
            return content, []
        part: dict[str, Any] = {"index": 0}
        arguments = {"arguments": ""}
        if not self._named:
            match = CALL.match(self._text)
            if match is None:
                return (self._text, []) if last else ("", [])
            self._named, self._text = True, self._text[match.end() :]
            part |= {"id": self._id, "type": "function"}
            arguments = {"name": match[1], "arguments": ""}
        # The last brace closes the call itself.
        self.complete = complete
        end = len(self._text) - (1 if self.complete or not last else 0)
        arguments["arguments"], self._text = self._text[:end], self._text[end:]
        new = arguments["arguments"] or "name" in arguments
        return "", [{**part, "function": arguments}] if new else []


def usage(answer: Answer) -> dict[str, Any]:
    """Return the token counts; ``cached_tokens`` of the prompt were in the KV cache already."""
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": len(answer.tokens),
        "total_tokens": answer.prompt_tokens + len(answer.tokens),
        "prompt_tokens_details": {"cached_tokens": answer.reused_tokens},
    }
