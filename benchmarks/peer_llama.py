"""llama.cpp on a decoder of random weights; run by ``peers.py`` in an environment of its own.

The form is ``q4_0``. One layer's weights serve all, as speed does not ask.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peer_command import Feed, main


def make(form: str, shape: dict[str, Any], file: Path) -> None:
    import gguf
    import numpy as np

    width, inner, vocabulary = shape["width"], shape["mlp_width"], shape["vocab_size"]
    kv_width = shape["kv_heads"] * shape["head_dim"]
    random = np.random.default_rng(0)
    q4 = gguf.GGMLQuantizationType.Q4_0

    def matrix(rows: int, columns: int) -> np.ndarray:
        noise = random.standard_normal((rows, columns), dtype=np.float32) * columns**-0.5
        return gguf.quants.quantize(noise, q4)

    ones = np.ones(width, np.float32)
    layer = {
        "attn_q": matrix(width, width), "attn_k": matrix(kv_width, width), "attn_v": matrix(kv_width, width),
        "attn_output": matrix(width, width), "ffn_gate": matrix(inner, width), "ffn_up": matrix(inner, width),
        "ffn_down": matrix(width, inner), "attn_norm": ones, "ffn_norm": ones,
    }  # fmt: skip
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(shape["layers"])
    writer.add_context_length(2048)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(shape["head_dim"])
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    tensors = {
        "token_embd": matrix(vocabulary, width), "output": matrix(vocabulary, width), "output_norm": ones,
        **{f"blk.{index}.{name}": data for index in range(shape["layers"]) for name, data in layer.items()},
    }  # fmt: skip
    for name, data in tensors.items():
        writer.add_tensor(f"{name}.weight", data, raw_dtype=None if data.dtype == np.float32 else q4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(form: str, file: Path, threads: int) -> tuple[Feed, Callable[[], None]]:
    import llama_cpp as llama

    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(str(file).encode(), llama.llama_model_default_params())
    options = llama.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = 1024, 1024, 1024
    options.n_threads = options.n_threads_batch = threads
    session = llama.llama_init_from_model(model, options)

    def feed(ids: list[int]) -> None:
        given = (ctypes.c_int * len(ids))(*ids)
        if llama.llama_decode(session, llama.llama_batch_get_one(given, len(ids))):
            raise SystemExit("llama.cpp could not decode.")
        llama.llama_synchronize(session)

    return feed, lambda: llama.llama_memory_clear(llama.llama_get_memory(session), True)


if __name__ == "__main__":
    main(make, load)
