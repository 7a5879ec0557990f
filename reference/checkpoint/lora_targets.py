"""Which parameters the tensors of a LoRA adapter belong to."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from reference.checkpoint.layouts import (
    EMBEDDING,
    HEAD,
    ParameterSource,
    Shape,
    canonical_names,
    is_unused,
    parameter_sources,
)
from reference.model.config import Layout, ModelConfig

LAYOUTS: tuple[Layout, ...] = ("original", "transformers")


@dataclass(frozen=True)
class Slice:
    """Rows of a parameter that are one tensor of a checkpoint.

    Attributes:
        parameter: name of the parameter.
        index: which of the equal parts, as of a joint q, k and v.
        count: the number of parts; 1 if the tensor is the whole parameter.
        shape: of the tensor.
    """

    parameter: str
    index: int
    count: int
    shape: Shape

    def rows(self, size: int) -> slice:
        """Return the rows, of a parameter with ``size`` rows."""
        part = size // self.count
        return slice(self.index * part, (self.index + 1) * part)


def _known_sources(config: ModelConfig, shapes: Mapping[str, Shape]) -> dict[str, ParameterSource]:
    """Return the sources of the parameters that the config's layout has names for."""
    found: dict[str, ParameterSource] = {}
    for parameter, shape in shapes.items():
        # transformers' DeepSeek-VL has no aligner of three layers.
        with suppress(KeyError):
            found |= parameter_sources(config, {parameter: shape})
    return found


class Targets:
    """Parameters by the tensor names of both checkpoint layouts.

    An adapter can be trained on one layout and used with a checkpoint in the other. Prefixes of
    wrapping modules are accepted as in checkpoints.
    """

    def __init__(self, config: ModelConfig, shapes: Mapping[str, Shape]) -> None:
        """List the tensors of a model whose parameters have these shapes."""
        self._tied = {EMBEDDING, HEAD} if config.tied_head else set()
        self._tables: list[tuple[ModelConfig, dict[str, Slice]]] = []
        for layout in sorted(LAYOUTS, key=lambda layout: layout != config.layout):
            table: dict[str, Slice] = {}
            layout_config = replace(config, layout=layout)
            for parameter, source in _known_sources(layout_config, shapes).items():
                for index, name in enumerate(source.names):
                    table[name] = Slice(parameter, index, len(source.names), source.shape)
            self._tables.append((layout_config, table))

    def __contains__(self, name: str) -> bool:
        """Return whether a model in one of the layouts has the tensor."""
        return self._find(name) is not None

    def __getitem__(self, name: str) -> Slice:
        """Return the parameter of a tensor."""
        target = self._find(name)
        if target is None:
            raise KeyError(name)
        return target

    def sharing(self, name: str) -> list[Slice]:
        """Return the parameters that share the tensor's memory: two if the head is tied."""
        target = self[name]
        if target.parameter not in self._tied:
            return [target]
        return [replace(target, parameter=parameter) for parameter in sorted(self._tied)]

    def unused(self, name: str) -> bool:
        """Return whether no model here uses a tensor, such as those of SigLIP's pooling head."""
        return any(
            is_unused(config, canonical)
            for config, _ in self._tables
            for canonical in canonical_names(config, [name])
        )

    def _find(self, name: str) -> Slice | None:
        for config, table in self._tables:
            (canonical,) = canonical_names(config, [name])
            if canonical in table:
                return table[canonical]
        return None
