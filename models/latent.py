"""Latent attention: keys and values of all heads come of one vector a token, and that is what is cached. No torch.

DeepSeek V2's attention, in the form in which its up-projections are absorbed: a head's score is a product of its query, taken to
the latent's space, with the latent itself, and what a head gives is a mean of latents, taken back to the values' space. So all
heads share one key, whose latent part is the value as well::

    cached    [rotated: rope | latent: rank]
    queries   [rotated: rope | nope features by the head's part of kv_b_proj: rank]
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from models.family import Architecture
from models.fields import Fields
from models.module import ModuleShape
from models.rope_spec import RopeSpec
from quant.errors import InputError

EPS = 1e-6  # of the norms of latents: transformers takes this one, whatever a config says of the others
ROPES = ("default", "yarn")


@dataclass(frozen=True)
class Latent:
    """Sizes of the latent attention of a model; all its layers are alike."""

    query_rank: int  # of the latent that queries come of; 0: they come of the hidden state
    rank: int  # of that which is cached
    rope: int  # features of a query and of the one key that rotate
    nope: int  # features of a query that do not
    value: int  # features of a head's result
    interleaved: bool = True  # neighbours rotate against each other, not halves
    bias: bool = False  # of what reads the hidden state, and of o_proj

    @property
    def size(self) -> int:
        """Numbers that a token has in the cache of a layer."""
        return self.rope + self.rank

    @property
    def query(self) -> int:
        """Features of a head's query, as published."""
        return self.rope + self.nope

    def down(self, heads: int) -> int:
        """Outputs of what reads the hidden state: the queries, or their latent, and what is cached."""
        return (self.query_rank or heads * self.query) + self.size

    def modules(self, hidden: int, heads: int) -> Iterator[ModuleShape]:
        """The linears of a layer's attention, by their name within it."""
        if self.query_rank:
            yield ModuleShape("self_attn.q_a_proj", self.query_rank, hidden, "attention", self.bias)
        else:
            yield ModuleShape("self_attn.q_proj", heads * self.query, hidden, "attention", False)
        yield ModuleShape("self_attn.kv_a_proj_with_mqa", self.size, hidden, "attention", self.bias)
        if self.query_rank:
            yield ModuleShape("self_attn.q_b_proj", heads * self.query, self.query_rank, "attention", False)
        yield ModuleShape("self_attn.kv_b_proj", heads * (self.nope + self.value), self.rank, "attention", False)
        yield ModuleShape("self_attn.o_proj", hidden, heads * self.value, "attention", self.bias)

    @property
    def small_tensors(self) -> tuple[tuple[str, int], ...]:
        """Norms of a layer's latents: (name within it, numbers)."""
        queries = (("self_attn.q_a_layernorm.weight", self.query_rank),) if self.query_rank else ()
        return (*queries, ("self_attn.kv_a_layernorm.weight", self.rank))

    def scale(self, rope: RopeSpec) -> float:
        """Of scores. YaRN's factor on cosines and sines reaches the rotated features alone: what it leaves out is here."""
        if rope.kind not in ROPES:
            raise InputError(f"config.json: rope type {rope.kind} is not supported for latent attention: {' or '.join(ROPES)}")
        stretched = rope.kind == "yarn" and rope.factor > 1 and rope.mscale_all_dim
        factor = 0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1 if stretched and rope.mscale_all_dim else 1.0
        return self.query**-0.5 * factor**2


def read_latent(kind: Architecture, fields: Fields) -> Latent | None:
    """That of a family; None where it has none."""
    if not kind.latent:
        return None
    rope = fields.integer("qk_rope_head_dim")
    if rope % 2:
        raise InputError(f"config.json: qk_rope_head_dim is {rope}, expected an even number")
    query_rank, bias = fields.integer("q_lora_rank", default=0), fields.flag("attention_bias", default=False)
    if bias and not query_rank:
        raise InputError("config.json: attention_bias is true, which is supported with a q_lora_rank alone")
    return Latent(
        query_rank=query_rank,
        rank=fields.integer("kv_lora_rank"),
        rope=rope,
        nope=fields.integer("qk_nope_head_dim"),
        value=fields.integer("v_head_dim"),
        interleaved=fields.flag("rope_interleave", default=True),
        bias=bias,
    )
