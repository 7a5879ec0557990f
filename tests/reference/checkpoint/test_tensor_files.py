"""Files of weights: shards, both formats of torch, and files that are not what they seem."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reference.checkpoint.checkpoint import open_checkpoint
from reference.checkpoint.tensor_files import TensorFiles
from runtimes.errors import UserError
from tests.conftest import OraclePair
from tests.oracles.models import save_oracle


def parameters(folder: Path) -> dict[str, Tensor]:
    return dict(open_checkpoint(str(folder)).load_model().named_parameters())


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def take_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of ``model.safetensors``, which is removed."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    return state


@pytest.mark.parametrize("zipped", [True, False])
def test_bin_files(pair: OraclePair, tmp_path: Path, zipped: bool) -> None:
    """In torch's format and the one before version 1.6, whole and in shards."""
    save_oracle(pair.oracle, tmp_path)
    state = take_weights(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert same(parameters(tmp_path), dict(pair.model.named_parameters()))
    names = sorted(state)
    for index, part in enumerate((names[::2], names[1::2])):
        content = {name: state[name] for name in part}
        torch.save(content, tmp_path / f"part{index}.bin", _use_new_zipfile_serialization=zipped)
    (tmp_path / "pytorch_model.bin").unlink()
    table = {name: f"part{index % 2}.bin" for index, name in enumerate(names)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": table}))
    assert same(parameters(tmp_path), dict(pair.model.named_parameters()))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("key", ["state_dict", "model", "module"])
def test_tables_inside_tables(pair: OraclePair, tmp_path: Path, key: str, zipped: bool) -> None:
    """As trainers write them: parameters, views and transposed tensors beside other values."""
    save_oracle(pair.oracle, tmp_path)
    state = {name: torch.nn.Parameter(tensor) for name, tensor in take_weights(tmp_path).items()}
    state["lm_head.weight"] = state["lm_head.weight"].data.t().contiguous().t()
    content = {"epoch": 3, key: state, "optimizer": {"lr": 1e-4}}
    torch.save(content, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert same(parameters(tmp_path), dict(pair.model.named_parameters()))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not list memory maps")
def test_old_bin_files_are_memory_mapped(tmp_path: Path) -> None:
    """A tensor's numbers lie in pages of the file, which are read only when they are used."""
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.arange(5.0)}, file, _use_new_zipfile_serialization=False)
    tensor = TensorFiles(tmp_path).load("a")
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [[int(end, 16) for end in row[0].split("-")] for row in maps if row[-1] == str(file)]
    assert any(start <= tensor.data_ptr() < end for start, end in ranges)
    assert tensor.tolist() == [0, 1, 2, 3, 4]


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code ran')",))


@pytest.mark.parametrize("zipped", [True, False])
def test_bin_files_with_code_are_refused(tiny_copy: Path, zipped: bool) -> None:
    (tiny_copy / "model.safetensors").unlink()
    file = tiny_copy / "pytorch_model.bin"
    torch.save({"x": Evil()}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="cannot be read as plain weights"):
        open_checkpoint(str(tiny_copy))
    torch.save({"x": torch.nn.Linear(2, 2)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="it refers to torch.nn.modules.linear.Linear") as caught:
        open_checkpoint(str(tiny_copy))
    assert len(str(caught.value).replace(str(tiny_copy), "")) < 300
    torch.save([torch.zeros(2)], file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="holds no table of tensors"):
        open_checkpoint(str(tiny_copy))
    torch.save({"x": torch.zeros(2000)}, file, _use_new_zipfile_serialization=zipped)
    content = file.read_bytes()
    for damaged in (pickle.dumps([1])[:3], content[:3000], content[:40], b"\x80\x02K\x01."):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read as plain weights"):
            open_checkpoint(str(tiny_copy))


def test_damaged_and_missing_shards(pair: OraclePair, tmp_path: Path) -> None:
    save_oracle(pair.oracle, tmp_path, shard="60KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=f"{shard.name} is damaged or cut short"):
        open_checkpoint(str(tmp_path))
    shard.unlink()
    with pytest.raises(UserError, match=f"shard .*{shard.name} is missing"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="no weight_map"):
        open_checkpoint(str(tmp_path))


def test_an_index_that_lies(pair: OraclePair, tmp_path: Path) -> None:
    save_oracle(pair.oracle, tmp_path, shard="60KB")
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    shard = index["weight_map"]["lm_head.weight"]
    state = load_file(tmp_path / shard)
    save_file({name: tensor for name, tensor in state.items() if name != "lm_head.weight"}, tmp_path / shard)
    with pytest.raises(UserError, match=f"lists lm_head.weight, which {shard} does not contain"):
        open_checkpoint(str(tmp_path))
    for path in ("../model.safetensors", "/etc/passwd", 3, "model.gguf"):
        file.write_text(json.dumps({"weight_map": {"lm_head.weight": path}}))
        with pytest.raises(UserError, match="expected the name of a file in the same folder"):
            open_checkpoint(str(tmp_path))
    file.unlink()
    (tmp_path / shard).unlink()
    with pytest.raises(UserError, match="the index model.safetensors.index.json of its shards is missing"):
        open_checkpoint(str(tmp_path))


def test_two_sets_of_shards(pair: OraclePair, tmp_path: Path) -> None:
    save_oracle(pair.oracle, tmp_path, shard="60KB")
    (tmp_path / "model.safetensors.index.json").unlink()
    for shard in sorted(tmp_path.glob("model-*.safetensors")):
        torch.save(load_file(shard), tmp_path / f"pytorch_{shard.stem}.bin")
    with pytest.raises(
        UserError, match=r"several sets of weight shards \(model-0.*, pytorch_model-0.*keep one"
    ):
        open_checkpoint(str(tmp_path))


def test_other_formats_are_named(tiny_copy: Path) -> None:
    (tiny_copy / "model.safetensors").rename(tiny_copy / "consolidated.safetensors")
    with pytest.raises(
        UserError,
        match=r"holds no weights: .*; it has consolidated.safetensors: if it is the whole model, rename",
    ):
        open_checkpoint(str(tiny_copy))
    (tiny_copy / "model.gguf").touch()
    with pytest.raises(UserError, match="it has consolidated.safetensors, model.gguf, which are not"):
        open_checkpoint(str(tiny_copy))
    (tiny_copy / "consolidated.safetensors").rename(tiny_copy / "adapter_model.safetensors")
    with pytest.raises(UserError, match="holds a LoRA adapter .*: dsvl-export export CHECKPOINT --adapter "):
        open_checkpoint(str(tiny_copy))
    for name in ("config.json", "adapter_model.safetensors"):  # as PEFT saves it
        (tiny_copy / name).unlink()
    (tiny_copy / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a LoRA adapter .*: dsvl-export export CHECKPOINT --adapter "):
        open_checkpoint(str(tiny_copy))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("model.safetensors", LFS, "model.safetensors is a Git LFS pointer, .*; run 'git lfs pull'"),
        ("model.safetensors", b"", "model.safetensors is empty; download it again"),
        ("model.safetensors", b"<!DOCTYPE html><html>", "is an HTML page"),
        ("model.safetensors", b"PK\x03\x04", "is a file of torch.save, .*; rename it to pytorch_model.bin"),
        ("model.safetensors.index.json", b"\xef\xbb\xbf{}", "index.json starts with a byte order mark"),
        ("pytorch_model.bin", b"\x40" + bytes(7) + b'{"a":{}', "pytorch_model.bin is a safetensors file"),
        ("tokenizer.json", LFS, "tokenizer.json is a Git LFS pointer"),
        ("tokenizer.json", b"\xef\xbb\xbf{}", "tokenizer.json starts with a byte order mark"),
        (
            "tokenizer_config.json",
            "{}".encode("utf-16"),
            "tokenizer_config.json starts with a byte order mark",
        ),
        ("config.json", b"\xef\xbb\xbf{}", "config.json starts with a byte order mark; save it as UTF-8"),
        ("preprocessor_config.json", b"\xef\xbb\xbf{}", "preprocessor_config.json starts with a byte"),
        ("generation_config.json", b"", "generation_config.json is empty"),
    ],
)
def test_files_that_are_something_else(tiny_copy: Path, name: str, content: bytes, sentence: str) -> None:
    if "model" in name:
        (tiny_copy / "model.safetensors").unlink()
    (tiny_copy / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        open_checkpoint(str(tiny_copy))


def cast(dtype: torch.dtype) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {name: tensor.to(dtype) for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            cast(torch.int8),
            "are stored as int8 .*, expected float32, float16, bfloat16, float64; export the unq",
        ),
        (cast(torch.float8_e4m3fn), "are stored as float8_e4m3fn"),
        (cast(torch.complex64), "are stored as C64"),
        (lambda state: {**state, "model.q_proj.lora_A.weight": torch.zeros(1)}, "1 tensors .* LoRA adapter"),
        (
            lambda state: {**state, "model.q_proj.qweight": torch.zeros(1)},
            "1 tensors .* come from a quantizer",
        ),
        (lambda state: {**state, "lm_head.weight_scale_inv": torch.zeros(1)}, "come from a quantizer"),
    ],
)
def test_states_of_other_kinds(
    tiny_copy: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], sentence: str
) -> None:
    save_file(change(take_weights(tiny_copy)), tiny_copy / "model.safetensors")
    with pytest.raises(UserError, match=sentence) as caught:
        open_checkpoint(str(tiny_copy))
    assert len(str(caught.value)) < 400


def test_double_precision(tiny_copy: Path) -> None:
    expected = parameters(tiny_copy)
    save_file(cast(torch.float64)(take_weights(tiny_copy)), tiny_copy / "model.safetensors")
    assert same(parameters(tiny_copy), expected)
    checkpoint = open_checkpoint(str(tiny_copy))
    table = checkpoint.load("token_embedding.weight")
    assert table.dtype == torch.float32
    assert table.nbytes == checkpoint.embedding_bytes()


def test_an_error_lists_ten_names(tiny_copy: Path) -> None:
    state = {f"a{index}": tensor for index, tensor in enumerate(take_weights(tiny_copy).values())}
    save_file(state, tiny_copy / "model.safetensors")
    with pytest.raises(UserError) as caught:
        open_checkpoint(str(tiny_copy))
    assert f" and {len(state) - 10} more; {len(state)} unexpected: a0, a1, a10" in str(caught.value)
    assert str(caught.value).count("language_model") <= 10
