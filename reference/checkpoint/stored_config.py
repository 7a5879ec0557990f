"""What the tensors of a checkpoint say against its config: the vocabulary and the tied head.

Trainers resize the vocabulary, or untie the head, without writing this in every config.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from reference.checkpoint.layouts import EMBEDDING, HEAD, canonical_names, parameter_sources
from reference.checkpoint.tensor_files import TensorFiles
from reference.model.config import ModelConfig


def config_of_weights(config: ModelConfig, files: TensorFiles) -> ModelConfig:
    """Return a config with the vocabulary size and the tie of its tensors.

    The vocabulary size is the number of rows of the embedding and the head, if they agree and have
    the decoder's width. A head that differs from the embedding is not tied, as in transformers.
    """
    stored = canonical_names(config, files.stored)
    sources = parameter_sources(config, {EMBEDDING: (), HEAD: ()})
    names = [rows[0] for source in sources.values() if len(rows := stored.get(source.names[0], [])) == 1]
    shapes = {files.stored[name].shape for name in names}
    if len(shapes) != 1:
        return config
    (shape,) = shapes
    if len(shape) != 2 or shape[0] < 1 or shape[1] != config.decoder.width:
        return config
    config = replace(config, decoder=replace(config.decoder, vocab_size=shape[0]))
    if config.tied_head and len(names) == 2:
        embedding, head = map(files.load, names)
        return replace(config, tied_head=torch.equal(embedding, head))
    return config
