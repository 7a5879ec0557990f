"""The OpenAI chat-completions protocol: answers."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence
from typing import Any

from runtimes.generation.decoding import Answer
from runtimes.generation.sampling import TokenLogprobs
from runtimes.text.tokenizer import Tokenizer

FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "capacity": "length"}


class Completion:
    """Formats one answer, as one document or in chunks."""

    def __init__(self, model: str, tokenizer: Tokenizer) -> None:
        """Start an answer of a model, with a new id."""
        self.model, self.created = model, int(time.time())
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._tokenizer = tokenizer

    def completion(self, answer: Answer) -> dict[str, Any]:
        """Return the answer as a ``chat.completion``."""
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
        """Return a step of the answer as a ``chat.completion.chunk``.

        Args:
            text: text that the step adds.
            logprobs: log probabilities of the tokens that the step adds.
            reason: why the answer ended, in the last chunk.
            first: whether the chunk opens the message.
            usage: whether a later chunk will contain the usage.
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
        """Return the chunk with the token counts."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage(answer)}

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


def usage(answer: Answer) -> dict[str, Any]:
    """Return the token counts; ``cached_tokens`` of the prompt were in the KV cache already."""
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": len(answer.tokens),
        "total_tokens": answer.prompt_tokens + len(answer.tokens),
        "prompt_tokens_details": {"cached_tokens": answer.reused_tokens},
    }
