"""One ``.pte`` file of several methods from a model's traced components."""

from __future__ import annotations

from pathlib import Path

import executorch.kernels.quantized  # noqa: F401 -- registers embeddings in 8 bits
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.passes import MemoryPlanningPass
from safetensors import safe_open
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Graph

from calibration.precision_plan import LayerPrecision
from calibration.quantized_program import quantize_weight
from calibration.quantized_weights import find_weight_scale
from dsvl_export.compilers.executorch_program import suppress_warnings
from dsvl_export.compilers.executorch_program.delegates import encoder_partitioner
from dsvl_export.compilers.executorch_program.lower import BOUNDARIES, Method, build_method
from dsvl_export.compilers.protocol import App, Parts
from runtimes.backends.executorch import DIALECT, METHODS, TOKEN_EMBEDDING, largest_chunk, program_constants
from runtimes.errors import UserError, first_line

qd = torch.ops.quantized_decomposed
BYTES = LayerPrecision("int8-weights")


class FoldedEncoder(nn.Module):
    """The vision encoder and the adaptor in one module, as ExecuTorch's stock runner calls them.

    It takes float32 in every precision, because that runner passes float32.

    Args:
        encoder: the vision encoder.
        adaptor: the adaptor.
        dtype: dtype that the encoder takes.
    """

    def __init__(self, encoder: nn.Module, adaptor: nn.Module, dtype: torch.dtype) -> None:
        """Keep the modules; see the class for the arguments."""
        super().__init__()
        self.encoder, self.adaptor, self.dtype = encoder, adaptor, dtype

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Encode ``[1, 3, N, N]`` into image tokens ``[1, T, D]``; the vision features follow."""
        features = self.encoder(pixel_values.to(self.dtype))
        return (*self.adaptor(*features), *features)


class Embedding(nn.Module):
    """The token table in the checkpoint's dtype, or in 8 bits with one scale per token.

    Args:
        file: the bundle's file of the token embeddings.
        dtype: dtype of the embeddings.
        quantized: whether to quantize the table to 8 bits.
    """

    table: Tensor
    scale: Tensor | None

    def __init__(self, file: Path, dtype: torch.dtype, quantized: bool) -> None:
        """Load the table; see the class for the arguments."""
        super().__init__()
        with safe_open(file, framework="pt") as handle:
            table = handle.get_tensor("token_embedding")
        if quantized:
            table = table.float()
            scale = find_weight_scale(table, BYTES)
            table = quantize_weight(table, scale, BYTES)
        # ExecuTorch has no bfloat16 here; half precision represents its values, except tiny ones.
        self.register_buffer("table", table.half() if table.dtype == torch.bfloat16 else table)
        self.register_buffer("scale", scale.float() if quantized else None)
        self.dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed ``[1, S]`` int64 as ``[1, S, D]``."""
        if self.scale is None:
            return torch.nn.functional.embedding(tokens, self.table).to(self.dtype)
        found: Tensor = qd.embedding_byte.dtype(
            self.table, self.scale, None, -128, 127, tokens, dtype=self.dtype
        )
        return found


def build_methods(parts: Parts, app: App) -> dict[str, Method]:
    """Build the methods of a program, by name."""
    methods = {component: build_method(*part, app.capacity) for component, part in parts.items()}
    encoder, adaptor = methods["vision_encoder"], methods["adaptor"]
    (pixels,) = encoder.examples
    folded = FoldedEncoder(encoder.module, adaptor.module, pixels.dtype)
    methods["vision_encoder"] = Method(folded, (pixels.float(),), encoder.dynamic)
    sequence = Dim("sequence", min=1, max=largest_chunk(app.capacity))
    tokens = torch.zeros(1, min(5, app.capacity), dtype=torch.int64)
    embeds = app.contracts["decoder"].inputs[0]
    quantized = any(node.target in BOUNDARIES for node in parts["decoder"][0].program.graph.nodes)
    embedding = Embedding(app.embedding, getattr(torch, embeds.dtype), quantized)
    return {
        **{METHODS[component]: methods[component] for component in parts},
        TOKEN_EMBEDDING: Method(embedding, (tokens,), ({1: sequence},)),
    }


def write_program(file: Path, parts: Parts, app: App, delegate: str) -> dict[str, int]:
    """Lower all methods and write the program.

    Args:
        file: the ``.pte`` file.
        parts: programs and loaders of all components.
        app: contracts and settings that the program contains.
        delegate: runs the vision encoder and the adaptor; XNNPACK runs the rest.

    Returns:
        The number of partitions of each method.

    Raises:
        UserError: ExecuTorch or the delegate refuses a program.
    """
    try:
        with suppress_warnings():
            return _write(file, parts, app, delegate)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(f"ExecuTorch cannot lower the model: {first_line(error)}.") from error


def _write(file: Path, parts: Parts, app: App, delegate: str) -> dict[str, int]:
    programs = {name: made.program() for name, made in build_methods(parts, app).items()}
    dtype = getattr(torch, app.contracts["decoder"].inputs[0].dtype)
    (vocabulary,) = (int(spec.shape[2]) for spec in app.contracts["decoder"].outputs)
    encoders = [METHODS["vision_encoder"], METHODS["adaptor"]]
    edge = to_edge_transform_and_lower(
        programs,
        partitioner={
            name: [encoder_partitioner(delegate, dtype) if name in encoders else XnnpackPartitioner()]
            for name in programs
        },
        constant_methods=program_constants(app.prompt, vocabulary, app.capacity),
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    graphs = {name: edge.exported_program(name).graph for name in programs}
    for name in encoders if delegate != DIALECT else ():  # what XNNPACK leaves, ExecuTorch runs
        if left := _left(graphs[name]):
            raise UserError(
                f"ExecuTorch's delegate {delegate} does not support {', '.join(left)} of the {name}; use the"
                " delegate xnnpack."
            )
    program = edge.to_executorch(
        ExecutorchBackendConfig(
            # All methods share one memory; otherwise a method overwrites another's KV cache.
            memory_planning_pass=MemoryPlanningPass(share_mutable_buffers=True),
            emit_mutable_buffer_names=True,
        )
    )
    with file.open("wb") as stream:
        program.write_to_file(stream)
    return {
        name: sum("call_delegate" in str(node.target) for node in graph.nodes)
        for name, graph in graphs.items()
    }


def _left(graph: Graph) -> list[str]:
    """List the operators that no delegate runs."""
    called = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    names = {name.partition(": schema")[0].removeprefix("<EdgeOpOverload: ") for name in called}
    return sorted(name for name in names if "call_delegate" not in name and "getitem" not in name)
