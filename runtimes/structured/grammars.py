"""Grammars that answers must follow: which tokens are allowed next, and which are forced.

llguidance computes both from the tokenizer and a grammar, in a few microseconds for each token.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import inf
from threading import Lock, stack_size
from typing import Any, TypeVar

import numpy as np

from runtimes.bundle.files import parse_json
from runtimes.errors import UserError
from runtimes.installation import install_command
from runtimes.structured.json_schemas import check_schema, keyword_place, shortest_answer
from runtimes.structured.response_format import (
    CHOICES,
    JSON_OPTIONS,
    JSON_SCHEMA,
    LARK,
    REGEX,
    TEXT_OR_JSON,
    FormatError,
    ResponseFormat,
)
from runtimes.text.tokenizer import Tokenizer

MAX_GRAMMARS = 64  # compiled grammars that are kept, of the last formats
MAX_FORCED = 4096  # tokens in a row that a grammar may force; more is taken for endless
MAX_RULES = 500  # of a grammar
STACK_BYTES = 256 << 20  # of the thread that compiles: llguidance follows rules by recursion
RULE = re.compile(r"^\s*[?!]?[A-Za-z_][^:\n]*:", re.MULTILINE)
# A text that does not begin like JSON, or JSON.
TEXT_OR_JSON_RULES = "start: TEXT | json\nTEXT: /[^{{\\s](.|\\n)*/\njson: %json {schema}"
LIMITS: dict[str, Any] = {  # of llguidance's parser
    "max_grammar_size": 100_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 50_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
}
STACK_SIZE_LOCK = Lock()  # the size is one of the process
Result = TypeVar("Result")
BODY = 'start: " "? @body'  # a space comes before most answers in training


@dataclass(frozen=True)
class Grammar:
    """A compiled format.

    Args:
        matcher: llguidance's matcher at the beginning of an answer.
        vocabulary: number of logits.
        skips_space: whether a space before the answer is not part of it.
        min_tokens: tokens of the shortest answer, about; 0 if it is not known.
    """

    matcher: Any
    vocabulary: int
    skips_space: bool
    min_tokens: int


class Grammars:
    """Compiles formats for a tokenizer; any thread may call it."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        """Compile nothing yet: reading the tokenizer takes half a second for 100,000 tokens.

        Args:
            tokenizer: the bundle's tokenizer.
            vocabulary: number of logits of a token.
        """
        self._source, self._vocabulary = tokenizer, vocabulary
        self._lock = Lock()
        self._tokenizer: Any = None
        self._compiled: OrderedDict[ResponseFormat, Grammar] = OrderedDict()

    def compile(self, response_format: ResponseFormat) -> Grammar:
        """Compile a format; the last ones are kept.

        Raises:
            FormatError: the format is wrong, too complex, or has no finite answer.
            UserError: llguidance or jsonschema is not installed.
        """
        with self._lock:
            if response_format in self._compiled:
                self._compiled.move_to_end(response_format)
                return self._compiled[response_format]
        tokenizer = self._ll_tokenizer()
        grammar = _with_large_stack(lambda: self._compile(tokenizer, response_format))
        with self._lock:
            self._compiled[response_format] = grammar
            if len(self._compiled) > MAX_GRAMMARS:
                self._compiled.popitem(last=False)
        return grammar

    def fitting(
        self, response_format: ResponseFormat | None, prompt_tokens: int, capacity: int
    ) -> Grammar | None:
        """Compile a format, and check that an answer can fit into a KV cache.

        Args:
            response_format: the format; None gives None.
            prompt_tokens: tokens of the prompt.
            capacity: tokens of the KV cache.

        Raises:
            FormatError: the shortest answer is too long; see also ``compile``.
        """
        if response_format is None:
            return None
        grammar = self.compile(response_format)
        if (needed := grammar.min_tokens) > capacity - prompt_tokens:
            raise FormatError(
                f"The shortest answer that the response format allows has {needed} tokens or more, but the"
                f" KV cache holds {capacity}, {prompt_tokens} of them for the prompt; shorten the format, or"
                " open the bundle with a larger capacity."
            )
        return grammar

    def _ll_tokenizer(self) -> Any:
        """Return llguidance's form of the tokenizer, made on first use."""
        try:
            import llguidance
        except ImportError as error:
            raise UserError(
                f"Response formats need llguidance; run: {install_command('llguidance')}."
            ) from error
        with self._lock:
            if self._tokenizer is None:
                try:
                    self._tokenizer = llguidance.LLTokenizer(
                        self._source.json_text,
                        n_vocab=max(self._vocabulary, self._source.size),
                        eos_token=list(self._source.spec.eos_ids),
                    )
                except ValueError as error:
                    raise FormatError(
                        f"This tokenizer cannot be used with response formats: {error}."
                    ) from error
            return self._tokenizer

    def _compile(self, tokenizer: Any, response_format: ResponseFormat) -> Grammar:
        from llguidance import LLMatcher, LLParserLimits

        body, min_tokens = _body(response_format, tokenizer)
        limits = LLParserLimits(**LIMITS, verbose_errors=False)

        def matcher(*grammars: dict[str, Any]) -> Any:
            made = LLMatcher(tokenizer, json.dumps({"grammars": grammars}), log_level=0, limits=limits)
            made.compute_bitmask()  # some errors show up here only
            if made.is_error():
                raise FormatError(_problem(made.get_error(), response_format))
            forced, ahead = made.compute_ff_tokens(), made.deep_copy()
            ahead.consume_tokens(forced)
            ahead.compute_ff_tokens()
            if not forced and ahead.is_error():
                raise FormatError(_problem(ahead.get_error(), response_format))
            if len(forced) > MAX_FORCED or ahead.is_error():
                raise FormatError(
                    f"The response format is endless or too long: it forces more than {MAX_FORCED} tokens."
                )
            return made

        made = matcher(body)
        skips_space = not any(
            made.deep_copy().try_consume_tokens(tokenizer.tokenize_str(space)) for space in (" ", "\n", "\t")
        )
        if skips_space:
            made = matcher({"lark_grammar": BODY}, {**body, "name": "body"})
        return Grammar(made, self._vocabulary, skips_space, min_tokens)


