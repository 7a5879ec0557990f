"""Forms of requests that the protocol and its clients allow, and parameters that are ignored or refused."""

from __future__ import annotations

import base64
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types.chat import completion_create_params

from dsvl_export.serving.errors import RequestError
from dsvl_export.serving.images import ImageLimits, image_file
from dsvl_export.serving.parameters import IGNORED, NEUTRAL
from dsvl_export.serving.protocol import ChatMessage, ChatRequest, parse_conversation
from dsvl_export.serving.service import ServeOptions
from runtimes.bundle.bundle import Bundle
from runtimes.text.prompt import IMAGE
from tests.dsvl_export.cli.command_line import refused
from tests.dsvl_export.serving.server import (
    DESCRIBE,
    MODEL,
    Served,
    ask,
    data_url,
    sentence,
    serving,
)

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def expected(served: Served, pictures: list[Path]) -> dict[str, Any]:
    found = served.post({"model": MODEL, "messages": ask(DESCRIBE, pictures[0])}).json()
    return {"choices": found["choices"], "tokens": found["usage"]["prompt_tokens"]}


def answer(served: Served, body: dict[str, Any], **more: Any) -> dict[str, Any]:
    found = served.post({"model": MODEL, "max_tokens": 512, **body}, **more)
    assert found.status_code == 200, found.text
    return {"choices": found.json()["choices"], "tokens": found.json()["usage"]["prompt_tokens"]}


