"""Malformed HTTP requests against ``dsvl-export serve``.

    python benchmarks/robustness/http_requests.py BUNDLE --requests 20000 --seed 0

The server runs in a process of its own, on a bundle of the tiny checkpoint. A third of the requests are
mutated as bytes (heads, chunks, pipelines, truncations), a third in the JSON of their bodies, a third in
their images and URLs. The same seed sends the same requests. Exit code 1 says that one was answered with
500 or not in the form of the protocol, that one was not answered within 20 seconds, that the server ended,
logged a traceback or does not answer well afterward, or that its memory grows.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from load import resident

CLIENTS = 6
HANG_SECONDS = 20.0
PATIENCE = 0.15  # seconds for an answer to bytes that may not be a whole request
WARM = 0.3  # of the requests, before memory counts
MOST_GROWTH = 30.0  # MB
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LEAVE = b"HTTP/1.1 100 Continue\r\n\r\n"
LITERALS = (  # as they stand in a body
    "NaN", "Infinity", "-Infinity", "1e999", "-0", "1" * 5000, "0.1e-400", "9" * 19, "-1", "true", "null",
    "{}", "[]", '""', '"\\ud800"', '"\\udc00x"', '"\\u0000"', '"' + "x" * 5000 + '"', "[" * 200 + "]" * 200,
    '{"a":' * 90 + "1" + "}" * 90, '{"a": 1, "a": 2}', '"<image_placeholder>"', '"<｜end▁of▁sentence｜>"',
    '"' + " " * 3000 + '"', "[[[]]]", "tru", "'x'", "0x10", "1.", "\x00", '"\n"', '"\\x"',
)  # fmt: skip
NAMES = (
    "n", "tools", "user", "metadata", "max_tokens", "max_token", "temperature", "stop", "seed", "stream",
    "logprobs", "top_logprobs", "top_k", "logit_bias", "response_format", "messages", "model", "", "\\ud800",
    "__proto__", "é",
)  # fmt: skip


@dataclass
class Seen:
    """What came of the requests."""

    statuses: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)  # MB


HEADERS = (
    b"Content-Length: -1", b"Content-Length: " + b"9" * 5000, b"Content-Length: 5",
    b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip", b"Expect: 100-continue", b" folded: x",
    b"Upgrade: websocket\r\nConnection: Upgrade", b"Authorization: Bearer \xff\xfe", b"Host: a",
    b"Content-Encoding: gzip", b"Content-Type: multipart/form-data", b"Origin: http://evil.example",
    b"Connection: close", b"X\x00: y", b"Range: bytes=0-",
)  # fmt: skip
REPLACED: tuple[tuple[bytes, tuple[bytes, ...]], ...] = (
    (b"\r\n", (b"\n",)),
    (b"HTTP/1.1", (b"HTTP/1.0", b"HTTP/2", b"http/1.1", b"")),
    (b"/v1/chat", (b"/v1/../v1/chat", b"/%00", b"//", b"*", b"/" * 9000, b"/%ff%fe", b"http://a/")),
    (b"POST", (b"PUT", b"HEAD", b"OPTIONS", b"CONNECT", b"P\x00ST")),
    (b"Host: localhost", (b"Host: evil.example", b"Host:", b"A: b")),
)


def body_of(chance: random.Random, files: list[bytes]) -> dict[str, Any]:
    """A valid request."""
    url = f"data:image/png;base64,{base64.b64encode(chance.choice(files)).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    return {
        "model": "onnxruntime/fp32",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": parts if chance.random() < 0.5 else "Hello."},
        ],
        "max_tokens": chance.randint(1, 4),
        "temperature": chance.choice((0, 1, 0.5)),
        "stop": ["x"],
        "stream": chance.random() < 0.3,
    }


def request_of(body: bytes) -> bytes:
    return HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)


def mutated_bytes(chance: random.Random, files: list[bytes]) -> bytes:
    """A request whose bytes are changed, also those of its head."""
    body = json.dumps(body_of(chance, files)).encode()
    data = chance.choice(
        (
            request_of(body),
            b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"GET /v1/models HTTP/1.0\r\n\r\n",
            HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body),
        )
    )
    for _ in range(chance.randint(1, 4)):
        data = edited(chance, data)
    return data


def edited(chance: random.Random, data: bytes) -> bytes:
    """One change of a request's bytes."""
    end = max(data.find(b"\r\n\r\n"), 1)
    lines, rest = data[:end].split(b"\r\n"), data[end:]
    at = chance.randrange(end if chance.random() < 0.7 else len(data) or 1)
    kind = chance.randrange(10)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + chance.randbytes(chance.randint(1, 8)) + data[at + chance.randint(0, 1) :]
    if kind == 2:
        return data[:at] + data[at + chance.randint(1, 20) :]
    if kind == 3:
        return data + data
    if kind == 4:
        return b"\r\n".join([*lines[:1], chance.choice(lines), *lines[1:]]) + rest
    if kind == 5:
        return b"\r\n".join([*lines, b"X: " + b"y" * chance.choice((1, 20_000, 90_000))]) + rest
    if kind == 6:
        return b"\r\n".join([*lines, *[b"X-%d: y" % index for index in range(100)]]) + rest
    if kind == 7:
        return b"\r\n".join([*lines, chance.choice(HEADERS)]) + rest
    old, new = chance.choice(REPLACED)
    return data.replace(old, chance.choice(new))


