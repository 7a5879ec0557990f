"""Sessions of the reference model, so that the runtime's chain runs it like any backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from reference.checkpoint.checkpoint import Checkpoint
from reference.checkpoint.specs import preprocess_spec, prompt_spec
from reference.model.decoder import Decoder
from reference.model.deepseek_vl import DeepSeekVL
from reference.taps import Tap, component_taps, record_taps
from reference.trace import component_contract
from runtimes.bundle.contracts import Contract
from runtimes.cache import HostCache, KVCache
from runtimes.chain import Chain
from runtimes.decode_call import UNLIMITED, validated_call
from runtimes.embedding import TokenEmbedding
from runtimes.text.tokenizer import Tokenizer

REFERENCE_CHUNK = 2048  # tokens; a model that streams its weights reads all of them in every call


class TorchComponent:
    """Session of a stateless component in eager PyTorch."""

    def __init__(self, module: nn.Module, contract: Contract, taps: Sequence[Tap] = ()) -> None:
        """Wrap a module.

        Args:
            module: the component.
            contract: its contract; that of a debug build if there are taps.
            taps: returned as additional outputs.
        """
        self.contract, self._module, self._taps = contract, module, taps

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the component; inputs and outputs are named as in the contract."""
        tensors = [torch.from_numpy(inputs[spec.name]) for spec in self.contract.inputs]
        with record_taps(self._module, self._taps) as tapped:
            outputs = self._module(*tensors)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        tensors = [*outputs, *(tapped[tap.name] for tap in self._taps)]
        return {
            spec.name: tensor.numpy() for spec, tensor in zip(self.contract.outputs, tensors, strict=True)
        }


class TorchDecoder:
    """Session of the decoder in eager PyTorch, which writes into the cache's numpy memory.

    ``tapped`` has the taps of the last call.
    """

    max_logit_rows = max_batch = UNLIMITED

    def __init__(self, module: Decoder, contract: Contract, taps: Sequence[Tap] = ()) -> None:
        """Wrap a decoder; arguments as in ``TorchComponent``."""
        self.contract, self._module, self._taps = contract, module, taps
        self.tapped: Mapping[str, np.ndarray] = {}

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """Allocate a cache for ``batch`` sequences of at most ``capacity`` tokens."""
        return HostCache(self.contract.states, batch, capacity)

    @torch.inference_mode()
    def decode(self, inputs_embeds: np.ndarray, logit_rows: np.ndarray, cache: KVCache) -> np.ndarray:
        """Append tokens to the cache and compute logits.

        Args:
            inputs_embeds: ``[B, S, D]``.
            logit_rows: ``[K]`` indices into S.
            cache: as ``new_cache`` returns it; updated in place.

        Returns:
            ``[B, K, V]`` float32.
        """
        call = validated_call(
            self.contract, HostCache, inputs_embeds, logit_rows, cache, batched_prefill=True
        )
        with call as (own, rows, positions), record_taps(self._module, self._taps) as tapped:
            states = [torch.from_numpy(array) for array in own.arrays]
            arguments = (torch.from_numpy(array) for array in (inputs_embeds, positions, rows))
            logits = self._module(*arguments, states)
        self.tapped = {name: tensor.numpy() for name, tensor in tapped.items()}
        return np.asarray(logits.numpy())


def reference_chain(
    checkpoint: Checkpoint,
    embedding_file: Path,
    model: DeepSeekVL | None = None,
    tapped: bool = False,
    kv_cache: str = "float",
) -> Chain:
    """Build the runtime's chain on the fp32 reference model.

    Args:
        checkpoint: its tokenizer and preprocessing are used.
        embedding_file: the table that ``write_token_embedding`` wrote.
        model: the loaded model; None loads it.
        tapped: return taps, as the sessions of a debug build do.
        kv_cache: precision of the model's cache.
    """
    model = model or checkpoint.load_model()
    config = checkpoint.config

    def contract(component: str) -> Contract:
        plain = component_contract(config, component, "fp32", kv_cache)
        return plain.with_taps() if tapped else plain

    def taps(component: str) -> Sequence[Tap]:
        return component_taps(config, component) if tapped else ()

    return Chain(
        Tokenizer(checkpoint.tokenizer_files[0], prompt_spec(checkpoint)),
        preprocess_spec(checkpoint),
        TokenEmbedding(embedding_file),
        TorchComponent(model.vision_encoder, contract("vision_encoder"), taps("vision_encoder")),
        TorchComponent(model.adaptor, contract("adaptor"), taps("adaptor")),
        TorchDecoder(model.decoder, contract("decoder"), taps("decoder")),
        REFERENCE_CHUNK,
    )


def write_token_embedding(checkpoint: Checkpoint, file: Path) -> None:
    """Write the embedding table in the checkpoint's dtype, as ``TokenEmbedding`` reads it."""
    table = checkpoint.load("token_embedding.weight").contiguous()
    save_file({"token_embedding": table}, file)