def test_forms_of_images(served: Served, pictures: list[Path], expected: dict[str, Any]) -> None:
    """Each stands for the same picture before the same text."""
    file = pictures[0].read_bytes()
    file += bytes(-len(file) % 3 + 1)  # so that its base64 has padding
    plain, lines = base64.b64encode(file).decode(), base64.encodebytes(file).decode()
    escaped = plain.replace("+", "%2B").replace("/", "%2f").replace("=", "%3D")
    urls = [
        f"data:image/png;base64,{lines}",
        f"data:image/png;base64,{plain.rstrip('=')}",
        f"data:image/png;base64,{escaped}",
        f"data:IMAGE/PNG;Base64,{plain}",
        f"DATA:image/jpg;charset=utf-8; base64,{plain}",
        f"data:;base64,{plain}",
        f" data:image/png;base64 ,{plain}#fragment\n",
        "data:image/png," + "".join(f"%{byte:02X}" for byte in file),
        plain,
    ]
    parts: list[dict[str, Any]] = [
        *({"type": "image_url", "image_url": {"url": url, "detail": "low"}} for url in urls),
        {"type": "image_url", "image_url": urls[1], "cache_control": {"type": "ephemeral"}},
        {"type": "input_image", "image_url": urls[1], "detail": "auto"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": plain}},
        {"type": "image", "source": {"type": "url", "url": urls[1]}},
    ]
    for part in parts:
        for text in ({"type": "text", "text": DESCRIBE}, {"type": "input_text", "text": DESCRIBE}):
            for order in ([part, text], [text, part]):  # images come first
                found = answer(served, {"messages": [{"role": "user", "content": order}]})
                assert found == expected, str(part)[:80]


# What Node 20's fetch, which follows the Fetch standard, makes of a URL.
DATA_URLS: list[tuple[str, bytes | None]] = [
    ("data:;base64,aGVsbG8=", b"hello"),
    ("data:;base64,aGVsbG8", b"hello"),
    ("data:;base64,aGVs bG8=\r\n", b"hello"),
    ("data:;base64,%0AaGVs%62G8%3D", b"hello"),
    ("data:;base64,YR", b"a"),
    ("data:;base64,a#b", None),
    ("data:;base64,abcd#b", b"i\xb7\x1d"),
    ("data:;base64,aGVsbG8==", None),
    ("data:;base64,ab=", None),
    ("data:;base64,abcde", None),
    ("data:;base64,ab=c", None),
    ("data:;base64,a-_b", None),
    ("data:;base64,AA\x0b==", None),
    ("data:;base64,é", None),
    ("data:;base64,====", None),
    ("data:;base64,", b""),
    ("data:;BASE64,abcd", b"i\xb7\x1d"),
    ("data:a/b;x=y;  base64 ,abcd", b"i\xb7\x1d"),
    ("data:base64,abcd", b"abcd"),
    ("data:;x=base64,abcd", b"abcd"),
    ("data:;base64;x=y,abcd", b"abcd"),
    ("data:,a%zz%4%%41%00", b"a%zz%4%A\x00"),
    ("data:,é,b", b"\xc3\xa9,b"),
    (" data:,a b\tc\x1f", b"a bc"),
    ("data:;base64", None),
]


@pytest.mark.parametrize(("url", "content"), DATA_URLS)
def test_data_urls(url: str, content: bytes | None) -> None:
    if content is None:
        with pytest.raises(RequestError):
            image_file(url, ImageLimits(), "image 1")
    else:
        assert image_file(url, ImageLimits(), "image 1") == content


def protocol_fields() -> set[str]:
    kinds = typing.get_args(completion_create_params.CompletionCreateParams)
    return {name for kind in kinds for name in kind.__annotations__}


def test_every_field_of_the_protocol_is_known(
    served: Served, pictures: list[Path], expected: dict[str, Any]
) -> None:
    """Of the official client: each is implemented, ignored or refused by name; null is its default."""
    fields = protocol_fields()
    assert {"temperature", "store", "audio", "stream"} <= fields
    supported = set(ChatRequest.model_fields)
    assert fields <= supported | IGNORED | set(NEUTRAL)
    assert not (supported & IGNORED or supported & set(NEUTRAL) or IGNORED & set(NEUTRAL))
    nulls = dict.fromkeys(fields | set(NEUTRAL) | supported)
    body = {**nulls, "model": MODEL, "messages": ask(DESCRIBE, pictures[0])}
    assert answer(served, body) == expected


def test_what_does_not_change_the_answer_is_ignored(
    served: Served, pictures: list[Path], expected: dict[str, Any]
) -> None:
    body: dict[str, Any] = {
        **{name: {"any": [1]} for name in IGNORED},
        **{name: values[-1] for name, values in NEUTRAL.items() if values},
        "n": 1.0,
        "max_tokens": 512.0,
        "max_completion_tokens": 512,
        "stop": [],
        "logprobs": False,
        "top_logprobs": 0,
        "top_p": 0,
        "top_k": -1,
        "stream": False,
        "stream_options": {"include_usage": None, "include_obfuscation": False},
    }
    messages = ask(DESCRIBE, pictures[0])
    messages[0] |= {"name": "me", "tool_calls": [], "function_call": None, "audio": None, "anything": 1}
    assert answer(served, {**body, "messages": messages}) == expected


def test_the_order_of_a_message() -> None:
    """Texts then images: images first. Anything else keeps its order. Each message by itself."""
    one: dict[str, Any] = {"type": "image_url", "image_url": "data:,1"}
    two: dict[str, Any] = {"type": "image_url", "image_url": "data:,2"}
    a, b = {"type": "text", "text": "a"}, {"type": "text", "text": "b"}
    for parts, content, urls in (
        ([a, one], (IMAGE, "a"), "1"),
        ([a, b, two, one], (IMAGE, IMAGE, "a", "b"), "21"),
        ([one, a, b], (IMAGE, "a", "b"), "1"),
        ([a, one, b], ("a", IMAGE, "b"), "1"),
        ([one, a, two], (IMAGE, "a", IMAGE), "12"),
        ([one, two], (IMAGE, IMAGE), "12"),
        ([a, b], ("a", "b"), ""),
    ):
        messages = [ChatMessage.model_validate({"role": "user", "content": parts})]
        found = parse_conversation(messages, 16)
        assert found.turns[0].content == content
        assert [url[-1] for url in found.urls] == list(urls)


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json; charset=utf-8", 200),
        ("Application/JSON;Charset=UTF-8", 200),
        ("application/vnd.api+json", 200),
        ("", 415),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
    ],
)
def test_media_types(served: Served, kind: str, status: int) -> None:
    """A page elsewhere may send some types without asking first; those are refused."""
    content = (
        b"\xef\xbb\xbf"
        + httpx.Request("POST", "http://x", json={"model": MODEL, "messages": ask("Hi")}).content
    )
    headers = {"Content-Type": kind} if kind else {}
    assert served.post(None, content=content, headers=headers).status_code == status