def mutated_json(chance: random.Random, files: list[bytes]) -> bytes:
    """A request in whose body values, names and pieces of text are changed."""
    marks: dict[str, str] = {}

    def literal() -> str:
        mark = f"mark{len(marks)}"
        marks[json.dumps(mark)] = chance.choice(LITERALS)
        return mark

    body = body_of(chance, files)
    for _ in range(chance.randint(1, 3)):
        places: list[tuple[Any, Any]] = []
        stack: list[Any] = [body]
        while stack:
            item = stack.pop()
            keys = list(item) if isinstance(item, dict) else range(len(item))
            places += [(item, key) for key in keys]
            stack += [item[key] for key in keys if isinstance(item[key], (dict, list))]
        item, key = chance.choice(places) if places else (body, "model")
        kind = chance.random()
        if kind < 0.6:
            item[key] = literal()
        elif kind < 0.75:
            del item[key]
        elif kind < 0.95:
            body[chance.choice(NAMES)] = literal()
        elif isinstance(item, list):
            item *= chance.choice((2, 40))
    text = json.dumps(body)
    for mark, value in marks.items():
        text = text.replace(mark, value)
    text = text.replace("\\\\ud800", "\\ud800")
    data = text.encode()
    if chance.random() < 0.2:
        at = chance.randrange(len(data) + 1)
        data = data[:at] + chance.choice((b"", b"\xff", b"\x00", b'"', b"}", b",")) + data[at + 1 :]
    return request_of(data)


def mutated_image(chance: random.Random, files: list[bytes]) -> bytes:
    """A request whose image, or the URL of it, is changed."""
    file = bytearray(chance.choice(files))
    for _ in range(chance.randint(0, 6)):
        at = chance.randrange(len(file)) if chance.random() < 0.6 else chance.randrange(min(len(file), 64))
        file[at : at + chance.choice((0, 1, 1, 1, 4))] = chance.randbytes(chance.choice((1, 1, 2, 4)))
    if chance.random() < 0.2:
        del file[chance.randrange(len(file)) :]
    text = base64.b64encode(file).decode()
    head = chance.choice(
        ("data:image/png;base64,", "data:;base64,", "data:,", "DATA:x;BASE64,", "data:", "", "http:")
    )
    at = chance.randrange(len(text) + 1)
    text = text[:at] + chance.choice(("", "", "", "\n", "=", "%", "%3D", "é", "-", " ")) + text[at:]
    url: Any = chance.choice((head + text, {"url": head + text}, {"url": head + text, "detail": 1}))
    body = body_of(chance, files)
    body["messages"][1]["content"] = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "x"}]
    return request_of(json.dumps(body).encode())


Make = Callable[[random.Random, list[bytes]], bytes]
KINDS: tuple[tuple[str, Make], ...] = (
    ("bytes", mutated_bytes), ("json", mutated_json), ("image", mutated_image),
)  # fmt: skip


