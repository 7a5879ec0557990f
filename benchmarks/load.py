"""Load on ``dsvl-export serve``: throughput of one client and of eight, and a soak of mixed traffic.

    python benchmarks/load.py BUNDLE throughput
    python benchmarks/load.py BUNDLE soak --minutes 30

The server runs in a process of its own, on a bundle of the tiny checkpoint in fp32. A soak sends valid
requests (whole and streamed), malformed ones, bodies that come slowly, and drops connections in the middle.
Every answer is held against the one that a single user gets from Python; the server's memory is read as it
goes on. Exit code 1 says that an answer was lost, crossed or wrong, or that memory grows.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import itertools
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from measuring import spread

from reference.tiny import HELDOUT
from runtimes.generation.sampling import GenerationOptions
from runtimes.pipeline import Pipeline
from runtimes.scheduler import Scheduler

QUESTIONS = ("Describe the picture.", "What number is in the picture?", "How many objects are there?")
PICTURES = 24
CLIENTS = 12
WARM = 0.2  # of the requests, before memory counts
LONG = 400  # tokens of the long answers
MALFORMED: tuple[tuple[Any, int], ...] = (
    ({"messages": []}, 400), ({"model": "other"}, 404), ({"temperature": 5}, 400), ({"n": 4}, 400),
    ({"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}]}, 400),
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A request and the answer that one user gets."""

    body: dict[str, Any]
    expected: str


def questions(bundle: Path, longest: int | None) -> list[Question]:
    """Questions about pictures of the tiny model.

    Args:
        longest: tokens of each answer, past its end; None asks for answers as they are.
    """
    pictures = sorted((HELDOUT.parent / "images").glob("*.png"))[:PICTURES]
    pipeline = None if longest else Pipeline.open(bundle, threads=1)
    more = {"ignore_eos": True, "max_tokens": longest} if longest else {}
    found = []
    for text, picture in itertools.product(QUESTIONS, pictures):
        url = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
        messages = [{"role": "user", "content": parts}]
        body = {"model": bundle.resolve().name, "messages": messages, **more}
        found.append(Question(body, pipeline.chat(text, [picture]).text if pipeline else ""))
    return found


@contextmanager
def server(bundle: Path, *options: str) -> Iterator[tuple[str, int]]:
    """The address and the process of a server."""
    command = [
        sys.executable, "-m", "dsvl_export.cli", "serve", str(bundle), "--port", "0", "--threads", "1",
    ]  # fmt: skip
    with subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout
        try:
            yield process.stdout.readline().split()[3], process.pid
        finally:
            process.terminate()