@pytest.fixture(scope="module")
def with_origins(tiny_bundle: Bundle) -> Iterator[Served]:
    origins = ("http://localhost:5173", "https://a.example")
    with serving(tiny_bundle, ServeOptions(token="secret", origins=origins)) as found:
        yield found


def test_pages_elsewhere(with_origins: Served, served: Served) -> None:
    """Pages of the origins that were given may ask, errors included; others, and by default all, may not."""
    url = f"{with_origins.url}/v1/chat/completions"
    asks = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,x-stainless-os",
    }
    for origin, allowed in (
        ("http://localhost:5173", True),
        ("http://localhost:5174", False),
        ("null", False),
    ):
        preflight = httpx.options(url, headers={"Origin": origin, **asks})
        assert (preflight.status_code == 200) == allowed
        assert (preflight.headers.get("access-control-allow-origin") == origin) == allowed
        refusal = httpx.post(url, json={}, headers={"Origin": origin})
        assert refusal.status_code == 401
        assert (refusal.headers.get("access-control-allow-origin") == origin) == allowed
    assert preflight.headers.get("access-control-allow-credentials") is None
    closed = httpx.options(
        f"{served.url}/v1/chat/completions", headers={"Origin": "http://x.example", **asks}
    )
    assert closed.status_code == 405
    assert "access-control-allow-origin" not in closed.headers
    with_page = httpx.get(f"{served.url}/v1/models", headers={"Origin": "http://x.example"})
    assert "access-control-allow-origin" not in with_page.headers


def test_origins_of_the_command(run, tiny_bundle: Bundle) -> None:
    for text in ("localhost:5173", "http://a/b", "ftp://a", "null", "https://a:x", "http://u@a"):
        arguments = ("serve", str(tiny_bundle.folder), "--port", "0", "--allow-origin", text)
        assert refused(
            run(*arguments),
            f"--allow-origin must be http://HOST[:PORT], https://HOST[:PORT] or '*', not '{text}'.",
        )


def test_health_checks_without_a_body_or_a_host(served: Served) -> None:
    head = httpx.head(f"{served.url}/healthz")
    assert (head.status_code, head.content) == (200, b"")
    assert httpx.head(served.url).status_code == 200
    assert sentence(httpx.post(f"{served.url}/healthz")) == "/healthz does not support the method POST."


def test_the_openapi_document(served: Served, with_origins: Served) -> None:
    """Its schema takes what the server takes, and its paths are the routes that there are."""
    import jsonschema

    document = httpx.get(f"{served.url}/openapi.json").json()
    schema = {"$ref": "#/components/schemas/ChatRequest", "components": document["components"]}
    checker = jsonschema.Draft202012Validator(schema)
    for more, valid in (
        ({}, True), ({"n": 1}, True), ({"n": 2}, False), ({"n": None, "stream": None}, True),
        ({"unknown": 1}, False), ({"user": "me"}, True), ({"temperature": 3}, False), ({"max_tokens": 0}, False),
        ({"seed": 2**64}, False), ({"top_k": -2}, False), ({"top_logprobs": 21}, False), ({"seed": 3.0}, True),
        ({"messages": [{"role": "robot", "content": "x"}]}, False),
    ):  # fmt: skip
        body = {"model": MODEL, "messages": ask("Hello.", data_url(b"x")), **more}
        assert checker.is_valid(body) == valid, more
        if not valid:
            assert served.post(body).status_code == 400
    body = served.post(
        {"model": MODEL, "messages": ask("Hello."), "logprobs": True, "top_logprobs": 1}
    ).json()
    for name, instance in (
        ("Completion", body),
        ("Models", httpx.get(f"{served.url}/v1/models").json()),
        ("Health", httpx.get(f"{served.url}/healthz").json()),
        ("Error", served.post({}).json()),
    ):
        ref = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        jsonschema.Draft202012Validator(ref).validate(instance)
    assert set(document["paths"]) == {
        "/", "/healthz", "/metrics", "/v1/models", "/v1/models/{name}", "/v1/chat/completions",
    }  # fmt: skip
    locked = httpx.get(f"{with_origins.url}/openapi.json").json()
    assert locked["paths"]["/metrics"]["get"]["security"] == [{"bearer": []}]
    assert "security" not in locked["paths"]["/healthz"]["get"]
