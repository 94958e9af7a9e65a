"""What layers of Gemma 4 E2B and E4B read of tokens beside hidden states, and which read what others have cached. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from models.family import Architecture
from models.fields import Fields
from models.module import ModuleShape
from quant.errors import InputError

TABLE, PROJECTION = "model.embed_tokens_per_layer", "model.per_layer_model_projection"
NORM, LAYER_NORM = "model.per_layer_projection_norm", "post_per_layer_input_norm"
GATE, ADDED = "per_layer_input_gate", "per_layer_projection"


@dataclass(frozen=True)
class PerLayer:
    """A second embedding, whose rows have features for each layer, and a projection of the first to as many.

    Their sum, the projection normalized, is what layers read: ``first`` is the one whose features a model of some layers alone
    begins with.
    """

    size: int  # features of a layer
    layers: int  # that they are there for
    first: int = 0

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.size * self.layers

    def ends(self, vocab: int, hidden: int) -> list[ModuleShape]:
        """Table and projection, which are before all layers."""
        return [
            ModuleShape(TABLE, vocab, self.width, "per_layer_embedding", False),
            ModuleShape(PROJECTION, self.width, hidden, "per_layer_embedding", False),
        ]

    def modules(self, hidden: int) -> Iterator[ModuleShape]:
        """The linears of a layer, by their name within it."""
        yield ModuleShape(GATE, self.size, hidden, "per_layer", False)
        yield ModuleShape(ADDED, hidden, self.size, "per_layer", False)


def more_of_layers(kind: Architecture, fields: Fields, windows: Sequence[int | None]) -> dict[str, Any]:
    """``per_layer``, ``shared`` and ``wide_mlp`` of a ModelSpec, where a family has these.

    InputError where the second embedding has other tokens than the first, or a layer has nobody to read from.
    """
    if not kind.per_layer_inputs:
        return {}
    layers, size = len(windows), fields.integer("hidden_size_per_layer_input", default=0, minimum=0)
    vocab, known = fields.integer("vocab_size"), fields.integer("vocab_size_per_layer_input")
    if size and known != vocab:
        raise InputError(f"config.json: vocab_size_per_layer_input is {known}, but vocab_size {vocab}: they must be the same")
    count = fields.integer("num_kv_shared_layers", default=0, minimum=0)
    if count and not set(windows[layers - min(count, layers) :]) <= set(windows[: max(0, layers - count)]):
        raise InputError(
            f"config.json: num_kv_shared_layers is {count}, but of the {max(0, layers - count)} layers before none has keys and "
            "values for each type of these"
        )
    return {
        "per_layer": PerLayer(size, layers) if size else None,
        "shared": tuple(layer >= layers - count for layer in range(layers)) if count else (),
        "wide_mlp": 2 if fields.flag("use_double_wide_mlp", default=False) else 1,
    }


def caches(windows: Sequence[int | None], shared: Sequence[bool]) -> tuple[int, ...]:
    """Which cache each layer reads: its own, or that of the last layer before that has one and sees as much."""
    last: dict[int | None, int] = {}
    found: list[int] = []
    for window, reads in zip(windows, shared, strict=True):
        if not reads:
            last[window] = max(last.values(), default=-1) + 1
        found.append(last[window])
    return tuple(found)
