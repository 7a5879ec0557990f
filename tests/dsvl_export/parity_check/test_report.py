"""The HTML report in a real browser: nothing overflows, nothing is fetched, light and dark both read."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from dsvl_export.parity_check import parity
from dsvl_export.parity_check.report.html import render
from dsvl_export.parity_check.report.record import write_report
from reference.tiny import HELDOUT
from runtimes.bundle.bundle import Bundle
from runtimes.errors import UserError
from runtimes.goldens.task import load_task
from runtimes.session import Execution
from tests.dsvl_export.parity_check.faults import plant, scaled, weight
from tests.dsvl_export.serving.in_browser import CONTRAST, OVERFLOWING, needs_browser


@pytest.fixture(scope="module")
def pages(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports of a pass with everything in it, of a failure, and of what did not run."""
    folder = tmp_path_factory.mktemp("pages")
    images = tiny_bundle.folder / "goldens" / "images"
    passed = parity(tiny_bundle, precision="fp16", task=load_task(HELDOUT)[:20], taps=True)
    copy = Path(shutil.copytree(tiny_bundle.folder, folder / "bundle"))
    bundle = plant(copy, "fp16", "decoder", weight("layers.1.mlp.down_proj.weight_transposed", scaled(2)))
    failed = parity(bundle, precision="fp16", task=load_task(HELDOUT)[:20])
    unjudged = parity(tiny_bundle, precision="fp16")
    unjudged.execution = Execution("built only", "a TensorRT engine, and there is no GPU here")
    results = {"passed": passed, "failed": failed, "not judged": unjudged}
    return {name: write_report(tiny_bundle, result, folder, name, images) for name, result in results.items()}


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["passed", "failed", "not judged"])
def test_in_a_browser(browser: Any, pages: dict[str, Path], name: str, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    requests: list[str] = []
    problems: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(pages[name].as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    overflow = page.evaluate(OVERFLOWING)
    assert overflow == {"page": False, "found": []}
    assert page.evaluate(CONTRAST) >= 4.5
    outside = [url for url in requests if not url.startswith("data:")]
    assert outside == [pages[name].as_uri()]
    assert problems == []
    words = {"passed": "Passed", "failed": "Failed", "not judged": "Could not be judged"}
    assert page.locator(".verdict").inner_text() == words[name]
    loaded = page.evaluate("[...document.images].every(e => e.complete && e.naturalWidth > 0)")
    assert loaded
    assert page.locator("img").count() == 12
    if name == "failed":
        assert "The error begins in the decoder, layers.1." in page.locator(".summary").inner_text()
        assert page.locator("i.off").count() > 0
    else:
        assert page.locator("i.off").count() == 0
    context.close()


def test_the_page_stands_alone(pages: dict[str, Path]) -> None:
    text = pages["passed"].read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", text)
    assert "url(http" not in text
    assert "<script" not in text
    for word in ("stages", "greedy tokens", "tolerances of fp16", "error by depth", "mlperf"):
        assert word in text.lower()
    assert text.count("<svg") == 4  # the stages, and the taps of three components
    assert not re.findall(r"#(0\d)\1\1", text)  # every placeholder color became a variable


def test_plots_can_be_told_apart(pages: dict[str, Path]) -> None:
    """Identifiers of several inline SVGs must not collide."""
    ids = re.findall(r'<clipPath id="([^"]+)"', pages["passed"].read_text())
    assert ids
    assert len(ids) == len(set(ids))


def test_hostile_text_stays_text(pages: dict[str, Path], tiny_bundle: Bundle) -> None:
    document = json.loads(pages["passed"].with_suffix(".json").read_text())
    document["bundle"]["checkpoint"]["name"] = "<script>alert(1)</script>"
    document["tokens"][0]["actual_pieces"][0] = "<img src=x onerror=alert(1)>"
    text = render(document, tiny_bundle.folder / "nowhere")
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    assert "<img" not in text  # the pictures are not there any more, which is no error


def test_without_jinja_there_is_still_json(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    result = parity(tiny_bundle, precision="fp32")
    monkeypatch.setitem(sys.modules, "dsvl_export.parity_check.report.html", None)
    written = write_report(tiny_bundle, result, tmp_path / "r", "x", tmp_path)
    assert written == tmp_path / "r" / "x.json"
    assert [file.name for file in (tmp_path / "r").iterdir()] == ["x.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to"):
        write_report(tiny_bundle, result, tmp_path / "file", "x", tmp_path)
