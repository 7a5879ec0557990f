"""A checkpoint's chat template against the built-in prompt format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import reference.checkpoint.chat_template
from reference.checkpoint.chat_template import describe_template_difference
from reference.checkpoint.checkpoint import open_checkpoint
from reference.checkpoint.specs import prompt_spec
from reference.tiny import TINY
from runtimes.text.prompt import SYSTEM_PROMPT

# DeepSeek-VL's format, by transformers' rules: parts, stripped ends, a space between texts, named other roles.
SAME = f"""{SYSTEM_PROMPT}

{{% for m in messages -%}}
{{%- if m.role == 'user' %}}User: {{% else %}}{{{{ m.role.capitalize() + ': ' }}}}{{% endif -%}}
{{%- for part in m.content -%}}
{{%- if part.type == 'image' -%}}<image_placeholder>
{{%- else -%}}
{{%- if not loop.first and loop.previtem.type == 'text' %}}{{{{ ' ' }}}}{{% endif -%}}
{{{{ part.text }}}}
{{%- endif -%}}
{{%- endfor -%}}
{{{{ '\\n\\n' if m.role == 'user' else eos_token }}}}
{{%- endfor -%}}
{{{{ 'Assistant:' if add_generation_prompt }}}}"""
TEXTS = (
    f"{{{{ bos_token }}}}{SYSTEM_PROMPT}\n\n{{% for m in messages %}}{{{{ m.role.capitalize() + ': ' + m.content }}}}"
    "{{ '\\n\\n' if m.role == 'user' else eos_token }}{% endfor %}Assistant:"
)


def difference(folder: Path, name: str, content: str) -> str:
    """Of tiny with a file besides."""
    for file in ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"):
        shutil.copyfile(TINY / file, folder / file)
    (folder / name).write_text(content, encoding="utf-8")
    checkpoint = open_checkpoint(str(folder))
    return describe_template_difference(checkpoint, prompt_spec(checkpoint))


def in_json(template: str) -> str:
    return json.dumps({"chat_template": template})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", SAME),
        ("chat_template.json", in_json(SAME)),
        ("tokenizer_config.json", in_json(TEXTS)),
        ("tokenizer_config.json", "{}"),
    ],
)
def test_the_same_format(tmp_path: Path, name: str, content: str) -> None:
    assert difference(tmp_path, name, content) == ""


@pytest.mark.parametrize(
    ("template", "clause"),
    [
        (SAME.replace("User: ", "<|user|>"), "<|user|>Hello\\n\\nAss.+User: Hello\\n\\nAss"),
        (SAME.replace("{{ ' ' }}", ""), "User: One.Two?"),
        (SAME.replace("capitalize", "upper"), "ASSISTANT: A circle"),
        ("{{ messages[0].nothing.at_all }}", "it cannot be evaluated (UndefinedError"),
        ("{% for", "it cannot be evaluated (TemplateSyntaxError"),
        ("{{ ''.__class__.__mro__ }}", "it cannot be evaluated (SecurityError"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ],
)  # fmt: skip
def test_another_format_is_one_sentence(tmp_path: Path, template: str, clause: str) -> None:
    found = difference(tmp_path, "chat_template.jinja", template)
    assert found.startswith(
        "The chat template in chat_template.jinja differs from the built-in prompt, which is"
    )
    for part in clause.split(".+"):
        assert part in found


def test_a_template_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference.checkpoint.chat_template, "RENDER_TIMEOUT_SECONDS", 1.0)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    assert "it takes more than 1 seconds" in difference(tmp_path, "chat_template.jinja", endless)
