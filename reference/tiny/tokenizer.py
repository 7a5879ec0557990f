"""The tiny model's tokenizer: byte-level BPE with DeepSeek's special tokens."""

from __future__ import annotations

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from reference.tiny.pictures import draw_scene
from reference.tiny.questions import image_preamble, make_chat
from runtimes.text.prompt import BOS, EOS, IMAGE_PLACEHOLDER, PAD, SYSTEM_PROMPT, Message, format_chat

VOCAB_SIZE = 512
SPECIAL_TOKENS = (BOS, EOS, PAD, IMAGE_PLACEHOLDER)


def build_corpus(scenes: int) -> list[str]:
    """Return prompts in the format of training, with placeholders instead of pictures."""
    texts = []
    for seed in range(scenes):
        _, scene = draw_scene((seed, 99))
        rng = np.random.default_rng((seed, 98))
        messages = []
        for question in make_chat(rng, [scene, scene], turns=8):
            messages += [Message("user", question.text), Message("assistant", question.answer)]
        texts.append(image_preamble(2) + format_chat(messages, SYSTEM_PROMPT))
    return texts


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train byte-level BPE of ``VOCAB_SIZE`` tokens; digits are single tokens, as in DeepSeek's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\r\n]"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Special tokens come last, as in DeepSeek's tokenizer (ids from 100,000).
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    )
    return tokenizer
