"""Publishing a bundle: the model card, and an upload to a stand-in of the hub that can be downloaded again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dsvl_export.parity_check import parity
from dsvl_export.parity_check.report.record import record_verdict
from dsvl_export.publish.model_card import CardOptions, model_card
from dsvl_export.publish.push import files_to_publish, parse_repository
from runtimes.bundle.bundle import Bundle
from runtimes.errors import UserError
from tests.hub_server import running_hub

PUSH = """
import sys
from dsvl_export.publish.model_card import CardOptions
from dsvl_export.publish.push import parse_repository, push
from runtimes.bundle.bundle import Bundle
print(push(Bundle.open(sys.argv[1]), parse_repository(sys.argv[2]), CardOptions("deepseek-ai/deepseek-vl-1.3b-chat")))
"""
PULL = """
import sys
from runtimes.bundle.bundle import Bundle
from runtimes.hub import HubId, download
bundle = Bundle.open(download(HubId.parse(sys.argv[1])).folder)
bundle.check(sorted(bundle.manifest.files))
print(bundle.folder)
"""


PUSH_TWICE = f"""
from runtimes.errors import UserError
for _ in range(2):
    try:
{"".join(f"        {line}{chr(10)}" for line in PUSH.strip().splitlines())}
    except UserError as error:
        print(str(error).replace("\\n", " "))
"""


def run_in(environment: dict[str, str], code: str, *arguments: str) -> str:
    """In a process of its own, since ``huggingface_hub`` reads its environment when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_a_pushed_bundle_comes_back(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with running_hub() as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "token"}
        address = run_in(
            {**settings, "HF_HOME": str(tmp_path / "a")}, PUSH, str(tiny_bundle.folder), "org/made"
        )
        repository = hub.repositories["org/made"]
        assert address == f"{hub.url}/org/made/commit/{repository.refs['main']}"
        assert len(repository.commits) == 2  # one is the empty repository's
        folder = Path(run_in({**settings, "HF_HOME": str(tmp_path / "b")}, PULL, "org/made"))
    names = {*tiny_bundle.manifest.files, "manifest.json", "README.md", ".gitattributes"}
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert there == names
    assert (folder / "README.md").read_text() == model_card(
        tiny_bundle, "org/made", CardOptions("deepseek-ai/deepseek-vl-1.3b-chat")
    )


def test_a_commit_that_fails_leaves_an_empty_repository(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """The message says so, unless the repository was there before."""
    with running_hub() as hub:
        hub.refuses_commits = True
        settings = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "token"}
        environment = {**os.environ, **settings, "HF_HOME": str(tmp_path)}
        command = [sys.executable, "-c", PUSH_TWICE, str(tiny_bundle.folder), "org/made"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert len(hub.repositories["org/made"].commits) == 1
    first, second = done.stdout.strip().splitlines()
    assert "The repository org/made was created and is empty: run the same command again, or delete" in first
    assert "was created" not in second


def test_the_card(tiny_bundle: Bundle) -> None:
    card = model_card(tiny_bundle, "org/made", CardOptions("a/b", "mit"))
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "dsvl-export", "pipeline_tag": "image-text-to-text", "tags": ["deepseek-vl", "dsvl-export"],
        "base_model": "a/b", "license": "mit",
    }  # fmt: skip
    assert "| onnxruntime | fp16 |" in body
    assert "dsvl-export run org/made --backend onnxruntime --precision fp32" in body
    assert tiny_bundle.manifest.checkpoint["sha256"] in body
    front = model_card(tiny_bundle, "org/made", CardOptions()).split("---\n")[1]
    assert yaml.safe_load(front)["license_name"] == "deepseek"


def test_the_figures_of_a_verdict(bundle_copy: Path) -> None:
    opened = Bundle.open(bundle_copy)
    result = parity(opened, precision="fp32")
    report = record_verdict(opened, result)
    opened = Bundle.open(bundle_copy)
    (row,) = [
        line for line in model_card(opened, "org/made", CardOptions()).splitlines() if "| fp32 |" in line
    ]
    errors = [result.stage(name).errors for name in ("prefill_logits", "teacher_forced_logits")]
    figures = " | ".join(f"{each.relative_rms:.1e}" for each in errors if each)
    assert "passed (ran on" in row
    assert row.endswith(f"| {figures} |")
    document = json.loads(report.with_suffix(".json").read_text())
    for broken in ({"stages": [{"name": "prefill_logits"}]}, {"stages": 3}):
        report.with_suffix(".json").write_text(json.dumps({**document, **broken}))
        with pytest.raises(UserError, match="is not a parity report; run parity again"):
            model_card(opened, "org/made", CardOptions())


def test_links_among_the_reports_are_not_published(bundle_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    opened = Bundle.open(bundle_copy)
    report = record_verdict(opened, parity(opened, precision="fp32")).with_suffix(".json")
    report.unlink()
    report.symlink_to(tmp_path / "secret")
    assert f"reports/{report.name}" not in files_to_publish(Bundle.open(bundle_copy))
    (bundle_copy / "reports").rename(tmp_path / "elsewhere")
    (bundle_copy / "reports").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link"):
        files_to_publish(Bundle.open(bundle_copy))


@pytest.mark.parametrize("text", ["made", "a/b/c", "", "/tmp/x", "org/"])
def test_names_of_repositories(text: str) -> None:
    with pytest.raises(UserError, match="is not the name of a repository; give ORG/NAME"):
        parse_repository(text)
