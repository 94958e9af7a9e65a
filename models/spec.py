"""What a decoder is made of, read from config.json alone (no torch), refused by name where it is not known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from models.adapter_config import AdapterLimits
from models.architectures import ARCHITECTURES, read_architecture
from models.conv import ShortConv, conv_layers
from models.delta import DeltaNet, delta_layers
from models.factors import multipliers, score_scale
from models.fields import Fields, cap, published_dtype, stated, tensors_ahead
from models.heads import KVHeads, attention_modules, most_heads, wide_heads
from models.latent import Latent, read_latent
from models.mixture import Mixture, read_mixture
from models.module import ModuleShape
from models.per_layer import LAYER_NORM, NORM, PerLayer, caches, more_of_layers
from models.rope_spec import RopeSpec, by_alpha, by_layer_type, check_rope, read_rope
from models.windows import unrotated, windows

__all__ = ["ARCHITECTURES", "DeltaNet", "KVHeads", "Latent", "Mixture", "ModelSpec", "ModuleShape", "PerLayer", "RopeSpec"]

XIELU = ("mlp.act_fn.alpha_p", "mlp.act_fn.alpha_n")  # within a layer; read as numbers, which take no place


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer; every flag a supported architecture needs, none it does not."""

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int  # of the MLP, or of each expert
    vocab: int
    rope: RopeSpec
    eps: float
    tie_embeddings: bool
    max_len: int  # the longest context the model was made for
    dtype: str  # float16, bfloat16 or float32, as published
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    whole_qk_norm: bool = False  # it is over all heads at once, not over each
    late_qk_norm: bool = False  # it comes after rotation
    qk_names: tuple[str, str] = ("q_norm", "k_norm")  # of these norms within attention
    fused_qkv: bool = False  # the checkpoint stores qkv_proj
    fused_gate_up: bool = False  # and gate_up_proj
    mixture: Mixture | None = None
    delta: DeltaNet | None = None
    conv: ShortConv | None = None
    latent: Latent | None = None  # what attention is over: one head of keys, which are the values, too
    linear: tuple[bool, ...] = ()  # whether a layer is no attention, but of ``recurrent``; empty: none is
    output_gate: bool = False  # q_proj has gates after each head's queries: attention's output * sigmoid(gate)
    windows: tuple[int | None, ...] = ()  # sliding window by layer; None sees everything
    wide: KVHeads | None = None  # of layers that see everything, where theirs are not kv_heads of head_dim
    shared: tuple[bool, ...] = ()  # whether a layer has no keys and values, and reads those of one before that sees as much
    wide_mlp: int = 1  # the MLPs of these are so many times as wide
    per_layer: PerLayer | None = None  # what layers read of tokens beside hidden states
    v_norm: bool = False  # values are normalized by head, without a weight
    layer_scalar: bool = False  # what a layer gives is multiplied by a number of its own
    local_rope: RopeSpec | None = None  # of layers that rotate otherwise than the others, or not at all
    local: tuple[bool, ...] = ()  # whether a layer is one of these
    norm_offset: float = 0.0  # added to the weights of norms
    norms: tuple[str, str, str] = ("", "post_attention_layernorm", "")
    """Names: of what attention adds, before the MLP, of what the MLP adds; empty where there is none.

    Without one before the MLP there is none before attention.
    """
    input_norm: str = "input_layernorm"  # the name of that
    ungated: str = ""  # the activation of MLPs without a gate: "relu2", or "xielu" with tensors of its own
    interleaved: bool = False  # queries and keys are published such that neighbours rotate against each other, not halves
    gelu: bool = False  # gelu(gate) * up, in the approximation by tanh, instead of silu(gate) * up
    embedding_scale: float = 1.0
    rounded_scale: bool = False  # it is rounded to the type of the activations first
    scale: float = 1.0  # of attention's scores
    sinks: bool = False  # heads have one more logit each in the softmax of scores, of which there is no value
    cap: float | None = None  # of attention's scores: cap * tanh(score / cap)
    logit_cap: float | None = None  # the same of logits
    float16: bool = True  # whether activations stay within what float16 holds
    logit_divisor: float = 1.0
    adapters: AdapterLimits | None = None  # of LoRA, that requests may have
    ahead: tuple[str, ...] = ()  # how tensors begin that guess tokens ahead, and are left out
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelSpec:
        """Read config.json. Raises InputError naming the architecture, key or value that is not supported."""
        name, kind, fields = read_architecture(config)
        config, by = fields.values, multipliers(kind, fields)
        hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        latent = read_latent(kind, fields)
        kv_heads, head_dim = most_heads(kind, fields, hidden, heads) if latent is None else (1, latent.size)
        layers = fields.count("num_hidden_layers")
        max_position = fields.integer("max_position_embeddings", default=kind.max_position)
        settings = Fields({"max_position_embeddings": max_position, **config})
        parts = [settings] if kind.local_theta is None else by_layer_type(settings, kind.theta, kind.local_theta)
        parts = [by_alpha(one, head_dim, kind.theta) for one in parts] if kind.alpha else parts
        whole = "" if kind.partial_rotation else name
        seen, still = windows(kind, fields, layers), unrotated(kind, fields, layers)
        wide = wide_heads(kind, fields, seen, KVHeads(kv_heads, head_dim), heads)
        turned = head_dim if latent is None else latent.rope
        sizes = [turned if wide is None else wide.size, head_dim]
        ropes = [read_rope(*one, max_position, kind.theta, whole, kind.yarn) for one in zip(parts, sizes, strict=False)]
        check_rope(kind, ropes[0], name)
        mixture = read_mixture(kind, fields, layers)
        delta, linear = delta_layers(kind.delta, fields, layers)
        conv, linear = conv_layers(kind, fields, layers) if kind.conv else (None, linear)
        if any(still):
            ropes.append(replace(ropes[0], kind="none"))
        return cls(
            architecture=name,
            layers=layers,
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate=fields.integer(kind.inner if mixture is None else kind.expert_size),
            vocab=fields.integer("vocab_size"),
            rope=ropes[0],
            # Granite adds a share of what a layer computes: hidden states here are larger than its by one over that share.
            eps=fields.number("rms_norm_eps", default=kind.eps) / by["residual_multiplier"] ** 2,
            tie_embeddings=fields.flag("tie_word_embeddings", default=False),
            max_len=ropes[0].max_len if kind.local_theta is None else max_position,  # Gemma 3 states what its scaling leads to
            dtype=published_dtype(config),
            qkv_bias=stated(kind.qkv_bias, fields),
            o_bias=stated(kind.o_bias, fields),
            mlp_bias=stated(kind.mlp_bias, fields),
            qk_norm=stated(kind.qk_norm, fields),
            whole_qk_norm=kind.whole_qk_norm,
            late_qk_norm=kind.late_qk_norm,
            qk_names=kind.qk_names,
            fused_qkv=kind.fused_qkv,
            fused_gate_up=kind.fused_qkv or kind.fused_gate_up or kind.hybrid,
            mixture=mixture,
            delta=delta if any(linear) else None,
            conv=conv,
            latent=latent,
            linear=linear if any(linear) else (),
            output_gate=bool(kind.delta),
            windows=seen,
            wide=wide,
            **more_of_layers(kind, fields, seen),
            v_norm=kind.v_norm,
            layer_scalar=kind.layer_scalar,
            local_rope=ropes[1] if len(ropes) > 1 else None,
            local=still if any(still) else tuple(window is not None for window in seen),
            norm_offset=1.0 if kind.unit_norms else 0.0,
            norms=kind.norms,
            input_norm=kind.input_norm,
            ungated=kind.ungated,
            interleaved=kind.interleaved,
            gelu=kind.gelu,
            embedding_scale=hidden**0.5 if kind.scaled_embedding else by["embedding_multiplier"] / by["residual_multiplier"],
            rounded_scale=kind.scaled_embedding,
            scale=score_scale(kind, fields, by, head_dim) if latent is None else latent.scale(ropes[0]),
            sinks=kind.sinks,
            cap=cap("attn_logit_softcapping", fields),
            logit_cap=cap("final_logit_softcapping", fields),
            float16=kind.float16,
            logit_divisor=by["logits_scaling"],
            ahead=tensors_ahead(kind, fields, layers),
            eos_token_ids=fields.token_ids("eos_token_id"),
            bos_token_id=next(iter(fields.token_ids("bos_token_id")), None),
        )

    @property
    def q_size(self) -> int:
        """Of most layers, where some have wide heads."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    def heads_of(self, layer: int) -> KVHeads:
        """Those of a layer of attention."""
        wide = self.wide if self.windows and self.windows[layer] is None else None
        return replace(wide or KVHeads(self.kv_heads, self.head_dim), shared=self.is_shared(layer))

    @property
    def by_layer(self) -> tuple[KVHeads, ...]:
        """Those of each layer of attention, in order."""
        return tuple(self.heads_of(layer) for layer in range(self.layers) if not self.is_linear(layer))

    @property
    def kv_shapes(self) -> tuple[tuple[int, int], ...]:
        """(key-value heads, their size) of each cache; nothing where all have the same."""
        return () if self.wide is None else tuple((heads.count, heads.size) for heads in self.by_layer if not heads.shared)

    @property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """Each of which a table is kept."""
        return (self.rope,) if self.local_rope is None else (self.rope, self.local_rope)

    @property
    def attention_layers(self) -> int:
        """Layers that read keys and values."""
        return self.layers - sum(self.linear)

    @property
    def caches(self) -> tuple[int, ...]:
        """Which cache each of these reads: as many as there are layers that have keys and values of their own."""
        return caches(self.windows, self.shared) if self.shared else tuple(range(self.attention_layers))

    @property
    def kv_layers(self) -> int:
        """Layers that have keys and values of their own."""
        return self.attention_layers - sum(self.shared)

    @property
    def storing(self) -> int:
        """Layers before those that read the keys and values of others: behind these only rows that somebody looks at go on."""
        return self.layers - sum(self.shared)

    def is_shared(self, layer: int) -> bool:
        """Whether it reads keys and values of another."""
        return bool(self.shared) and self.shared[layer]

    def has_cache(self, layer: int) -> bool:
        """Whether it has keys and values of its own."""
        return not (self.is_linear(layer) or self.is_shared(layer))

    @property
    def recurrent(self) -> DeltaNet | ShortConv | None:
        """What layers without attention are, which keep a state of one size."""
        return self.delta or self.conv

    def is_linear(self, layer: int) -> bool:
        """Whether it is ``recurrent``."""
        return bool(self.linear) and self.linear[layer]

    def rope_of(self, layer: int) -> RopeSpec:
        """That by which a layer rotates."""
        return self.rope if self.local_rope is None or not self.local[layer] else self.local_rope

    def mixture_of(self, layer: int) -> Mixture | None:
        """That of a layer; None where it has one MLP."""
        return None if self.mixture is None or layer in self.mixture.dense_layers else self.mixture

    @property
    def mlp_size(self) -> int:
        """Features of the MLP of a layer without a mixture, or beside one, at most; 0: there is none."""
        return max(self.mlp_of(layer) for layer in (0, self.layers - 1))

    def mlp_of(self, layer: int) -> int:
        """The same of a layer."""
        size = self.intermediate if self.mixture is None else self.mixture.dense
        return size * (self.wide_mlp if self.is_shared(layer) else 1)

    @property
    def widest_mlp(self) -> int:
        """Features of the largest MLP or expert."""
        return max(self.intermediate, self.mlp_size, 0 if self.mixture is None else self.mixture.shared)

    def kind(self, layer: int) -> object:
        """Layers of one kind have modules of the same names and shapes."""
        return self.mixture_of(layer) is None, self.is_linear(layer), self.heads_of(layer)

    @property
    def unlike(self) -> list[int]:
        """The first layer of each kind."""
        return list({self.kind(layer): layer for layer in reversed(range(self.layers))}.values())

    def part(self, layers: range) -> ModelSpec:
        """A model of these layers alone, one behind another."""
        here, mixture = slice(layers.start, layers.stop), self.mixture
        linear = self.linear[here] if any(self.linear[here]) else ()
        if mixture is not None and not mixture.beside:
            dense = tuple(layer - layers.start for layer in mixture.dense_layers if layer in layers)
            alone = replace(mixture, dense_layers=dense, dense=mixture.dense if dense else 0)
            mixture = alone if len(dense) < len(layers) else None
        return replace(
            self,
            layers=len(layers),
            intermediate=self.mixture.dense if mixture is None and self.mixture is not None else self.intermediate,
            mixture=mixture,
            delta=self.delta if linear else None,
            conv=self.conv if linear else None,
            linear=linear,
            windows=self.windows[here],
            shared=self.shared[here] if any(self.shared[here]) else (),
            per_layer=self.per_layer and replace(self.per_layer, first=self.per_layer.first + layers.start),
            local=self.local[here],
        )

    def qk_norms(self, layer: int) -> tuple[tuple[str, int], ...]:
        """(name within attention, size) of those of queries and of keys of a layer, where there are such."""
        sizes = (self.q_size, self.kv_size) if self.whole_qk_norm else (self.heads_of(layer).size,) * 2
        return tuple(zip(self.qk_names, sizes, strict=True))[: 1 if self.is_shared(layer) else 2]

    @property
    def one_by_one(self) -> bool:
        """Whether it has what no call for all layers at once does (Ops.bind)."""
        return any((self.conv, self.latent, self.whole_qk_norm, self.late_qk_norm, self.ungated))

    @property
    def pre_norm(self) -> bool:
        """Whether what attention and the MLP read is normalized."""
        return bool(self.norms[1])

    @property
    def post_norms(self) -> bool:
        """Whether what attention and the MLP add is normalized, too."""
        return bool(self.norms[0])

    def modules(self) -> list[ModuleShape]:
        """Embedding, every linear of every layer, and the head (absent where it is tied to the embedding)."""
        found = [ModuleShape("model.embed_tokens", self.vocab, self.hidden, "embedding", False)]
        found += self.per_layer.ends(self.vocab, self.hidden) if self.per_layer is not None else []
        kinds = {self.kind(layer): list(self.layer_modules(layer)) for layer in self.unlike}
        for layer in range(self.layers):
            of_layer = kinds[self.kind(layer)]
            found += [ModuleShape(f"model.layers.{layer}.{m.name}", m.N, m.K, m.part, m.bias) for m in of_layer]
        if not self.tie_embeddings:
            found.append(ModuleShape("lm_head", self.vocab, self.hidden, "head", False))
        return found

    def layer_modules(self, layer: int = 0) -> Iterator[ModuleShape]:
        """The linears of a layer, by their name within it."""
        hidden, inner = self.hidden, self.mlp_of(layer)
        if (net := self.recurrent) is not None and self.is_linear(layer):
            for name, size in net.inputs:
                yield ModuleShape(name, size, hidden, net.part, False)
            yield ModuleShape(net.output, hidden, net.value_size, net.part, False)
        elif self.latent is not None:
            yield from self.latent.modules(hidden, self.heads)
        else:
            options = {"fused": self.fused_qkv, "gates": self.output_gate, "bias": self.qkv_bias, "o_bias": self.o_bias}
            yield from attention_modules(self.heads, self.heads_of(layer), hidden, **options)
        if self.per_layer is not None:
            yield from self.per_layer.modules(hidden)
        if (mixture := self.mixture_of(layer)) is not None:
            yield from mixture.modules(hidden, self.intermediate)
            if not mixture.beside:
                return
        if self.fused_gate_up:
            yield ModuleShape("mlp.gate_up_proj", 2 * inner, hidden, "mlp", self.mlp_bias)
        else:
            for name in ("up_proj",) if self.ungated else ("gate_proj", "up_proj"):
                yield ModuleShape(f"mlp.{name}", inner, hidden, "mlp", self.mlp_bias)
        yield ModuleShape("mlp.down_proj", hidden, inner, "mlp", self.mlp_bias)

    def small_tensors(self) -> list[tuple[str, int]]:
        """Norm weights, sinks, what delta layers have, and corrections of routers: (name, number of values)."""
        found = [("model.norm.weight", self.hidden)]
        names = [*([self.input_norm] if self.pre_norm else []), *filter(None, self.norms)]
        if self.per_layer is not None:
            found.append((f"{NORM}.weight", self.per_layer.size))
            names.append(LAYER_NORM)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            found += [(f"{prefix}.{n}.weight", self.hidden) for n in names]
            if (net := self.recurrent) is not None and self.is_linear(layer):
                found += [(f"{prefix}.{name}", math.prod(shape)) for name, shape in net.small_tensors]
            elif self.qk_norm:
                found += [(f"{prefix}.self_attn.{name}.weight", size) for name, size in self.qk_norms(layer)]
            elif self.latent is not None:
                found += [(f"{prefix}.{name}", size) for name, size in self.latent.small_tensors]
            found += [(f"{prefix}.{name}", 1) for name in (XIELU if self.ungated == "xielu" else ())]
            if self.layer_scalar:
                found.append((f"{prefix}.layer_scalar", 1))
            if self.sinks:
                found.append((f"{prefix}.self_attn.sinks", self.heads))
            if (mixture := self.mixture_of(layer)) is not None:
                found += [(f"{prefix}.{name}", size) for name, size in mixture.small_tensors(self.hidden)]
        return found

    def small_nbytes(self, item: int) -> int:
        """Bytes of ``small_tensors`` as they are loaded where activations have ``item`` bytes, and of norms without a weight.

        What routers have of each expert, and what delta layers have, stay in float32; what XIELU names becomes numbers. A norm
        without a weight has one of ones.
        """
        mixture, net = self.mixture, self.recurrent
        exact = 0 if mixture is None else mixture.experts * (bool(mixture.correction) + bool(mixture.gains))
        wide = 0 if mixture is None else exact * (self.layers - len(mixture.dense_layers))
        wide += 0 if net is None else sum(math.prod(shape) for _, shape in net.small_tensors) * sum(self.linear)
        numbers = sum(name.endswith(XIELU) for name, _ in self.small_tensors())
        ones = sum(heads.size for heads in self.by_layer if not heads.shared) if self.v_norm else 0
        return item * (sum(numel for _, numel in self.small_tensors()) - wide - numbers + ones) + 4 * wide

    @property
    def num_parameters(self) -> int:
        return sum(m.N * m.K + (m.N if m.bias else 0) for m in self.modules()) + sum(n for _, n in self.small_tensors())

    @property
    def linear_parameters(self) -> tuple[int, int]:
        """(all weights of the layers' linears, those of them that a token goes through)."""
        sizes = [(m.N * m.K, m.part == "experts") for m in self.modules() if m.in_layer]
        expert, rest = (sum(size for size, one in sizes if one == kind) for kind in (True, False))
        active = expert if self.mixture is None else expert * self.mixture.active // self.mixture.experts
        return rest + expert, rest + active
