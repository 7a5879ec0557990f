r"""Tokenizes the prompts of requests, so that no text can block the server.

The time of tokenization depends on the regular expressions in the bundle's ``tokenizer.json``: with
the common ``\s+(?!\S)``, it is quadratic in the length of runs of white space. The tokenizer holds
Python's interpreter lock meanwhile, and a thread cannot be stopped. Therefore a long text is
tokenized in a process, which is killed if it takes too long. A short text is fast and is tokenized
in this process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from dsvl_export.serving.errors import RequestError, unavailable
from runtimes.backends.worker import WorkerAsset
from runtimes.errors import UserError
from runtimes.text.tokenizer import PromptSpec, Tokenizer

SHORT_TEXT = 2_000  # characters of a text that is tokenized in this process
TEXT_SECONDS = 5.0


class TokenizerAsset:
    """The tokenizer in the worker process; an asset of ``runtimes.backends.worker``."""

    def __init__(self, file: str, spec: PromptSpec) -> None:
        """Load a tokenizer and tokenize once, to build its tables."""
        self._tokenizer = Tokenizer(Path(file), spec)
        self.call("encode", {"text": ""})

    def call(self, function: str, inputs: Mapping[str, Any], state: None = None) -> dict[str, np.ndarray]:
        """Return the ids of ``text``; the only function is ``encode``."""
        return {"ids": np.array(self._tokenizer.encode(inputs["text"]), np.int64)}


class TokenizerProcess(WorkerAsset):
    """A tokenizer in a separate process; ``close`` kills it, even during a call."""

    asset = TokenizerAsset

    def __init__(self, file: Path, spec: PromptSpec) -> None:
        """Start the process.

        Raises:
            UserError: it cannot be started.
        """
        start = (self.asset.__module__, self.asset.__name__)
        super().__init__(start, (str(file), spec), f"The tokenizer {file}")

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text.

        Raises:
            UserError: the text cannot be tokenized, or the process has ended.
        """
        ids: np.ndarray = self._request("call", "encode", {"text": text}, None)["ids"]
        return [int(token) for token in ids]


class TextEncoder:
    """Tokenizes the prompts of requests; long prompts one at a time, in a process."""

    def __init__(self, file: Path, tokenizer: Tokenizer) -> None:
        """Prepare an encoder; the process starts with the first long prompt.

        Args:
            file: ``tokenizer.json`` of the bundle.
            tokenizer: for short prompts.
        """
        self._file, self._tokenizer = file, tokenizer
        self._process: TokenizerProcess | None = None
        self._process_lock = asyncio.Lock()
        self._short_texts, self._long_texts = (ThreadPoolExecutor(1, name) for name in ("text", "long text"))
        self._running: set[asyncio.Task[list[int]]] = set()

    async def encode(self, text: str) -> list[int]:
        """Return the ids of a prompt.

        Raises:
            RequestError: it takes more than ``TEXT_SECONDS``, or the process has ended.
            UserError: the prompt cannot be tokenized.
        """
        if len(text) <= SHORT_TEXT:
            return await asyncio.get_running_loop().run_in_executor(
                self._short_texts, self._tokenizer.encode, text
            )
        # If the request is canceled, the task still finishes, so that the process stays usable.
        task = asyncio.create_task(self._encode_long(text))
        self._running.add(task)
        task.add_done_callback(self._forget_task)
        return await asyncio.shield(task)

    async def _encode_long(self, text: str) -> list[int]:
        """Tokenize in the process, and kill it after ``TEXT_SECONDS``."""
        loop = asyncio.get_running_loop()
        async with self._process_lock:
            try:
                process = await loop.run_in_executor(self._long_texts, self._start_process)
            except UserError as error:
                raise unavailable(str(error)) from error
            try:
                encoding = loop.run_in_executor(self._long_texts, process.encode, text)
                return await asyncio.wait_for(encoding, TEXT_SECONDS)
            except asyncio.TimeoutError as error:
                self._end_process()
                raise RequestError(
                    400, f"The text takes more than {TEXT_SECONDS:g} seconds to tokenize; shorten it.",
                    param="messages",
                ) from error  # fmt: skip
            except UserError as error:
                if not process.ended:
                    raise
                self._end_process()
                raise unavailable(str(error)) from error

    def _start_process(self) -> TokenizerProcess:
        """Return the process; start it if it does not run."""
        if self._process is None:
            self._process = TokenizerProcess(self._file, self._tokenizer.spec)
        return self._process

    def _forget_task(self, task: asyncio.Task[list[int]]) -> None:
        """Drop a finished task and retrieve its exception, for which no request may be waiting."""
        self._running.discard(task)
        if not task.cancelled():
            task.exception()

    def _end_process(self) -> None:
        """Kill the process, if it runs."""
        process, self._process = self._process, None
        if process:
            process.close()

    def close(self) -> None:
        """End the process and the threads; running calls are lost."""
        self._end_process()
        self._short_texts.shutdown()
        self._long_texts.shutdown()
