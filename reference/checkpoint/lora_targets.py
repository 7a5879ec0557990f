"""Which parameters the tensors of a LoRA adapter belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from reference.checkpoint.layouts import UNUSED, Shape, canonical_names, sources
from reference.model.config import Layout, ModelConfig

EMBEDDING, HEAD = "token_embedding.weight", "decoder.head.weight"
LAYOUTS: tuple[Layout, ...] = ("original", "transformers")


@dataclass(frozen=True)
class Slice:
    """Rows of a parameter that are one tensor of a checkpoint: a third of a joint q, k and v, or all rows.

    ``shape`` is that of the tensor.
    """

    parameter: str
    index: int
    count: int
    shape: Shape

    def rows(self, size: int) -> slice:
        """Of a parameter with so many rows."""
        part = size // self.count
        return slice(self.index * part, (self.index + 1) * part)


class Targets:
    """Tensor name → the parameters that it is a part of.

    Names are those of either checkpoint layout, whichever the base has: people train on one and deploy the
    other. Wrapping prefixes are accepted as in checkpoints.
    """

    def __init__(self, config: ModelConfig, shapes: Mapping[str, Shape]) -> None:
        self._tied = {EMBEDDING, HEAD} if config.tied_head else set()
        self._tables: list[tuple[ModelConfig, dict[str, Slice]]] = []
        for layout in sorted(LAYOUTS, key=lambda layout: layout != config.layout):
            table: dict[str, Slice] = {}
            layout_config = replace(config, layout=layout)
            for parameter, source in sources(layout_config, dict(shapes)).items():
                for index, name in enumerate(source.names):
                    table[name] = Slice(parameter, index, len(source.names), source.shape)
            self._tables.append((layout_config, table))

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def __getitem__(self, name: str) -> Slice:
        target = self._find(name)
        if target is None:
            raise KeyError(name)
        return target

    def sharing(self, name: str) -> list[Slice]:
        """The parameters that change when this tensor is changed in place; two where the head is tied."""
        target = self[name]
        if target.parameter not in self._tied:
            return [target]
        return [replace(target, parameter=parameter) for parameter in sorted(self._tied)]

    def unused(self, name: str) -> bool:
        """Whether a tensor belongs to what no model here uses, such as SigLIP's pooling head."""
        names = (canonical_names(config, [name]) for config, _ in self._tables)
        return any(UNUSED.fullmatch(canonical) for (canonical,) in names)

    def _find(self, name: str) -> Slice | None:
        for config, table in self._tables:
            (canonical,) = canonical_names(config, [name])
            if canonical in table:
                return table[canonical]
        return None
