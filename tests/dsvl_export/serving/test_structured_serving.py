"""Response formats and tools over HTTP, with the client of OpenAI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest

from tests.dsvl_export.serving.server import DESCRIBE, MODEL, Served, ask


class Entry(pydantic.BaseModel, extra="forbid"):
    number: int = pydantic.Field(ge=0, le=99)
    color: Literal["red", "green"]


class Table(pydantic.BaseModel, extra="forbid"):
    rows: list[Entry] = pydantic.Field(min_length=1, max_length=2)
    note: str = pydantic.Field(max_length=6)


WEATHER = {
    "name": "get_weather",
    "description": "Return the weather.",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"$ref": "#/$defs/City"},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
        "$defs": {"City": {"enum": ["Paris", "Rome"]}},
    },
}
TOOLS: list[Any] = [
    {"type": "function", "function": WEATHER},
    {"type": "function", "function": {"name": "stop"}},
]
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def test_parse_gives_the_model_of_pydantic(client: openai.OpenAI, pictures: list[Path]) -> None:
    messages: Any = ask(DESCRIBE, pictures[0])
    for seed in range(3):
        found = client.chat.completions.parse(
            model=MODEL, messages=messages, response_format=Table, max_tokens=120, temperature=1, seed=seed
        )
        assert isinstance(found.choices[0].message.parsed, Table)
        assert found.choices[0].finish_reason == "stop"


def test_every_form_of_a_format(client: openai.OpenAI) -> None:
    schema = Table.model_json_schema()
    forms: list[tuple[dict[str, Any], Any]] = [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "t", "schema": schema}}}, Table),
        ({"structured_outputs": {"json": schema}}, Table),
        ({"structured_outputs": {"regex": "[0-9]{3}"}}, None),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, None),
        ({"structured_outputs": {"grammar": 'start: "a" | "b" "c"'}}, None),
    ]
    for extra, model in forms:
        found = client.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=120, temperature=1, seed=1, extra_body=extra
        )
        text = found.choices[0].message.content or ""
        assert found.choices[0].finish_reason == "stop", text
        if model:
            model.model_validate_json(text)
        else:
            assert text in ("yes", "no", "a", "bc") or (text.isdigit() and len(text) == 3)
    found = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=20, response_format={"type": "json_object"}
    )
    assert (found.choices[0].message.content or "").startswith("{")


def test_a_limit_inside_an_object_is_reported(client: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model=MODEL, messages=HELLO, response_format=Table, max_tokens=5)


def test_the_answer_is_the_same_as_a_stream_and_with_neutral_values(served: Served) -> None:
    plain = served.post({"model": MODEL, "messages": HELLO, "seed": 1}).json()["choices"]
    neutral = {"response_format": {"type": "text"}, "tools": [], "tool_choice": "auto"}
    assert served.post({"model": MODEL, "messages": HELLO, "seed": 1, **neutral}).json()["choices"] == plain


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=str
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called(client: openai.OpenAI, choice: Any, stream: bool) -> None:
    for seed in range(4):
        request: dict[str, Any] = {
            "model": MODEL, "messages": HELLO, "tools": TOOLS, "tool_choice": choice, "max_tokens": 200,
            "temperature": 1, "seed": seed,
        }  # fmt: skip
        if stream:
            with client.chat.completions.stream(**request) as events:
                answer = events.get_final_completion().choices[0]
        else:
            answer = client.chat.completions.create(**request).choices[0]
        assert answer.finish_reason == "tool_calls" and not answer.message.content
        (call,) = answer.message.tool_calls or []
        if choice != "required" or call.function.name == "get_weather":
            assert call.function.name == "get_weather" and call.id.startswith("call_")
            jsonschema.validate(json.loads(call.function.arguments), WEATHER["parameters"])


def test_a_call_that_is_cut_keeps_its_braces(client: openai.OpenAI) -> None:
    """Only a complete answer has the brace that closes the call itself."""
    arguments = {"a": {"b": {"c": 1}}}
    tool = {"name": "f", "parameters": {"const": arguments}}
    request: dict[str, Any] = {
        "model": MODEL, "messages": HELLO, "tool_choice": "required",
        "tools": [{"type": "function", "function": tool}],
    }  # fmt: skip
    whole = json.dumps(arguments)
    for limit in (200, *range(30, 70, 3)):
        found = client.chat.completions.create(**request, max_tokens=limit).choices[0]
        text = found.message.tool_calls[0].function.arguments if found.message.tool_calls else ""
        pieces = []
        for event in client.chat.completions.create(**request, max_tokens=limit, stream=True):
            for call in event.choices[0].delta.tool_calls or []:
                pieces.append(call.function.arguments)
        assert "".join(pieces) == text
        assert whole.startswith(text) if found.finish_reason == "length" else text == whole


def test_the_model_may_choose_not_to_call(client: openai.OpenAI, served: Served) -> None:
    """The tiny model was not trained for tools; its text is the content, streamed or not."""
    request: dict[str, Any] = {"model": MODEL, "messages": HELLO, "tools": TOOLS, "max_tokens": 60}
    whole = client.chat.completions.create(**request).choices[0]
    assert whole.message.content and not whole.message.tool_calls
    with client.chat.completions.stream(**request) as events:
        streamed = events.get_final_completion().choices[0]
    assert (streamed.message.content, streamed.finish_reason) == (whole.message.content, whole.finish_reason)
    none = client.chat.completions.create(**request, tool_choice="none").choices[0]
    assert none.message.content


def test_a_conversation_with_results_of_tools(served: Served) -> None:
    """The prompt has the tools after the system prompt, the call, and its result."""
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
    }
    turns = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    body = {"model": MODEL, "messages": turns, "max_tokens": 5}
    plain = [
        *HELLO,
        {"role": "assistant", "content": '{"name": "get_weather", "arguments": {"city": "Rome"}}'},
        {"role": "user", "content": "Result of get_weather: sunny"},
    ]
    counts = [
        served.post({**body, "messages": messages}).json()["usage"]["prompt_tokens"]
        for messages in (turns, plain)
    ]
    assert counts[0] == counts[1]
    with_tools = served.post({**body, "tools": TOOLS, "tool_choice": "auto"}).json()
    assert with_tools["usage"]["prompt_tokens"] > counts[0] + 100


BAD: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, "wrong at /type"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "not (at /not)"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}}, "no finite answer"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 5_000_000]}}}}, "at most 100000"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "array", "minItems": 9999}}}}, "the KV cache holds 1024"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema: Field required."),
    ({"response_format": {"type": "xml"}}, "response_format: Input tag 'xml'"),
    ({"structured_outputs": {"regex": "(a{1000}){1000}"}}, "endless or too long"),
    ({"structured_outputs": {"regex": "("}}, "unclosed group"),
    ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp: Extra inputs are not permitted."),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"multipleOf": 99999999}}}}, "is above 1000"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "more than one response format"),
    ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "exclude each other"),
    ({"tools": [*TOOLS, *TOOLS]}, "Two tools have the same name."),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "names no tool of the request: x."),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "String should match pattern"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}], "tool_choice": "required"}, "wrong at tools.0.function.parameters/type"),
    ({"tools": [*TOOLS, {"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}]}, "not (at tools.2.function.parameters/not)"),
    ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "exclude each other"),
]  # fmt: skip


@pytest.mark.parametrize(("extra", "sentence"), BAD, ids=lambda item: str(item)[:40])
def test_one_sentence_says_what_is_wrong(served: Served, extra: dict[str, Any], sentence: str) -> None:
    found = served.post({"model": MODEL, "messages": HELLO, **extra})
    message = found.json()["error"]["message"]
    assert found.status_code == 400 and sentence in message and "\n" not in message, message
    assert len(message) < 500
    assert served.post({"model": MODEL, "messages": HELLO, "max_tokens": 1}).status_code == 200