def _with_large_stack(work: Callable[[], Result]) -> Result:
    """Run a function in a thread of its own with a large stack, and return its result."""
    with ThreadPoolExecutor(1, "grammar") as threads:
        with STACK_SIZE_LOCK:
            before = stack_size(STACK_BYTES)
            try:
                running = threads.submit(work)  # starts the thread
            finally:
                stack_size(before)
        return running.result()


def _body(response_format: ResponseFormat, tokenizer: Any) -> tuple[dict[str, Any], int]:
    """Return a format as a grammar of llguidance, and the tokens of its shortest answer.

    Raises:
        FormatError: it is not a JSON Schema, allows no finite answer, or is too large.
    """
    from llguidance import LLMatcher

    def count(text: str) -> int:
        return len(tokenizer.tokenize_str(text))

    kind, text = response_format.kind, response_format.text
    if kind in (JSON_SCHEMA, TEXT_OR_JSON):
        schema = parse_json(text, "The JSON Schema")
        check_schema(schema)
        shortest = shortest_answer(schema, count)
        if shortest == inf:
            raise FormatError("The JSON Schema allows no finite answer.")
        if isinstance(schema, dict):
            schema = {**schema, "x-guidance": JSON_OPTIONS}
        if kind == TEXT_OR_JSON:
            return {"lark_grammar": TEXT_OR_JSON_RULES.format(schema=json.dumps(schema))}, 0
        return {"json_schema": schema}, int(shortest)
    if kind == CHOICES:
        choices = parse_json(text, "The choices")
        texts = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
        return {"lark_grammar": f"start: {texts}"}, min(map(count, choices))
    if kind == LARK:
        if len(RULE.findall(text)) > MAX_RULES:
            raise FormatError(f"The grammar of the response format has more than {MAX_RULES} rules.")
        return {"lark_grammar": text}, 0
    (grammar,) = json.loads(LLMatcher.grammar_from_regex(text))["grammars"]
    return {"lark_grammar": grammar["lark_grammar"]}, 0


def _problem(error: str, response_format: ResponseFormat) -> str:
    """Return one sentence for an error of llguidance."""
    first = error.strip().partition("\n<state>")[0].partition("\n")[0]
    if keys := re.search(r"Unimplemented keys: (\[.*\])", first):
        names = json.loads(keys[1])
        if response_format.kind in (JSON_SCHEMA, TEXT_OR_JSON):
            schema = json.loads(response_format.text)
            names = [f"{name} (at {keyword_place(schema, name)})" for name in names]
        places = ", ".join(names)
        return f"The JSON Schema uses keywords that are not supported: {places}; remove them."
    names_of_kinds = {REGEX: "regular expression", LARK: "grammar", CHOICES: "choices"}
    kind = names_of_kinds.get(response_format.kind, "JSON Schema")
    if "NoExtension" in first:
        return f"The {kind} of the response format allows no answer."
    if any(word in first for word in ("Too many", "too many", "too large", "limit", "fuel")):
        return f"The {kind} of the response format is too complex ({first[:120]})."
    details = [line.strip() for line in error.splitlines() if line.strip().startswith("error:")]
    reason = details[0].removeprefix("error:").strip() if details else first
    return f"The {kind} of the response format is wrong: {reason[:200].rstrip('.')}."


class Constraint:
    """The state of one answer in a format."""

    def __init__(self, grammar: Grammar) -> None:
        """Start an answer."""
        self.skips_space = grammar.skips_space
        self._matcher, self._vocabulary = grammar.matcher.deep_copy(), grammar.vocabulary
        self._allowed: np.ndarray | None = None

    @property
    def finished(self) -> bool:
        """Whether the answer is complete, and nothing more can follow."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def compute_mask(self) -> None:
        """Compute what ``allowed`` returns next, so that it is ready; any thread may call this."""
        if self._allowed is None:
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            self._allowed = np.unpackbits(bits, count=self._vocabulary, bitorder="little").view(bool)

    def allowed(self) -> np.ndarray:
        """Return which tokens may come next, ``[V]`` bool.

        An end-of-sentence token is among them only where the answer may end.

        Raises:
            FormatError: the format has become too complex.
        """
        self.compute_mask()
        self._check()
        assert self._allowed is not None
        return self._allowed

    def consume(self, tokens: Sequence[int]) -> None:
        """Append tokens to the answer.

        Raises:
            FormatError: the format has become too complex.
        """
        self._allowed = None
        self._matcher.consume_tokens(list(tokens))
        self._check()

    def forced(self) -> list[int]:
        """Return the only tokens that can come next, in the tokenizer's own form.

        Tokens that depend on what follows are left out.
        """
        tokens: list[int] = self._matcher.compute_ff_tokens()
        self._check()
        return tokens

    def accepted_prefix(self, tokens: Sequence[int]) -> int:
        """Return how many of some tokens may come next, one after the other."""
        return int(self._matcher.validate_tokens(list(tokens)))

    def _check(self) -> None:
        if self._matcher.is_error():
            raise FormatError(
                "The response format has become too complex"
                f" ({self._matcher.get_error().strip().splitlines()[0][:120]}); simplify it."
            )