def resident(process: int) -> float:
    """Resident memory in MB."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1000
    raise ValueError("no VmRSS")


async def throughput(url: str, asked: list[Question], clients: int, requests: int) -> float:
    """Tokens per second of so many clients, each with one request at a time."""
    waiting, tokens = iter(range(requests)), 0

    async def work(client: httpx.AsyncClient) -> None:
        nonlocal tokens
        for index in waiting:
            answer = await client.post(f"{url}/v1/chat/completions", json=asked[index % len(asked)].body)
            answer.raise_for_status()
            tokens += answer.json()["usage"]["completion_tokens"]

    async with httpx.AsyncClient(timeout=120) as client:
        started = time.perf_counter()
        await asyncio.gather(*(work(client) for _ in range(clients)))
    return tokens / (time.perf_counter() - started)


def compare(bundle: Path, turns: int) -> None:
    print("| answers | speculation | 1 client, tokens/s | 8 clients | ratio |\n|---|---|---|---|---|")
    for longest, drafts in ((None, True), (LONG, True), (LONG, False)):
        asked = questions(bundle, longest)
        if longest is None:
            asked = [
                question
                for question in asked
                if question.body["messages"][0]["content"][1]["text"] == QUESTIONS[0]
            ]
        with server(bundle, *([] if drafts else ["--no-drafts"])) as (url, _):
            asyncio.run(throughput(url, asked, 8, len(asked)))  # warm
            rates: dict[int, list[float]] = {1: [], 8: []}
            for _, clients in itertools.product(range(turns), rates):
                rates[clients].append(asyncio.run(throughput(url, asked, clients, 48 if longest else 192)))
        ratios = [many / one for one, many in zip(rates[1], rates[8], strict=True)]
        name = f"{LONG} tokens" if longest else "as they are (20 tokens)"
        columns = (name, "yes" if drafts else "no", spread(rates[1]), spread(rates[8]), spread(ratios))
        print(f"| {' | '.join(columns)} |", flush=True)


def alone(bundle: Path, turns: int) -> None:
    """The scheduler without HTTP: answers of ``LONG`` tokens without speculation, one and eight at a time."""
    pipeline = Pipeline.open(bundle, threads=1)
    scheduler = Scheduler(pipeline.chain, pipeline.capacity, 8)
    pictures = sorted((HELDOUT.parent / "images").glob("*.png"))[:8]
    prompts = [pipeline.chain.prepare(pipeline.format(QUESTIONS[0], 1), [picture]) for picture in pictures]
    options = GenerationOptions(LONG, ignore_eos=True, drafts=False)

    def rate(count: int) -> float:
        ended, started = threading.Semaphore(0), time.perf_counter()
        for prompt in prompts[:count]:
            scheduler.submit(prompt, options, lambda step: ended.release(), every_step=False)
        for _ in range(count):
            ended.acquire()
        return count * LONG / (time.perf_counter() - started)

    rate(8)  # warm
    rates = [(rate(1), rate(8)) for _ in range(turns)]
    scheduler.close()
    one, eight = (list(each) for each in zip(*rates, strict=True))
    ratios = spread([many / single for single, many in rates])
    print(f"| {LONG} tokens, without HTTP | no | {spread(one)} | {spread(eight)} | {ratios} |", flush=True)


@dataclass
class Seen:
    """What came of a soak."""

    outcomes: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)  # seconds to the first token
    total: list[float] = field(default_factory=list)
    memory: list[tuple[int, float]] = field(default_factory=list)  # requests, MB
    faults: list[str] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return sum(self.outcomes.values())


async def streamed(client: httpx.AsyncClient, url: str, question: Question, seen: Seen) -> str:
    """The answer to a streamed request, timed."""
    started, first, text = time.perf_counter(), 0.0, ""
    async with client.stream("POST", url, json={**question.body, "stream": True}) as response:
        if response.status_code != 200:
            return f"status {response.status_code}"
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                piece = json.loads(line[6:])["choices"][0]["delta"].get("content", "")
                if piece and not first:
                    first = time.perf_counter() - started
                text += piece
    seen.first.append(first)
    seen.total.append(time.perf_counter() - started)
    return text


async def raw(url: str, question: Question, stream: bool, pace: float, drop: bool) -> str:
    """A request written by hand: slowly, or with the connection dropped once the answer has begun."""
    address = httpx.URL(url)
    reader, writer = await asyncio.open_connection(address.host, address.port)
    body = json.dumps({**question.body, "stream": stream}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    try:
        writer.write(head.encode())
        for start in range(0, len(body), len(body) // 4):
            writer.write(body[start : start + len(body) // 4])
            await writer.drain()
            await asyncio.sleep(pace)
        if drop:
            await reader.read(200)
            return ""
        answer = await reader.read()
        return str(json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["message"]["content"])
    finally:
        writer.close()


async def client_of(
    url: str, process: int, asked: list[Question], seen: Seen, chance: random.Random, left: AsyncIterator[int]
) -> None:
    """One client after the other's fashion, chosen by chance for each request."""
    path = f"{url}/v1/chat/completions"
    async with httpx.AsyncClient(timeout=120) as client:
        async for index in left:
            question, kind = chance.choice(asked), chance.random()
            found: str | None = None
            if kind < 0.45:
                name, answer = "whole", await client.post(path, json=question.body)
                found = (
                    answer.json()["choices"][0]["message"]["content"]
                    if answer.status_code == 200
                    else f"status {answer.status_code}"
                )
            elif kind < 0.75:
                name, found = "streamed", await streamed(client, path, question, seen)
            elif kind < 0.85:
                more, status = chance.choice(MALFORMED)
                name, answer = "malformed", await client.post(path, json={**question.body, **more})
                if answer.status_code != status or "error" not in answer.json():
                    seen.faults.append(f"{more} was answered with {answer.status_code}")
            elif kind < 0.90:
                name, found = "slow", await raw(url, question, False, 0.05, drop=False)
            else:
                name, _ = "dropped", await raw(url, question, True, 0, drop=True)
            if found is not None and found != question.expected:
                seen.faults.append(f"{name}: {found!r} instead of {question.expected!r}")
            seen.outcomes[name] += 1
            if index % 200 == 0:
                seen.memory.append((index, resident(process)))


async def soak(url: str, process: int, asked: list[Question], minutes: float, requests: int) -> Seen:
    seen, until, count = Seen(), time.monotonic() + 60 * minutes, itertools.count(1)

    async def left() -> AsyncIterator[int]:
        while time.monotonic() < until and (index := next(count)) <= requests:
            yield index

    chances = [random.Random(seed) for seed in range(CLIENTS)]
    await asyncio.gather(*(client_of(url, process, asked, seen, chance, left()) for chance in chances))
    return seen


def tell(seen: Seen, seconds: float) -> bool:
    """Print what came of a soak; whether it was well."""
    kinds = ", ".join(f"{count} {name}" for name, count in seen.outcomes.most_common())
    print(f"{seen.requests} requests in {seconds:.0f} s: {kinds}; {len(seen.faults)} faults")
    for name, values in (("first token", seen.first), ("whole stream", seen.total)):
        at = np.percentile(values, (50, 95, 99)) * 1000
        print(f"{name}: p50 {at[0]:.0f} ms, p95 {at[1]:.0f} ms, p99 {at[2]:.0f} ms")
    warm = [point for point in seen.memory if point[0] > WARM * seen.requests]
    slope = float(np.polyfit(*zip(*warm, strict=True), 1)[0]) * 1000
    growth = f"{warm[0][1]:.0f} MB after the warm-up, {warm[-1][1]:.0f} MB at the end"
    print(f"memory: {growth}, {slope:+.3f} MB per 1,000 requests")
    for fault in seen.faults[:10]:
        print(f"FAULT {fault}")
    return not seen.faults and slope < 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="of the tiny checkpoint in fp32")
    parser.add_argument("what", choices=("throughput", "soak"))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--requests", type=int, default=1_000_000)
    given = parser.parse_args()
    if given.what == "throughput":
        compare(given.bundle, given.turns)
        alone(given.bundle, given.turns)
        return
    asked, started = questions(given.bundle, None), time.perf_counter()
    with server(given.bundle) as (url, process):
        seen = asyncio.run(soak(url, process, asked, given.minutes, given.requests))
    if not tell(seen, time.perf_counter() - started):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
