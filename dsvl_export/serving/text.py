"""Prompts to tokens, so that no text of a request can hold up the server.

The time that a tokenizer takes for a text depends on the regular expressions in the bundle's
``tokenizer.json``: with the common ``\\s+(?!\\S)``, runs of white space take quadratic time. Meanwhile it
holds Python's interpreter lock, and a thread cannot be stopped. So a long text goes to a process, which is
killed when it takes too long. A short text cannot take long and is tokenized here, which costs no copies.
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

SHORT = 2_000  # characters that are tokenized in this process
TEXT_SECONDS = 5.0


class TokenizerAsset:
    """A tokenizer in the other process, called as ``runtimes.backends.worker`` calls its assets."""

    def __init__(self, file: str, spec: PromptSpec) -> None:
        self._tokenizer = Tokenizer(Path(file), spec)
        self.call("encode", {"text": ""})  # builds what the first call builds

    def call(self, function: str, inputs: Mapping[str, Any], state: None = None) -> dict[str, np.ndarray]:
        """``encode`` alone: the ids of ``text``."""
        return {"ids": np.array(self._tokenizer.encode(inputs["text"]), np.int64)}


class TokenizerProcess(WorkerAsset):
    """A tokenizer in a process of its own; ``close`` kills it, also while it is called.

    Raises:
        UserError: it cannot be started.
    """

    asset = TokenizerAsset

    def __init__(self, file: Path, spec: PromptSpec) -> None:
        start = (self.asset.__module__, self.asset.__name__)
        super().__init__(start, (str(file), spec), f"The tokenizer {file}")

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def encode(self, text: str) -> list[int]:
        """Raises UserError: the text cannot be tokenized, or the process has ended."""
        ids: np.ndarray = self._request("call", "encode", {"text": text}, None)["ids"]
        return [int(token) for token in ids]


class TextEncoder:
    """Tokenizes the prompts of requests; long ones one after the other, in a process."""

    def __init__(self, file: Path, tokenizer: Tokenizer) -> None:
        self._file, self._tokenizer = file, tokenizer
        self._process: TokenizerProcess | None = None
        self._turn = asyncio.Lock()  # of the process
        self._here, self._there = ThreadPoolExecutor(1, "text"), ThreadPoolExecutor(1, "long text")
        self._running: set[asyncio.Task[list[int]]] = set()

    async def encode(self, text: str) -> list[int]:
        """Ids of a prompt.

        Raises:
            RequestError: it takes more than ``TEXT_SECONDS``, or the process has ended.
            UserError: it cannot be tokenized.
        """
        if len(text) <= SHORT:
            return await asyncio.get_running_loop().run_in_executor(self._here, self._tokenizer.encode, text)
        # A request that is given up meanwhile leaves the process to this task, and does not end it.
        task = asyncio.create_task(self._encode_long(text))
        self._running.add(task)
        task.add_done_callback(self._finish)
        return await asyncio.shield(task)

    async def _encode_long(self, text: str) -> list[int]:
        loop = asyncio.get_running_loop()
        async with self._turn:
            try:
                process = await loop.run_in_executor(self._there, self._started)
            except UserError as error:
                raise unavailable(str(error)) from error
            try:
                encoding = loop.run_in_executor(self._there, process.encode, text)
                return await asyncio.wait_for(encoding, TEXT_SECONDS)
            except asyncio.TimeoutError as error:
                self._end()
                raise RequestError(
                    400, f"The text takes more than {TEXT_SECONDS:g} seconds to tokenize; shorten it.",
                    param="messages",
                ) from error  # fmt: skip
            except UserError as error:
                if not process.ended:
                    raise
                self._end()
                raise unavailable(str(error)) from error

    def _started(self) -> TokenizerProcess:
        if self._process is None:
            self._process = TokenizerProcess(self._file, self._tokenizer.spec)
        return self._process

    def _finish(self, task: asyncio.Task[list[int]]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # nobody may be waiting for it any more

    def _end(self) -> None:
        process, self._process = self._process, None
        if process:
            process.close()

    def close(self) -> None:
        """End the process; what it does is lost."""
        self._end()
        self._here.shutdown()
        self._there.shutdown()
