"""The decode loop in Swift, with the names and sizes of one bundle."""

from __future__ import annotations

from pathlib import Path
from string import Template
from typing import Any

from dsvl_export.compilers.protocol import App
from dsvl_export.version import __version__
from runtimes.backends.mil.package import CHUNK, EXTEND, IMAGE, PREFILL
from runtimes.backends.static_shape import DECODE
from runtimes.embedding import TokenEmbedding

TEMPLATE = Path(__file__).parent / "listing.swift"
FILE = "DeepSeekVL.swift"
# How a number of the token embeddings is read, and its bytes.
READS = {
    "F16": ("bytes.loadUnaligned(fromByteOffset: place, as: Float16.self)", 2),
    "F32": ("Float16(bytes.loadUnaligned(fromByteOffset: place, as: Float.self))", 4),
    "BF16": (
        "Float16(Float(bitPattern:"
        " UInt32(bytes.loadUnaligned(fromByteOffset: place, as: UInt16.self)) << 16))",
        2,
    ),
}


def render_listing(app: App) -> str:
    """Render Swift source for an app: encode an image, prefill, decode greedily."""
    vision, adaptor, decoder = (app.contracts[name] for name in ("vision_encoder", "adaptor", "decoder"))
    prompt, preprocessing, table = app.prompt, app.preprocessing, TokenEmbedding(app.embedding)
    embeds, positions, rows = (spec.name for spec in decoder.inputs)
    read, size = READS[table.dtype]
    vocabulary, width = table.rows.shape
    around = [", ".join(map(str, ids)) for ids in (prompt.image_start_ids, prompt.image_end_ids)]
    bos = f"put BOS ({prompt.bos_id}) first, " if prompt.add_bos else ""
    values: dict[str, Any] = {
        "version": __version__, "model": app.model, "precision": app.precision,
        "minimum": "iOS 18 or macOS 15",
        "bos": bos, "ends": ", ".join(map(str, prompt.eos_ids)),
        "image_token": prompt.image_token_id, "image_tokens": prompt.image_tokens,
        "image_ends": f", after {around[0]} and before {around[1]}" if all(around) else "",
        "background": ", ".join(map(str, preprocessing.background)),
        "side": preprocessing.image_size, "vocabulary": vocabulary, "width": width,
        "table_dtype": table.dtype,
        "table_offset": table.rows.offset, "table_bytes": size, "table_read": read,
        "image_function": IMAGE, "image_input": IMAGE,
        "features": ", ".join(f'"{spec.name}"' for spec in vision.outputs),
        "image_embeds": adaptor.outputs[0].name, "capacity": app.capacity, "chunk": min(CHUNK, app.capacity),
        "decode": DECODE, "prefill": PREFILL, "extend": EXTEND, "inputs_embeds": embeds,
        "positions": positions, "logit_rows": rows, "logits": decoder.outputs[0].name,
    }  # fmt: skip
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(values)
