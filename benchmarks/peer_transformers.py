"""transformers' LLaMA on a decoder of random weights; run by ``peers.py`` in an environment of its own.

Forms: ``fp32``, ``bf16``, and ``bf16-compile`` with torch.compile.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peer_command import Feed, main


def config_of(shape: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` of a LLaMA."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": shape["width"], "intermediate_size": shape["mlp_width"],
        "num_hidden_layers": shape["layers"], "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"], "vocab_size": shape["vocab_size"],
        "max_position_embeddings": 2048, "rms_norm_eps": shape["norm_eps"], "rope_theta": 10000.0,
        "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip


def make(form: str, shape: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_of(shape)))


def make_checkpoint(shape: dict[str, Any], folder: Path) -> None:
    """Config, random weights in bf16, and a tokenizer, which exporters ask for."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    make("", shape, folder)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)


def load(form: str, folder: Path, threads: int) -> tuple[Feed, Callable[[], None]]:
    import torch
    from transformers import AutoConfig, DynamicCache, LlamaForCausalLM

    torch.set_num_threads(threads)
    dtype = torch.float32 if form == "fp32" else torch.bfloat16
    torch.set_default_dtype(dtype)
    model = LlamaForCausalLM(AutoConfig.from_pretrained(folder)).eval()
    torch.set_default_dtype(torch.float32)
    if form == "bf16-compile":
        model.forward = torch.compile(model.forward, dynamic=True)
    state = {"cache": DynamicCache()}

    @torch.inference_mode()
    def feed(ids: list[int]) -> None:
        model(torch.tensor([ids]), past_key_values=state["cache"], use_cache=True, logits_to_keep=1)

    def forget() -> None:
        state["cache"] = DynamicCache()

    return feed, forget


if __name__ == "__main__":
    main(make, load)
