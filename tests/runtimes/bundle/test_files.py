"""JSON, YAML and tensor files of strangers; writes that meet, break off, or find a link in their place."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from runtimes.bundle.files import read_json, read_json_lines, write_bytes
from runtimes.bundle.yaml_files import read_yaml
from runtimes.embedding import TokenEmbedding
from runtimes.errors import UserError

BAD_JSON = {
    "{": "is not valid JSON: Expecting property name",
    '{"a": NaN}': "NaN is not a number",
    '{"a": [-Infinity]}': "-Infinity is not a number",
    '{"a": 1e999}': "the number 1e999 is too large",
    '{"a": ' + "9" * 5000 + "}": "has more than 64 bits",
    '{"a": 18446744073709551616}': "has more than 64 bits",
    '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}": "nested too deeply",
    '{"a": ' + "[" * 100 + "]" * 100 + "}": "more than 64 levels",
    '{"a": 1, "a": 2}': "the key 'a' occurs twice",
    '{"a": "\\ud800"}': "half a surrogate pair",
    '\ufeff{"a": 1}': "begins with a byte order mark",
    "[1]": "contains a JSON list, expected an object",
}
GOOD_JSON = (
    '{"a": "\\ud83d\\ude00 \\\\ud800", "b": -9223372036854775808, "c": 18446744073709551615, "d": 1e300}'
)


@pytest.mark.parametrize("text", BAD_JSON)
def test_json_of_strangers_is_refused_in_one_sentence(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(text.encode())
    with pytest.raises(UserError) as caught:
        read_json(file)
    assert BAD_JSON[text] in str(caught.value)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_ordinary_json_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(GOOD_JSON)
    found = read_json(tmp_path / "config.json")
    assert found == {"a": "😀 \\ud800", "b": -(2**63), "c": 2**64 - 1, "d": 1e300}


def test_only_regular_files_of_a_bounded_size_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name in ("pipe.json", "zero.json", "."):
        with pytest.raises(UserError, match="is not a regular file"):
            read_json(tmp_path / name)
    (tmp_path / "huge.json").touch()
    os.truncate(tmp_path / "huge.json", 1 << 40)  # a file with a hole
    with pytest.raises(UserError, match="has more than 32000000 bytes"):
        read_json(tmp_path / "huge.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path / "a\0b")


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085", "\v", "\f", "\x1c", "\x1e"])
def test_json_lines_end_at_line_feeds_alone(mark: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"one{mark}two"}, {"prompt": "three"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    for name, content in {
        "unix": text,
        "windows": text.replace("\n", "\r\n"),
        "marked": "\ufeff" + text,
    }.items():
        (tmp_path / name).write_bytes(content.encode())
        assert list(read_json_lines(tmp_path / name, "task file")) == list(enumerate(rows, 1))


def test_a_bad_json_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "task.jsonl"
    for line in (b'{"a": NaN}', b"\xff", b"[" * 100_000):
        file.write_bytes(b'{"a": 1}\n\n' + line)
        with pytest.raises(UserError, match=r"Line 3 of .*task\.jsonl is not valid JSON"):
            list(read_json_lines(file, "task file"))
    with pytest.raises(UserError, match="The task file .* cannot be read: Is a directory"):
        list(read_json_lines(tmp_path, "task file"))


LAUGHS = "\n".join(
    ["a0: &a0 [x,x,x,x,x,x,x,x,x]", *(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))]
)
BAD_YAML = {
    LAUGHS: "anchors and aliases",
    "a: !!python/object/apply:os.system [id]": "the tag .* is not supported",
    "a: !!binary aGk=": "the tag .* is not supported",
    "a: " + "[" * 10_000: "more than 64 levels",
    "a: .inf": "is not a finite number",
    "a: .nan": "is not a finite number",
    "a: " + "9" * 5000: "has more than 64 bits",
    "a: 2001-99-99": "is not valid YAML: month must be in",
    "a: 1\na: 2": "a key occurs twice",
    "{[1]: 2}": "unhashable key",
    "a: b: c": r"there is a second ':' in the value; put .* \(line 1, column 5\)",
    "a: \x00": "it has a control character; remove it",
    "a:\n\tb: 1": r"the indentation has a tab; use spaces \(line 2, column 1\)",
    "a: @x": "text that starts with @ must be in quotes",
    "a: 'x": "a quote is not closed",
    "a: [1, 2": "a ',' or the closing ']' is missing",
    "a: {b: 1": "a ',' or the closing '}' is missing",
    "a: [": "a value or a closing bracket is missing",
    "a: 1\nb\nc: 2": r"the key has no ':' after it \(line 3",
    "- a\nb: 1": "the indentation differs from that of the lines before",
    "--- 1\n--- 2": "there is more than one document or value",
    "#" + "x" * 300_000: "has more than 200000 bytes",
}


@pytest.mark.parametrize("text", BAD_YAML)
def test_yaml_of_strangers_is_refused_in_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(UserError, match=BAD_YAML[text]) as caught:
        read_yaml(tmp_path / "plan.yaml", "precision plan")
    assert "\n" not in str(caught.value)


def test_headers_of_tensor_files_are_bounded(tmp_path: Path) -> None:
    file = tmp_path / "table.safetensors"

    def refused(header: bytes, size: int | None = None) -> str:
        file.write_bytes((len(header) if size is None else size).to_bytes(8, "little") + header + bytes(64))
        with pytest.raises(UserError) as caught:
            TokenEmbedding(file)
        return str(caught.value)

    assert "too long" in refused(b"{}", 2**63)
    assert "nested too deeply" in refused(b"[" * 100_000)
    entry = '{{"token_embedding": {{"dtype": "F32", "shape": {}, "data_offsets": [0, 64]}}}}'
    for shape in ("[4]", "[-4, -4]", "[true, 4]", "[4000000000, 4000000000]", '["a", 4]', "[4, 5]"):
        assert "is not readable" in refused(entry.format(shape).encode())


def _write(folder: Path, number: int) -> None:
    for _ in range(40):
        write_bytes(folder / "manifest.json", f"{number}".encode() * 10_000)


def test_processes_that_write_one_file_at_once_do_not_meet(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write, args=(tmp_path, number)) for number in range(1, 7)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    content = (tmp_path / "manifest.json").read_bytes()
    assert len(content) == 10_000 and len(set(content)) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["manifest.json"]


def test_a_write_follows_no_link_and_keeps_the_usual_rights(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "manifest.json").symlink_to(outside)
    (bundle / "manifest.json.tmp").symlink_to(outside)
    write_bytes(bundle / "manifest.json", b"new")
    assert outside.read_text() == "mine"
    assert not (bundle / "manifest.json").is_symlink()
    assert (bundle / "manifest.json").stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


SAVE = """
import sys, numpy as np
from pathlib import Path
from runtimes.bundle.tensor_files import save_tensors
texts = {name: name for name in ("checkpoint", "prompt", "images", "a", "b", "é\\n\\x01")}
save_tensors({"b": np.arange(3), "a": np.ones((2, 2), np.float16)}, Path(sys.argv[1]), texts)
"""


def test_tensor_files_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    from safetensors import safe_open

    contents = set()
    for seed in range(4):
        file = tmp_path / f"{seed}.safetensors"
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        subprocess.run([sys.executable, "-c", SAVE, str(file)], check=True, env=environment)
        contents.add(file.read_bytes())
    assert len(contents) == 1
    with safe_open(file, framework="np") as handle:
        assert handle.metadata()["é\n\x01"] == "é\n\x01"
        assert np.array_equal(handle.get_tensor("b"), np.arange(3))
