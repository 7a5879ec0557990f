"""The OpenAI chat-completions protocol: answers written."""

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
        # JSON has no infinity; this is what the protocol says for very unlikely tokens.
        value = value if math.isfinite(value) else -9999.0
        return {"token": piece, "logprob": value, "bytes": list(self._tokenizer.token_bytes(token))}


def usage(answer: Answer) -> dict[str, Any]:
    """Token counts; of the prompt's, ``cached_tokens`` were there already."""
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": len(answer.tokens),
        "total_tokens": answer.prompt_tokens + len(answer.tokens),
        "prompt_tokens_details": {"cached_tokens": answer.reused_tokens},
    }
