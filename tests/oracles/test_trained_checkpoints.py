"""What trainers write, made with transformers: the same logits as transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

from reference.checkpoint.checkpoint import open_checkpoint
from reference.checkpoint.specs import preprocess_spec, prompt_spec
from runtimes.errors import UserError
from tests.oracles.models import VOCABULARY, save_oracle, siglip_oracle


def edit_config(folder: Path, text: dict[str, Any] | None = None, **changes: Any) -> None:
    """Change keys of config.json, at the top level and in its text_config; None removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for section, values in ((config, changes), (config["text_config"], text or {})):
        section.update(values)
        for key in [key for key, value in values.items() if value is None]:
            del section[key]
    file.write_text(json.dumps(config))


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace or remove tensors; in the keys, two underscores stand for a dot."""
    state = load_file(folder / "model.safetensors")
    for key, tensor in changes.items():
        name = key.replace("__", ".")
        state.pop(name)
        if tensor is not None:
            state[name] = tensor
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


EMBEDDING, HEAD = "model__language_model__embed_tokens__weight", "lm_head__weight"


def assert_same_logits(folder: Path) -> None:
    """As transformers computes them from the same folder."""
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    checkpoint = open_checkpoint(str(folder))
    ids = torch.arange(7)[None] * 50
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        model = checkpoint.load_model()
        found = model.logits(model.token_embedding(ids))
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("rows", "multiple"), [(514, None), (530, None), (530, 64), (600, 128)])
def test_resized_vocabularies(tmp_path: Path, rows: int, multiple: int | None) -> None:
    """Fewer rows, more rows, and rows padded to a multiple, by transformers' own resizing."""
    oracle = siglip_oracle()
    oracle.resize_token_embeddings(rows, pad_to_multiple_of=multiple)
    save_oracle(oracle, tmp_path)
    padded = -(-rows // (multiple or 1)) * (multiple or 1)
    assert open_checkpoint(str(tmp_path)).config.decoder.vocab_size == padded
    assert_same_logits(tmp_path)


@pytest.mark.parametrize("size", [400, 600, 32000])
def test_a_config_with_another_vocabulary_size(tmp_path: Path, size: int) -> None:
    """The rows of the tensors count; transformers refuses such a folder."""
    save_oracle(siglip_oracle(), tmp_path)
    edit_config(tmp_path, text={"vocab_size": size}, vocab_size=size)
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.config.decoder.vocab_size == VOCABULARY
    edit_config(tmp_path, text={"vocab_size": VOCABULARY})
    expected = open_checkpoint(str(tmp_path))
    name = "decoder.head.weight"
    assert torch.equal(checkpoint.load(name), expected.load(name))
    assert checkpoint.config == expected.config


def test_an_embedding_and_a_head_of_different_sizes(tmp_path: Path) -> None:
    save_oracle(siglip_oracle(), tmp_path)
    edit_weights(tmp_path, **{HEAD: torch.zeros(530, 96)})
    with pytest.raises(UserError, match=r"1 wrongly shaped: lm_head.weight is \[530, 96\], expected \[521, "):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "top", "stored", "tied"),
    [
        (None, True, (EMBEDDING,), True),
        (None, True, (HEAD,), True),  # safetensors' save_model keeps the first name
        (None, True, (EMBEDDING, HEAD), True),
        (True, None, (EMBEDDING,), True),  # transformers' default at the top level
        (False, True, (EMBEDDING,), True),
        (True, False, (EMBEDDING, HEAD), False),
    ],
)
def test_tied_embeddings(
    tmp_path: Path, text: bool | None, top: bool | None, stored: tuple[str, ...], tied: bool
) -> None:
    """The flag at either level, with one of the two tensors or both."""
    oracle = siglip_oracle()
    save_oracle(oracle, tmp_path)
    edit_config(
        tmp_path, text={"tie_word_embeddings": text} if text is not None else {}, tie_word_embeddings=top
    )
    table = oracle.lm_head.weight.data
    edit_weights(tmp_path, **{name: table.clone() if name in stored else None for name in (EMBEDDING, HEAD)})
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.config.tied_head == tied
    assert torch.equal(checkpoint.load("token_embedding.weight"), checkpoint.load("decoder.head.weight"))
    assert_same_logits(tmp_path)


def test_a_head_that_was_untied(tmp_path: Path) -> None:
    """The flag is left over from the base model, but the head was trained: transformers unties it."""
    save_oracle(siglip_oracle(), tmp_path)
    edit_config(tmp_path, tie_word_embeddings=True)
    checkpoint = open_checkpoint(str(tmp_path))
    assert not checkpoint.config.tied_head
    assert_same_logits(tmp_path)


