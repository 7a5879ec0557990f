"""Names of the reference model's parameters in checkpoints, and of tensors that are not used.

The model families define the names of their layouts (``reference.families``). This module brings
the names in files, which wrappers and tools change, into the form of the families.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from reference.families.names import ParameterSource, Shape
from reference.families.registry import family_of
from reference.model.config import ModelConfig

EMBEDDING, HEAD = "token_embedding.weight", "decoder.head.weight"  # the parameters that can be tied
# Tensors in published checkpoints that no computation uses: pooling heads and norms of other tower
# modes, and tables that every loader computes itself.
UNUSED_TENSORS = re.compile(
    r"(.*\.attn_pool\..*|vision_model\.(high|low)_layer_norm\.(weight|bias)"
    r"|model\.vision_model\.(vision_model\.)?head\..*|.*\.rotary_emb\.inv_freq|.*\.position_ids)"
)


def is_skipped(config: ModelConfig, name: str) -> bool:
    """Return whether a tensor is of a part that answers do not need, such as image generation."""
    pattern = family_of(config).SKIPPED_TENSORS
    return pattern is not None and pattern.fullmatch(name) is not None


def is_unused(config: ModelConfig, name: str) -> bool:
    """Return whether no computation here uses a tensor.

    Args:
        config: of the model.
        name: as ``canonical_names`` returns it.
    """
    return UNUSED_TENSORS.fullmatch(name) is not None or is_skipped(config, name)


def parameter_sources(config: ModelConfig, shapes: dict[str, Shape]) -> dict[str, ParameterSource]:
    """Return the source of every parameter.

    Args:
        config: its ``family`` and ``layout`` determine the names.
        shapes: parameter name → shape, as in ``DeepSeekVL.named_parameters()``.
    """
    source = family_of(config).parameter_source
    return {name: source(config, name, shape) for name, shape in shapes.items()}


# Names that wrapper modules add inside the names of a state dict: torch.compile, FSDP and
# activation checkpointing.
_WRAPPERS = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# What comes before the first part of the model: DistributedDataParallel's and DeepSpeed's
# ``module.``, Lightning's ``_forward_module.``, PEFT's ``base_model.model.``, or any other name
# under which a trainer holds the model.
_OUTER_NAMES = re.compile(
    r"^(?:[^.]+\.)*?(?=(?:vision_model|high_res_vision_(?:model|neck|proj|alpha)|aligner|language_model"
    r"|lm_head)(?:\.|$))"
)


def canonical_names(config: ModelConfig, stored: Iterable[str]) -> dict[str, list[str]]:
    """Map names as in ``parameter_sources`` to the names under which a checkpoint stores them.

    Accepts all that transformers 5.23 accepts (``conversion_mapping.py`` and ``rename_source_key``
    in ``core_model_loading.py``) and more: names with or without ``model.`` or what a trainer
    writes before it; SigLIP nested as in all files of transformers before 5.6; the language model
    nested or not; the head at any level.
    """
    table: dict[str, list[str]] = {}
    for name in stored:
        base = re.sub(r"^(model\.)+", "", _OUTER_NAMES.sub("", _WRAPPERS.sub("", name), count=1))
        base = re.sub(r"^(vision_model\.)+", "vision_model.", base)
        base = re.sub(r"^(?:language_model\.)?(?:model\.)*lm_head\.", "lm_head.", base)
        base = re.sub(r"^language_model\.(model\.)+", "language_model.", base)
        if config.layout == "original":
            base = re.sub(r"^lm_head\.", "language_model.lm_head.", base)
            canonical = re.sub(r"^language_model\.(?!lm_head\.)", "language_model.model.", base)
        else:
            canonical = base if base.startswith("lm_head.") else f"model.{base}"
        table.setdefault(canonical, []).append(name)
    return table
