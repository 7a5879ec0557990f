"""The web page of ``serve`` in a real browser: pictures, a streamed answer, errors, stop, other models."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dsvl_export.serving.service import ServeOptions
from runtimes.bundle.bundle import Bundle
from runtimes.pipeline import Pipeline
from tests.dsvl_export.serving.in_browser import CONTRAST, OVERFLOWING, needs_browser
from tests.dsvl_export.serving.server import DESCRIBE, Served, serving

Open = Callable[..., Any]


@pytest.fixture
def visit(browser: Any, served: Served) -> Iterator[Open]:
    """Opens the page; whatever it asks of other hosts or says on the console fails the test."""
    contexts: list[Any] = []
    outside: list[str] = []
    problems: list[str] = []
    reported: list[int] = []  # refusals, which the browser itself puts on the console

    def opened(url: str = served.url, width: int = 1100, scheme: str = "light", expected: int = 0) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on(
            "request", lambda request: request.url.startswith((url, "data:")) or outside.append(request.url)
        )
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(url)
        reported.append(expected)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert outside == []
    assert len(problems) == sum(reported), problems


def ask(page: Any, text: str, *pictures: Path) -> None:
    """Choose files, type, and press Enter."""
    if pictures:
        before = page.locator("#waiting img").count()
        page.set_input_files("#file", [str(picture) for picture in pictures])
        page.wait_for_selector(f"#waiting img >> nth={before + len(pictures) - 1}")
    page.locator("#question").fill(text)
    page.keyboard.press("Enter")


def answers(page: Any, count: int) -> list[str]:
    """Texts of the answers once there are so many."""
    page.wait_for_selector(f".figures >> nth={count - 1}")
    assert page.locator(".figures").count() == count
    return [str(text) for text in page.locator(".turn.assistant p").all_inner_texts()]


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (390, "dark")])
def test_a_conversation(
    visit: Open, tiny_bundle: Bundle, pictures: list[Path], width: int, scheme: str
) -> None:
    """Two turns about one picture, then one about two; figures, sizes and contrast."""
    alone = Pipeline.open(tiny_bundle, "onnxruntime", "fp32", threads=1)
    first = alone.chat(DESCRIBE, [pictures[0]]).text
    turns = [("user", DESCRIBE), ("assistant", first), ("user", "What number is in the picture?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    messages[0]["content"] = f"<image_placeholder>{DESCRIBE}"
    second = alone.chat(messages, [pictures[0]]).text
    page = visit(width=width, scheme=scheme)
    page.wait_for_selector("#model option", state="attached")
    assert page.locator("#empty").is_visible()
    ask(page, DESCRIBE, pictures[0])
    assert answers(page, 1) == [first]
    ask(page, turns[2][1])
    assert answers(page, 2) == [first, second]
    figures = page.locator(".figures").first.inner_text().replace("\u00a0", " ")
    assert figures.startswith("onnxruntime · fp32 · first token ")
    assert figures.endswith(" tokens/s")
    ask(page, "Compare them.", *pictures[1:3])
    answers(page, 3)
    assert page.locator(".turn.user img").count() == 3
    assert page.evaluate(OVERFLOWING) == {"page": False, "found": []}
    assert page.evaluate(CONTRAST) >= 4.5
    assert not page.locator("#empty").is_visible()
    page.locator("#clear").click()
    assert page.locator(".turn").count() == 0
    assert page.locator("#empty").is_visible()


@needs_browser
def test_streaming_and_stop(
    visit: Open, served: Served, tiny_bundle: Bundle, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text is there before the answer is complete; stopping frees the slot and keeps what was written."""
    chain = served.models.open_models[0].pipeline.chain
    plain = chain.decode
    monkeypatch.setattr(chain, "decode", lambda *given: time.sleep(0.25) or plain(*given))
    page = visit()
    ask(page, DESCRIBE, pictures[0])
    while " " not in page.locator(".turn.assistant p").inner_text():
        page.wait_for_timeout(20)
    assert page.locator(".turn.assistant.writing").count() == 1
    assert page.locator("#send").is_disabled()
    page.locator("#stop").click()
    (text,) = answers(page, 1)
    whole = Pipeline.open(tiny_bundle, "onnxruntime", "fp32", threads=1).chat(DESCRIBE, [pictures[0]]).text
    assert whole.startswith(text.strip())
    assert 0 < len(text) < len(whole)
    assert "stopped" in page.locator(".figures").inner_text()
    served.rests()
    monkeypatch.undo()
    ask(page, "Go on.")
    assert len(answers(page, 2)) == 2


