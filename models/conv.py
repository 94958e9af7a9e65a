"""Layers of a short gated convolution, which keep the last few of its inputs in place of keys and values. No torch.

With b, c and x the three parts of what ``in_proj`` gives of a token, and w the weights of each channel: the layer adds
``out_proj`` of ``c * sum over i of w[i] * (b * x)`` of the last ``kernel`` tokens, this one with the last weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from models.family import Architecture
from models.fields import Fields
from quant.errors import InputError

KINDS = ("conv", "full_attention")


@dataclass(frozen=True)
class ShortConv:
    """Such layers of a model; all of them are alike."""

    channels: int  # the hidden size
    kernel: int  # tokens that the convolution sees, of each channel by itself
    name: str = "conv"  # within a layer
    part: str = "conv"  # of a plan

    @property
    def value_size(self) -> int:
        """Inputs of ``output``."""
        return self.channels

    @property
    def inputs(self) -> tuple[tuple[str, int], ...]:
        """The linear that reads the layer's norm: (name within a layer, outputs)."""
        return ((f"{self.name}.in_proj", 3 * self.channels),)

    @property
    def output(self) -> str:
        return f"{self.name}.out_proj"

    @property
    def small_tensors(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """(name within a layer, shape) of what is kept in float32, whatever the type of activations."""
        return ((f"{self.name}.conv.weight", (self.channels, 1, self.kernel)),)

    @property
    def conv_shape(self) -> tuple[int, int]:
        """What kernels.states.StateCache keeps of one sequence, in float32."""
        return self.kernel - 1, self.channels

    @property
    def state_shape(self) -> tuple[int, ...]:
        """There is nothing beside it."""
        return (0,)

    @property
    def state_bytes(self) -> int:
        """Of one sequence in one layer."""
        return 4 * prod(self.conv_shape)


def conv_layers(kind: Architecture, fields: Fields, layers: int) -> tuple[ShortConv | None, tuple[bool, ...]]:
    """(what they are, whether each layer is one of them), by layer_types or full_attn_idxs; all have attention by default."""
    if not kind.conv:
        return None, ()
    types, given = fields.get("layer_types"), fields.get("full_attn_idxs")
    if types is None and given is not None:
        if not isinstance(given, list) or not all(type(one) is int and 0 <= one < layers for one in given):
            raise InputError(f"config.json: full_attn_idxs is {given!r:.60}, expected numbers of the {layers} layers")
        types = [KINDS[layer in given] for layer in range(layers)]
    types = [KINDS[1]] * layers if types is None else types
    if not isinstance(types, list) or len(types) != layers or not all(one in KINDS for one in types):
        raise InputError(f"config.json: layer_types must name {' or '.join(KINDS)} for each of {layers} layers")
    if KINDS[1] not in types:
        raise InputError(f"config.json: none of {layers} layers is one of {KINDS[1]}, and models without any are not supported")
    linear = tuple(one == KINDS[0] for one in types)
    if not any(linear):
        return None, ()
    return ShortConv(fields.integer("hidden_size"), fields.integer("conv_L_cache", default=3, minimum=2)), linear
