"""Layers of the gated delta rule, which keep a state of one size in place of keys and values: their shapes. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from models.fields import Fields
from quant.errors import InputError


@dataclass(frozen=True)
class DeltaNet:
    """The layers of a model that remember by the gated delta rule; all of a model are alike."""

    key_heads: int
    value_heads: int  # a multiple of key_heads: value head h is asked by key head h // (value_heads // key_heads)
    key_dim: int  # of a head
    value_dim: int
    kernel: int  # tokens that the causal convolution sees, of each channel by itself
    fused: bool = False  # the checkpoint stores in_proj_qkvz and in_proj_ba, with the parts of each key head side by side
    name: str = "linear_attn"  # within a layer
    part: str = "delta"  # of a plan

    @property
    def key_size(self) -> int:
        return self.key_heads * self.key_dim

    @property
    def value_size(self) -> int:
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Numbers of a token that the convolution sees: queries, keys and values."""
        return 2 * self.key_size + self.value_size

    @property
    def inputs(self) -> tuple[tuple[str, int], ...]:
        """The linears that read the layer's norm: (name within a layer, outputs)."""
        if self.fused:
            parts = {"qkvz": self.channels + self.value_size, "ba": 2 * self.value_heads}
        else:
            parts = {"qkv": self.channels, "z": self.value_size, "b": self.value_heads, "a": self.value_heads}
        return tuple((f"{self.name}.in_proj_{part}", size) for part, size in parts.items())

    @property
    def output(self) -> str:
        """The linear that writes the layer's output, of value_size inputs."""
        return f"{self.name}.out_proj"

    @property
    def small_tensors(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """(name within a layer, shape) of what is kept in float32, whatever the type of activations."""
        return (
            (f"{self.name}.conv1d.weight", (self.channels, 1, self.kernel)),
            (f"{self.name}.A_log", (self.value_heads,)),
            (f"{self.name}.dt_bias", (self.value_heads,)),
            (f"{self.name}.norm.weight", (self.value_dim,)),
        )

    @property
    def conv_shape(self) -> tuple[int, int]:
        """What kernels.states.StateCache keeps of one sequence for the convolution, in float32."""
        return self.kernel - 1, self.channels

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """And of the rule, in float32, too."""
        return self.value_heads, self.key_dim, self.value_dim

    @property
    def state_bytes(self) -> int:
        """Of both, of one sequence in one layer."""
        return 4 * (prod(self.conv_shape) + prod(self.state_shape))


def delta_layers(inputs: str, fields: Fields, layers: int) -> tuple[DeltaNet | None, tuple[bool, ...]]:
    """(what they are, whether each layer is one of them): by layer_types, or else all but each full_attention_interval-th.

    ``inputs``: of Architecture.delta. InputError naming the key that does not fit.
    """
    if not inputs:
        return None, ()
    types, known = fields.get("layer_types"), ("linear_attention", "full_attention")
    if types is None:
        every = fields.integer("full_attention_interval", default=4)
        types = [known[(layer + 1) % every == 0] for layer in range(layers)]
    elif not isinstance(types, list) or len(types) != layers or not all(one in known for one in types):
        raise InputError(f"config.json: layer_types must name {' or '.join(known)} for each of {layers} layers")
    heads, values = fields.integer("linear_num_key_heads", default=16), fields.integer("linear_num_value_heads", default=32)
    if values % heads:
        raise InputError(f"config.json: linear_num_value_heads {values} is no multiple of linear_num_key_heads {heads}")
    if known[1] not in types:
        raise InputError(f"config.json: none of {layers} layers is one of {known[1]}, and models without any are not supported")
    linear = tuple(one == known[0] for one in types)
    return DeltaNet(
        key_heads=heads,
        value_heads=values,
        key_dim=fields.integer("linear_key_head_dim", default=128),
        value_dim=fields.integer("linear_value_head_dim", default=128),
        kernel=fields.integer("linear_conv_kernel_dim", default=4, minimum=2),
        fused=inputs == "fused",
    ), linear
