"""Which layers of a family see a part of the past alone, and which do not rotate, by what configs say. No torch."""

from __future__ import annotations

from models.family import Architecture
from models.fields import Fields
from quant.errors import InputError


def unrotated(kind: Architecture, fields: Fields, layers: int) -> tuple[bool, ...]:
    """Whether each layer leaves queries and keys as they are. InputError where a list does not say so of each."""
    if kind.unrotated == "full":
        limited = fields.get("sliding_window") is not None
        return tuple(limited and window is None for window in windows(kind, fields, layers))
    given = fields.get("no_rope_layers") if kind.unrotated else [1] * layers
    if given is None:
        every = fields.integer("no_rope_layer_interval", default=4)
        given = [(layer + 1) % every for layer in range(layers)]
    elif not isinstance(given, list) or len(given) < layers or not all(one in (0, 1) for one in given):
        raise InputError(f"config.json: no_rope_layers is {given!r:.60}, expected 1 (it rotates) or 0 for each of {layers}")
    return tuple(not one for one in given[:layers])


def windows(kind: Architecture, fields: Fields, layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer; layer_types, where given, decides in families whose layers differ.

    InputError where it says something else than is so in a family whose layers are alike: implementations disagree on such files.
    """
    types = None if kind.delta or kind.conv else fields.get("layer_types")
    given = fields.get("sliding_window") if "sliding_window" in fields.values else kind.default_window
    least = 0 if kind.window == "lower" else 1  # transformers writes 0 where it is not switched on
    window = None if given is None else fields.integer("sliding_window", default=given, minimum=least) or None
    if kind.window == "types" and window is None:
        return (None,) * layers
    every = 2 if kind.window == "alternate" else 0  # which layer sees everything
    if kind.window == "pattern" or (kind.window == "types" and types is None):
        every = fields.integer("sliding_window_pattern", default=6)
    if every:
        window = fields.integer("sliding_window")
    if kind.window == "none":
        window = None
    if kind.window in ("switched", "upper", "lower", "unrotated") and not fields.flag("use_sliding_window", default=False):
        window = None
    if types is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or len(types) != layers or not all(one in known for one in types):
            raise InputError(
                f"config.json: layer_types must name full_attention or sliding_attention for each of {layers} layers"
            )
        found = tuple(window if t == "sliding_attention" else None for t in types)
        if kind.window in ("all", "switched") and set(found) != {window}:
            raise InputError(
                f"config.json: layer_types has full_attention, but all layers here have the sliding_window of {window}"
            )
        if kind.window != "none":
            return found
    if every:  # of families whose last layer sees everything, that one does in any case
        last = layers - 1 if kind.global_heads else layers
        return tuple(window if (layer + 1) % every and layer != last else None for layer in range(layers))
    if kind.window == "unrotated":
        return tuple(window if still else None for still in unrotated(kind, fields, layers))
    border = fields.integer("max_window_layers", default=28, minimum=0) if kind.window in ("lower", "upper") else 0
    if kind.window == "lower":
        return tuple(window if layer < border and layer % 2 == 0 else None for layer in range(layers))
    return tuple(window if layer >= border else None for layer in range(layers))