def test_shards_of_different_types(tmp_path: Path) -> None:
    """Some in bfloat16, some in float16, as after merging parts of a training."""
    save_oracle(siglip_oracle(), tmp_path, shard="60KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    for number, shard in enumerate(shards):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[number % 3]
        state = {name: tensor.to(dtype) for name, tensor in load_file(shard).items()}
        save_file(state, shard, metadata={"format": "pt"})
    assert_same_logits(tmp_path)


@pytest.mark.parametrize("format_", ["safetensors", "bin"])
def test_shards_without_an_index(tmp_path: Path, format_: str) -> None:
    """Their names say how many there are, so a complete set is read."""
    save_oracle(siglip_oracle(), tmp_path, shard="200KB")
    index = tmp_path / "model.safetensors.index.json"
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    expected = dict(open_checkpoint(str(tmp_path)).load_model().named_parameters())
    index.unlink()
    if format_ == "bin":
        for shard in shards:
            torch.save(load_file(shard), tmp_path / f"pytorch_{shard.stem}.bin")
            shard.unlink()
        shards = sorted(tmp_path.glob("*.bin"))
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.embedding_bytes() == 4 * VOCABULARY * 96
    found = dict(checkpoint.load_model().named_parameters())
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    shards[1].unlink()
    with pytest.raises(
        UserError, match=f"holds {len(shards) - 1} of {len(shards)} weight shards .* is missing"
    ):
        open_checkpoint(str(tmp_path))


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    """The index says which one counts; without it, nothing does."""
    save_oracle(siglip_oracle(), tmp_path, shard="200KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    state = load_file(tmp_path / index["lm_head.weight"])
    for other in shards:
        if other.name != index["lm_head.weight"]:
            save_file({**load_file(other), "lm_head.weight": state["lm_head.weight"] + 1}, other)
    assert torch.equal(open_checkpoint(str(tmp_path)).load("decoder.head.weight"), state["lm_head.weight"])
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="lm_head.weight are in two of the shards"):
        open_checkpoint(str(tmp_path))


def test_an_index_of_an_earlier_training(tmp_path: Path) -> None:
    """Beside model.safetensors it is not read; beside a .bin file the message says what to delete."""
    oracle = siglip_oracle()
    save_oracle(oracle, tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}))
    torch.save({"x": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert_same_logits(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"-00001-of-00002.* is missing; .* or delete .*index.json if pytorch_mod"
    ):
        open_checkpoint(str(tmp_path))
    torch.save(oracle.state_dict(), tmp_path / "pytorch_model.bin")
    index.unlink()
    assert torch.equal(open_checkpoint(str(tmp_path)).load("decoder.head.weight"), oracle.lm_head.weight)


def write_debris(folder: Path) -> None:
    """The files that trainers leave beside a model."""
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "trainer_state.json",
                 "args.json", "all_results.json", "additional_config.json", "video_preprocessor_config.json"):  # fmt: skip
        (folder / name).write_bytes(b"{}")
    for name in ("runs", "global_step500"):
        (folder / name).mkdir()


def test_files_of_the_training(tmp_path: Path) -> None:
    """They change nothing, and are not taken for weights."""
    save_oracle(siglip_oracle(), tmp_path)
    write_debris(tmp_path)
    (tmp_path / "preprocessor_config.json").rename(tmp_path / "other.json")
    processor = {"image_processor": json.loads((tmp_path / "other.json").read_text())}
    (tmp_path / "processor_config.json").write_text(json.dumps(processor))
    assert_same_logits(tmp_path)
    assert preprocess_spec(open_checkpoint(str(tmp_path))).image_size == 30
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match="holds no weights: .*; it has shards of DeepSpeed: collect them with zero_"
    ):
        open_checkpoint(str(tmp_path))
    (tmp_path / "global_step500").rmdir()
    with pytest.raises(UserError, match=r"holds no weights: [^;]*index.json\.$"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "pytorch_model_fsdp_0").mkdir()
    with pytest.raises(
        UserError, match=r"shards of FSDP: collect them with accelerate merge-weights .*_fsdp_0 /"
    ):
        open_checkpoint(str(tmp_path))


def test_empty_tensors_of_deepspeed(tmp_path: Path) -> None:
    save_oracle(siglip_oracle(), tmp_path)
    edit_weights(tmp_path, **{HEAD: torch.zeros(0)})
    with pytest.raises(
        UserError, match=r"lm_head.weight is \[0\], expected .* collect them with zero_to_fp32.py"
    ):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("outer", ["", "v0-20261130"])
def test_a_model_in_a_subfolder(tmp_path: Path, outer: str) -> None:
    """The folder of a training, whose checkpoints are below: the last is named."""
    for number in (500, 1000):
        folder = tmp_path / "output" / outer / f"checkpoint-{number}"
        folder.mkdir(parents=True)
        save_oracle(siglip_oracle(), folder)
    sentence = "checkpoint-1000 is a checkpoint, the last of 2: give that one"
    with pytest.raises(UserError, match=f"has no config.json, .*; the folder .*{sentence}"):
        open_checkpoint(str(tmp_path / "output"))
    config = (tmp_path / "output" / outer / "checkpoint-500" / "config.json").read_bytes()
    (tmp_path / "output" / "config.json").write_bytes(config)
    with pytest.raises(UserError, match=f"holds no weights: .*{sentence}"):
        open_checkpoint(str(tmp_path / "output"))


@pytest.mark.parametrize("file", ["tokenizer.model", "vocab.json", "spiece.model"])
def test_a_tokenizer_in_another_format(tmp_path: Path, file: str) -> None:
    save_oracle(siglip_oracle(), tmp_path)
    (tmp_path / "tokenizer.json").rename(tmp_path / file)
    with pytest.raises(
        UserError, match=f"it has {file}, from which transformers makes one: AutoTokenizer.from"
    ):
        prompt_spec(open_checkpoint(str(tmp_path)))


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json"])
def test_added_tokens_that_the_tokenizer_lacks(tmp_path: Path, file: str) -> None:
    """The base model's tokenizer.json beside the other files of the fine-tune's tokenizer."""
    save_oracle(siglip_oracle(), tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    content: Any = {"<point>": 515}
    if file == "tokenizer_config.json":
        content = {"added_tokens_decoder": {"515": {"content": "<point>", "special": True}}}
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(
        UserError, match="lacks 1 of the tokens .* such as '<point>' with the id 515; save the tok"
    ):
        prompt_spec(open_checkpoint(str(tmp_path)))
    tokenizer.add_special_tokens([f"<{number}>" for number in range(tokenizer.get_vocab_size(), 515)])
    tokenizer.add_special_tokens(["<point>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    prompt_spec(open_checkpoint(str(tmp_path)))