@needs_browser
def test_pictures_can_be_dropped_and_removed(visit: Open, pictures: list[Path]) -> None:
    page = visit()
    page.evaluate(
        """([data, name]) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([Uint8Array.from(data)], name, { type: "image/png" }));
        document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
        }""",
        [list(pictures[0].read_bytes()), "a.png"],
    )
    page.wait_for_selector("#waiting img")
    page.set_input_files("#file", [str(pictures[1])])
    page.wait_for_selector("#waiting figure >> nth=1")
    page.get_by_label("Remove picture 1").click()
    assert page.locator("#waiting img").count() == 1
    page.keyboard.press("Enter")  # without a word: describe it
    page.locator("#send").click()
    assert answers(page, 1)[0].startswith("The ")
    page.set_input_files("#file", [{"name": "x.txt", "mimeType": "text/plain", "buffer": b"x"}])
    assert page.locator(".error").inner_text() == "x.txt is not a picture."


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (390, "dark")])
def test_fields_as_a_table(visit: Open, pictures: list[Path], width: int, scheme: str) -> None:
    """A schema in the panel gives a table; one that is not JSON, or refused, gives a sentence."""
    page = visit(width=width, scheme=scheme, expected=1)
    page.wait_for_selector("#model option", state="attached")
    assert not page.locator("#schema").is_visible()
    page.locator("#fields").click()
    page.locator("#schema").fill('{"type": ')
    ask(page, DESCRIBE, pictures[0])
    assert "The JSON Schema is not JSON" in page.locator(".error").inner_text()
    assert page.locator("#question").input_value() == DESCRIBE
    row = {
        "type": "object",
        "properties": {"n": {"const": 7}, "ok": {"type": "boolean"}},
        "required": ["n", "ok"],
    }
    schema = {"type": "object", "properties": {"color": {"enum": ["red", "green"]}, "rows": {
        "type": "array", "items": {**row, "additionalProperties": False}, "minItems": 2, "maxItems": 2}},
        "required": ["color", "rows"], "additionalProperties": False}  # fmt: skip
    page.locator("#schema").fill(json.dumps(schema))
    page.locator("#question").press("Enter")
    page.wait_for_selector(".figures")
    cells = page.locator(".answer > table > tr > *").all_inner_texts()
    assert cells[0] == "color" and cells[1] in ("red", "green") and cells[2] == "rows"
    inner = page.locator(".answer table table tr").all_inner_texts()
    assert inner[0].split() == ["n", "ok"] and len(inner) == 3
    assert all(text.split()[0] == "7" and text.split()[1] in ("true", "false") for text in inner[1:])
    assert page.evaluate(OVERFLOWING) == {"page": False, "found": []}
    assert page.evaluate(CONTRAST) >= 4.5
    page.locator("#schema").fill('{"type": "foo"}')
    ask(page, "Again")
    page.wait_for_selector(".error >> nth=1")
    assert "The JSON Schema is wrong at /type" in page.locator(".error").last.inner_text()
    page.locator("#fields").click()
    ask(page, DESCRIBE)
    page.wait_for_selector(".turn.assistant p")


@needs_browser
def test_by_keyboard_alone(visit: Open) -> None:
    page = visit()
    page.wait_for_selector("#model option", state="attached")
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.type("Hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("there.")
    assert page.locator("#question").input_value() == "Hello\nthere."
    reached = []
    for _ in range(4):
        page.keyboard.press("Shift+Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    assert {"clear", "model"} <= set(reached)
    page.locator("#question").focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "add"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "fields"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # on "Ask"
    answers(page, 1)


@needs_browser
def test_other_models_and_errors(visit: Open, served: Served, pictures: list[Path]) -> None:
    page = visit(expected=1)
    page.wait_for_selector("#model option >> nth=1", state="attached")
    page.select_option("#model", "onnxruntime/fp16")
    ask(page, DESCRIBE, pictures[0])
    answers(page, 1)
    assert page.locator(".figures").inner_text().replace("\u00a0", " ").startswith("onnxruntime · fp16")
    ask(page, "word " * 5000)  # too long: announced, and the question can be edited
    page.wait_for_selector(".error")
    assert "tokens but the KV cache holds" in page.locator(".error").inner_text()
    assert page.locator("#question").input_value().startswith("word word")
    ask(page, "And now?")
    assert len(answers(page, 2)) == 2  # the refused question is not part of the conversation


@needs_browser
def test_a_server_with_a_key(visit: Open, tiny_bundle: Bundle) -> None:
    with serving(tiny_bundle, ServeOptions(token="secret")) as locked:
        page = visit(locked.url, expected=2)
        page.wait_for_selector("#key")
        page.locator("#token").fill("wrong")
        page.keyboard.press("Enter")
        page.wait_for_timeout(200)
        assert page.locator("#key").is_visible()
        page.locator("#token").fill("secret")
        page.keyboard.press("Enter")
        page.wait_for_selector("#model option", state="attached")
        assert not page.locator("#key").is_visible()
        ask(page, "Hello.")
        answers(page, 1)
