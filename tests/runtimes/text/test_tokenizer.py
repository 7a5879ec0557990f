"""Prompt format, tokens, streaming of UTF-8, sampling, the embedding table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import save_file

from reference.checkpoint.checkpoint import open_checkpoint
from reference.checkpoint.specs import prompt_spec
from reference.tiny import TINY
from runtimes.embedding import TokenEmbedding
from runtimes.errors import UserError
from runtimes.generation.sampling import GenerationOptions, Sampler, top_k_indices, top_p_indices
from runtimes.text.tokenizer import Tokenizer, expand_images


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(TINY / "tokenizer.json", prompt_spec(open_checkpoint("tiny")))


def test_bos_comes_first_and_images_expand(tokenizer: Tokenizer) -> None:
    spec = tokenizer.spec
    ids = tokenizer.encode("User: <image_placeholder>What?")
    assert ids[0] == spec.bos_id
    assert ids.count(spec.image_token_id) == 1
    expanded = expand_images(ids, spec, 1)
    assert len(expanded) == len(ids) - 1 + spec.image_tokens
    assert (expanded == spec.image_token_id).sum() == spec.image_tokens
    with pytest.raises(UserError, match="has 1 <image_placeholder> but 0 images"):
        expand_images(ids, spec, 0)


def test_streaming_keeps_characters_whole(tokenizer: Tokenizer) -> None:
    """The tiny vocabulary has no CJK or emoji: they come byte by byte and must not be torn."""
    text = "né 你好 🙂👩‍👩‍👧 fin"
    ids = tokenizer.encode(text)[1:]
    assert len(ids) > len(text)
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert any(piece == "" for piece in pieces)
    assert stream.flush() == ""


def test_a_character_cut_off_at_the_end_is_not_lost(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in tokenizer.encode("ab 你")[1:-1]]
    assert "".join(pieces) + stream.flush() == "ab \ufffd"


def test_tokenizer_errors(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="is missing"):
        Tokenizer(tmp_path / "tokenizer.json", tokenizer.spec)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is not a readable tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json", tokenizer.spec)


LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))


def shares(options: GenerationOptions, seen: tuple[int, ...] = ()) -> np.ndarray:
    sampler = Sampler(options)
    picks = [sampler.pick(LOGITS, seen) for _ in range(4000)]
    return np.bincount(picks, minlength=4) / 4000


def test_sampling_follows_the_distribution() -> None:
    """Within four standard errors of the exact probabilities."""
    assert np.abs(shares(GenerationOptions(temperature=1.0)) - np.exp(LOGITS)).max() < 0.032
    squared = np.exp(2 * LOGITS) / np.exp(2 * LOGITS).sum()
    assert np.abs(shares(GenerationOptions(temperature=0.5)) - squared).max() < 0.032
    assert np.abs(shares(GenerationOptions(temperature=1.0, top_k=2))[:2] - [0.625, 0.375]).max() < 0.032
    nucleus = shares(GenerationOptions(temperature=1.0, top_p=0.79))
    assert nucleus[2:].sum() == 0
    assert shares(GenerationOptions(temperature=1.0, top_p=0.81))[2] > 0
    penalized = shares(GenerationOptions(temperature=1.0, repetition_penalty=3.0), seen=(0,))
    weights = np.array([0.125, 0.3, 0.15, 0.05])
    assert np.abs(penalized - weights / weights.sum()).max() < 0.032


def test_the_likeliest_of_many() -> None:
    """As a full sort gives them, of many equal scores too; the nucleus is found however large it is."""
    random = np.random.default_rng(5)
    scores = random.integers(0, 400, 20_000).astype(np.float32)
    order = np.argsort(-scores, kind="stable")
    for count in (1, 50, 777, 20_000, 30_000):
        assert np.array_equal(top_k_indices(scores, count), order[:count])
    weights = random.random(20_000)
    weights /= weights.sum()
    sums = np.cumsum(np.sort(weights)[::-1])
    for mass in (1e-6, 0.01, 0.5, 0.999):
        kept = weights[top_p_indices(weights, mass)]
        assert kept.sum() >= mass > kept[:-1].sum()
        assert len(kept) == np.searchsorted(sums, mass) + 1


def test_greedy_and_seeds() -> None:
    assert Sampler(GenerationOptions()).pick(LOGITS, ()) == 0
    assert Sampler(GenerationOptions(repetition_penalty=9.0)).pick(LOGITS, (0,)) == 1
    drawn = [
        [Sampler(GenerationOptions(temperature=2.0, seed=s)).pick(LOGITS, ()) for s in range(50)]
        for _ in "ab"
    ]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 1
    with pytest.raises(UserError, match="NaN or infinite logits"):
        Sampler(GenerationOptions()).pick(np.array([0.0, np.nan], np.float32), ())


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1.0), ("top_p", 0.0), ("top_p", 1.5), ("top_k", -1), ("max_new_tokens", 0),
     ("repetition_penalty", 0.0), ("stop", ("",)), ("stop", "User:"), ("seed", -1)],
)  # fmt: skip
def test_bad_options_are_one_sentence(field: str, value: object) -> None:
    with pytest.raises(UserError, match=r" must .*\.$"):
        GenerationOptions(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_embedding_table_of_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    table = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_file({"token_embedding": table}, tmp_path / "table.safetensors")
    rows = TokenEmbedding(tmp_path / "table.safetensors").lookup(np.array([3, 0, 8]), np.dtype(np.float32))
    assert np.array_equal(rows, table[[3, 0, 8]].float().numpy())
    (tmp_path / "bad").write_bytes(b"\xff" * 9)
    with pytest.raises(UserError, match="is not readable"):
        TokenEmbedding(tmp_path / "bad")


def test_special_tokens_are_the_real_ones() -> None:
    """The names of DeepSeek's tokenizer, at the end of the vocabulary, digits single."""
    raw = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    size = raw.get_vocab_size()
    names = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<image_placeholder>"]
    assert [raw.token_to_id(name) for name in names] == list(range(size - 4, size))
    assert raw.encode("123").tokens == ["1", "2", "3"]
