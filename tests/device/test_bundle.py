"""A bundle is complete, passes parity in every precision that runs here, and answers."""

from __future__ import annotations

from pathlib import Path

from dsvl_export import Pipeline, parity
from runtimes.bundle.bundle import Bundle
from runtimes.session import Execution
from tests.device.conftest import Pair, execution_of

QUESTION = "What is in this picture?"


def test_every_file_is_as_in_the_manifest(bundle: Bundle) -> None:
    assert bundle.problems() == []


def test_a_precision_runs_here(bundle: Bundle) -> None:
    executions = {pair: execution_of(bundle, pair) for pair in bundle.choices()}
    assert any(execution.runnable for execution in executions.values()), executions


def test_parity_passes(bundle: Bundle, pair: Pair, execution: Execution) -> None:
    result = parity(bundle, *pair)
    assert result.execution.kind == execution.kind
    assert result.passed, result


def test_answers_are_repeatable(bundle: Bundle, pair: Pair, execution: Execution, picture: Path) -> None:
    """Also after another conversation, from a new pipeline, and as a stream."""
    pipeline = Pipeline.open(bundle, *pair, device=execution.device)
    answer = pipeline.chat(QUESTION, [picture])
    assert answer.text.strip()
    pipeline.reset()
    pipeline.chat("Hello")
    pipeline.reset()
    assert pipeline.chat(QUESTION, [picture]).text == answer.text
    again = Pipeline.open(bundle, *pair, device=execution.device)
    pieces = [piece for piece, _ in again.stream_chat(QUESTION, [picture])]
    assert "".join(pieces) == answer.text


def test_a_wrong_file_is_found(bundle: Bundle, tmp_path: Path) -> None:
    """The test above finds damage: a bundle whose files are missing has one problem for each."""
    problems = Bundle(tmp_path, bundle.manifest).problems()
    assert len(problems) == len(bundle.manifest.files)
    assert all(problem.endswith("is missing") for problem in problems)
