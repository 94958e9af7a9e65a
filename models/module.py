"""One linear of a model, as it is published: its name and its shape. No torch."""

from __future__ import annotations

from dataclasses import dataclass

ENDS = ("embedding", "per_layer_embedding", "head")


@dataclass(frozen=True)
class ModuleShape:
    """One linear (or embedding) of the checkpoint: weight [N, K], by its published name."""

    name: str
    N: int
    K: int
    part: str  # embedding, per_layer_embedding, attention, delta, mlp (or router and experts), per_layer, head
    bias: bool

    @property
    def in_layer(self) -> bool:
        return self.part not in ENDS
