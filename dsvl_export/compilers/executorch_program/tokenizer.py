r"""The checkpoint's tokenizer in a form that ExecuTorch's C++ tokenizer reads correctly.

That tokenizer keeps only the matches of a ``Split`` and drops the text between them. It has no
``Metaspace`` and not all decoder steps, and it passes patterns to RE2 or PCRE2, whose ``\s`` and
``$`` differ from Oniguruma's. So each step is written as a pattern that matches all of the text,
piece by piece.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from runtimes.backends.executorch_tokenizer import describe_differences, tokenizer_differences
from runtimes.bundle.files import write_text
from runtimes.errors import UserError
from runtimes.text.tokenizer_file import read_tokenizer

Step = dict[str, Any]
# Unicode's White_Space (PropList.txt), which Oniguruma's \s is.
SPACES = r"\t-\r \x{85}\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000}"
ESCAPES = {
    r"\s": f"[{SPACES}]", r"\S": f"[^{SPACES}]", r"\d": r"\p{Nd}", r"\D": r"\P{Nd}", r"\h": "[0-9A-Fa-f]",
    "$": r"(?=\n|\z)", "^": r"(?:\A|(?<=\n))",
}  # fmt: skip
ESCAPES_IN_CLASS = {r"\s": SPACES, r"\d": r"\p{Nd}", r"\D": r"\P{Nd}", r"\h": "0-9A-Fa-f"}
DECODERS = ("Replace", "ByteFallback", "Fuse", "ByteLevel")


def write_runner_tokenizer(file: Path, original: Path) -> str:
    """Write the runner's tokenizer file if it gives the original's tokens for all test texts.

    Returns:
        How many texts were compared, or, beginning with ``none``, why there is no file.
    """
    try:
        raw = json.loads(read_tokenizer(original).to_str())
        write_text(file, json.dumps(rewrite_tokenizer(raw), ensure_ascii=False))
        different, compared = tokenizer_differences(file, original)
        if not different:
            return f"equal on {compared} texts"
        reason = f"it tokenizes {len(different)} texts differently: {describe_differences(different)}"
    except UserError as error:
        reason = str(error).rstrip(".")
    file.unlink(missing_ok=True)
    return f"none: {reason}"


def rewrite_tokenizer(raw: Step) -> Step:
    """Rewrite a ``tokenizer.json`` of ``tokenizers`` for the same tokens in the C++ tokenizer."""
    normalizers = [_normalizer(step) for step in _flat(raw["normalizer"], "normalizers")]
    splits: list[Step] = []
    for step in _flat(raw["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace" and not splits:
            normalizers += _spaces_replaced(step)
            splits += [_split(step["replacement"], "MergedWithNext")] if step["split"] else []
        elif step["type"] == "Split":
            pattern = step["pattern"]
            regex = translate(pattern["Regex"]) if "Regex" in pattern else re.escape(pattern["String"])
            splits.append(_split(regex, step["behavior"], step["invert"]))
        else:
            splits.append(step)
    decoders = [_decoder(step) for step in _flat(raw["decoder"], "decoders")]
    return {
        **raw,
        "normalizer": _sequence(normalizers, "normalizers"),
        "pre_tokenizer": _sequence(splits, "pretokenizers"),
        "post_processor": None,  # the app writes BOS itself
        "decoder": _sequence([step for step in decoders if step["type"] in DECODERS], "decoders"),
    }


def translate(pattern: str) -> str:
    """Translate an Oniguruma pattern into one that RE2 and PCRE2 read the same way."""
    depth, parts = 0, list[str]()
    for token in re.findall(r"\\.|.", pattern, re.DOTALL):
        first = token == "^" and depth and parts[-1] == "["
        known = {} if first else ESCAPES_IN_CLASS if depth else ESCAPES
        parts.append(known.get(token, token))
        depth += (token == "[") - (token == "]" and depth > 0)
    return "".join(parts)


def _split(regex: str, behavior: str, invert: bool = False) -> Step:
    """Build a step whose matches are all pieces of a ``Split``.

    The behaviors are those of tokenizers' ``SplitDelimiterBehavior``.
    """
    match, other = f"(?:{regex})", f"(?:(?!{regex})[\\s\\S])"
    pattern = {
        "Removed": match if invert else f"{match}(*SKIP)(*FAIL)|{other}++",
        "Isolated": f"{match}|{other}++",
        "MergedWithPrevious": f"{other}*+{match}|{other}++",
        "MergedWithNext": f"{match}{other}*+|{other}++",
        "Contiguous": f"{match}++|{other}++",
    }[behavior]
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _spaces_replaced(step: Step) -> list[Step]:
    """Build the steps that ``Metaspace`` runs before it splits; adds a missing prefix."""
    mark = step["replacement"]
    prefix = {"type": "Replace", "pattern": {"Regex": rf"\A(?![ {mark}])"}, "content": mark}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": mark}
    return [replace] if step["prepend_scheme"] == "never" else [prefix, replace]


def _normalizer(step: Step) -> Step:
    if step["type"] == "Replace" and "Regex" in step["pattern"]:
        return {**step, "pattern": {"Regex": translate(step["pattern"]["Regex"])}}
    return step


def _decoder(step: Step) -> Step:
    if step["type"] == "Metaspace":
        return {"type": "Replace", "pattern": {"String": step["replacement"]}, "content": " "}
    return step


def _flat(step: Step | None, parts: str) -> list[Step]:
    if step is None:
        return []
    return [inner for part in step[parts] for inner in _flat(part, parts)] if parts in step else [step]


def _sequence(steps: list[Step], parts: str) -> Step | None:
    return {"type": "Sequence", parts: steps} if steps else None