async def send(url: str, data: bytes, whole: bool) -> bytes:
    """What is answered to bytes; nothing, if the server waits for more of what is not ``whole``."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    answer = b""
    try:
        writer.write(data)
        until = time.monotonic() + (HANG_SECONDS if whole else PATIENCE)
        while not complete(answer):
            part = await asyncio.wait_for(reader.read(1 << 16), max(until - time.monotonic(), 0.001))
            if not part:
                break
            answer += part
            if answer == LEAVE:
                answer = b""
            elif answer:
                until = time.monotonic() + HANG_SECONDS  # an answer that has begun goes on
    except asyncio.TimeoutError:
        if whole or answer:
            raise
    except ConnectionError:  # closed while bytes that are not read any more were sent
        pass
    finally:
        writer.close()
    return answer


def complete(answer: bytes) -> bool:
    """Whether an answer has all of its body."""
    head, blank, body = answer.partition(b"\r\n\r\n")
    if not blank:
        return False
    lower = head.lower()
    if b"transfer-encoding: chunked" in lower:
        return body.endswith(b"0\r\n\r\n")
    lengths = [int(line[15:]) for line in lower.splitlines() if line.startswith(b"content-length:")]
    return bool(lengths) and (len(body) >= lengths[0] or b"405" in head[:12])


def judge(answer: bytes, seen: Seen, what: str) -> None:
    """Count the status of an answer, and note what is wrong with it."""
    if not answer:
        seen.statuses[f"{what}: none"] += 1
        return
    head, _, body = answer.partition(b"\r\n\r\n")
    status = head[9:12].decode("latin-1")
    seen.statuses[f"{what}: {status}"] += 1
    if status == "500" or (b"server_error" in body and b" 503 " not in head[:14]):
        seen.faults.append(f"{what}: {answer[:400]!r}")
    elif status >= "400" and (body := body.split(b"HTTP/1.1 ")[0]):  # of pipelined ones, the first
        try:
            json.loads(body)["error"]["message"]
        except (ValueError, KeyError) as error:
            seen.faults.append(f"{what}: {error!r} in {answer[:400]!r}")


async def attack(url: str, requests: int, seed: int, memory: Callable[[], float]) -> Seen:
    """Send mutated requests from several clients at once."""
    seen, files, numbers = Seen(), pictures(), itertools.count()

    async def client() -> None:
        while (number := next(numbers)) < requests:
            chance = random.Random(f"{seed} {number}")
            what, make = (("bytes", mutated_bytes), ("json", mutated_json), ("image", mutated_image))[
                number % 3
            ]
            data = make(chance, files)
            try:
                judge(await send(url, data, whole=what != "bytes"), seen, what)
            except asyncio.TimeoutError:
                seen.faults.append(f"{what}: request {number} was not answered: {data[:400]!r}")
            if number % 100 == 0:
                seen.memory.append(memory())

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    last = await send(url, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n", whole=True)
    if not last.startswith(b"HTTP/1.1 200"):
        seen.faults.append(f"afterward: {last!r}")
    return seen


def pictures() -> list[bytes]:
    """Small pictures of each format."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 3), np.uint8)
    found = []
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind)
        found.append(file.getvalue())
    return found


@contextmanager
def server(bundle: Path, log: BinaryIO) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "dsvl_export.cli", "serve", str(bundle), "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:
        assert process.stdout
        try:
            yield process.stdout.readline().split()[3], process
        finally:
            process.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="of the tiny checkpoint in fp32")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    started = time.perf_counter()
    with TemporaryFile() as log:
        with server(given.bundle, log) as (url, process):
            seen = asyncio.run(attack(url, given.requests, given.seed, lambda: resident(process.pid)))
            if process.poll() is not None:
                seen.faults.append(f"the server ended with {process.returncode}")
        log.seek(0)
        logged = log.read().decode(errors="replace")
    if (at := logged.find("Traceback")) >= 0:
        seen.faults.append(
            f"{logged.count('Traceback')} tracebacks in the log: {logged[at - 200 : at + 2500]}"
        )
    print(f"{given.requests} requests in {time.perf_counter() - started:.0f} s, {len(seen.faults)} faults")
    for name, count in sorted(seen.statuses.items()):
        print(f"  {name}: {count}")
    warm = seen.memory[int(len(seen.memory) * WARM) :]
    growth = warm[-1] - warm[0]
    print(f"memory: {warm[0]:.0f} MB after {WARM:.0%} of the requests, {warm[-1]:.0f} MB at the end")
    for fault in seen.faults[:10]:
        print(f"FAULT {fault}")
    if seen.faults or growth > MOST_GROWTH:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
