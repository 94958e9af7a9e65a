"""What a decoder is made of, read from config.json alone (no torch), refused by name where it is not known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from models.fields import Fields
from models.rope_spec import RopeSpec, read_rope
from quant.errors import InputError

__all__ = ["ARCHITECTURES", "ModelSpec", "ModuleShape", "RopeSpec"]


@dataclass(frozen=True)
class Architecture:
    """How a family differs from plain Llama, and transformers' defaults for keys that configs leave out."""

    qkv_bias: bool | str = "attention_bias"  # a fact, or the config key that says
    o_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = False
    qk_norm: bool = False
    fused_qkv: bool = False
    window: str = "none"
    """Layers with sliding_window: none; "all"; "switched": all, if switched on; "upper": from max_window_layers on, if so."""
    default_window: int | None = None
    default_head_dim: int | None = None
    eps: float = 1e-6
    theta: float = 1e4
    max_position: int = 2048
    mixture: str = ""  # the name of a mixture of experts within a layer; empty: one MLP
    expert: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")  # the linears of each
    expert_size: str = "moe_intermediate_size"
    normalized: bool | str = "norm_topk_prob"


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(mlp_bias="mlp_bias"),
    "MistralForCausalLM": Architecture(qkv_bias=False, o_bias=False, window="all", default_window=4096, max_position=131072),
    "Qwen2ForCausalLM": Architecture(qkv_bias=True, o_bias=False, window="upper", max_position=32768),
    "Qwen3ForCausalLM": Architecture(qk_norm=True, window="upper", default_head_dim=128, max_position=32768),
    "Phi3ForCausalLM": Architecture(qkv_bias=False, o_bias=False, fused_qkv=True, window="all", eps=1e-5, max_position=4096),
    "Qwen3MoeForCausalLM": Architecture(qk_norm=True, window="switched", default_window=4096, max_position=32768, mixture="mlp"),
    "MixtralForCausalLM": Architecture(
        qkv_bias=False, o_bias=False, window="all", eps=1e-5, theta=1e6, max_position=131072,
        mixture="block_sparse_moe", expert=("w1", "w3", "w2"), expert_size="intermediate_size", normalized=True,
    ),
}  # fmt: skip
DTYPES = ("float16", "bfloat16", "float32")
# Keys that would change the arithmetic, with the values under which they do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "pretraining_tp": (None, 1),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
}
EXPERTS = ("num_experts", "num_local_experts")  # either has the number of a mixture's experts
DENSE: dict[str, tuple[Any, ...]] = dict.fromkeys(EXPERTS, (None, 0))
ALL_SPARSE: dict[str, tuple[Any, ...]] = {"decoder_sparse_step": (None, 1), "mlp_only_layers": (None, [])}
"""The same of models whose layers have one MLP each, and of those whose layers are all mixtures."""
ENDS = ("embedding", "head")


@dataclass(frozen=True)
class ModuleShape:
    """One linear (or embedding) of the checkpoint: weight [N, K], by its published name."""

    name: str
    N: int
    K: int
    part: str  # embedding, attention, mlp (or router and experts), head
    bias: bool

    @property
    def in_layer(self) -> bool:
        return self.part not in ENDS


@dataclass(frozen=True)
class Mixture:
    """Many MLPs in place of one, of which a router gives each token a few."""

    experts: int
    active: int  # experts that a token goes through
    normalized: bool  # whether the shares of these are made to add up to 1
    name: str  # within a layer
    expert: tuple[str, str, str]  # names of gate, up and down within an expert

    def modules(self, hidden: int, inner: int) -> Iterator[ModuleShape]:
        """The router, then expert by expert."""
        gate, up, down = self.expert
        yield ModuleShape(f"{self.name}.gate", self.experts, hidden, "router", False)
        for number in range(self.experts):
            prefix = f"{self.name}.experts.{number}"
            yield ModuleShape(f"{prefix}.{gate}", inner, hidden, "experts", False)
            yield ModuleShape(f"{prefix}.{up}", inner, hidden, "experts", False)
            yield ModuleShape(f"{prefix}.{down}", hidden, inner, "experts", False)


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
    fused_qkv: bool = False  # the checkpoint stores qkv_proj and gate_up_proj
    mixture: Mixture | None = None
    windows: tuple[int | None, ...] = ()  # sliding window by layer; None sees everything
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelSpec:
        """Read config.json. Raises InputError naming the architecture, key or value that is not supported."""
        name = _architecture(config)
        kind, fields = ARCHITECTURES[name], Fields(config)
        neutral = NEUTRAL | (DENSE if not kind.mixture else ALL_SPARSE)
        for key, allowed in neutral.items():
            if config.get(key) not in allowed:
                raise InputError(f"config.json: {key} = {config[key]!r} is not supported for {name}")
        activation = config.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise InputError(f"config.json: hidden_act {activation!r} is not supported; supported is silu")
        hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        kv_heads = fields.integer("num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise InputError(f"config.json: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
        derived = config.get("head_dim") is None and kind.default_head_dim is None
        head_dim = _divide(hidden, heads) if derived else fields.integer("head_dim", default=kind.default_head_dim)
        layers = fields.integer("num_hidden_layers")
        max_position = fields.integer("max_position_embeddings", default=kind.max_position)
        rope = read_rope(
            Fields({"max_position_embeddings": max_position, "rope_theta": kind.theta, **config}), head_dim, max_position
        )
        return cls(
            architecture=name,
            layers=layers,
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate=fields.integer(kind.expert_size if kind.mixture else "intermediate_size"),
            vocab=fields.integer("vocab_size"),
            rope=rope,
            eps=fields.number("rms_norm_eps", default=kind.eps),
            tie_embeddings=fields.flag("tie_word_embeddings", default=False),
            max_len=rope.max_len,
            dtype=_dtype(config),
            qkv_bias=_flag(kind.qkv_bias, fields),
            o_bias=_flag(kind.o_bias, fields),
            mlp_bias=_flag(kind.mlp_bias, fields),
            qk_norm=kind.qk_norm,
            fused_qkv=kind.fused_qkv,
            mixture=_mixture(kind, fields) if kind.mixture else None,
            windows=_windows(kind, fields, layers),
            eos_token_ids=_token_ids(config, "eos_token_id"),
            bos_token_id=next(iter(_token_ids(config, "bos_token_id")), None),
        )

    @property
    def q_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    def modules(self) -> list[ModuleShape]:
        """Embedding, every linear of every layer, and the head (absent where it is tied to the embedding)."""
        found = [ModuleShape("model.embed_tokens", self.vocab, self.hidden, "embedding", False)]
        for layer in range(self.layers):
            found += [ModuleShape(f"model.layers.{layer}.{m.name}", m.N, m.K, m.part, m.bias) for m in self.layer_modules()]
        if not self.tie_embeddings:
            found.append(ModuleShape("lm_head", self.vocab, self.hidden, "head", False))
        return found

    def layer_modules(self) -> Iterator[ModuleShape]:
        """The linears of one layer, by their name within it."""
        q, kv, hidden, inner = self.q_size, self.kv_size, self.hidden, self.intermediate
        if self.fused_qkv:
            yield ModuleShape("self_attn.qkv_proj", q + 2 * kv, hidden, "attention", self.qkv_bias)
        else:
            for name, size in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
                yield ModuleShape(f"self_attn.{name}", size, hidden, "attention", self.qkv_bias)
        yield ModuleShape("self_attn.o_proj", hidden, q, "attention", self.o_bias)
        if self.mixture is not None:
            yield from self.mixture.modules(hidden, inner)
            return
        if self.fused_qkv:
            yield ModuleShape("mlp.gate_up_proj", 2 * inner, hidden, "mlp", self.mlp_bias)
        else:
            for name in ("gate_proj", "up_proj"):
                yield ModuleShape(f"mlp.{name}", inner, hidden, "mlp", self.mlp_bias)
        yield ModuleShape("mlp.down_proj", hidden, inner, "mlp", self.mlp_bias)

    def small_tensors(self) -> list[tuple[str, int]]:
        """Norm weights: (name, number of values)."""
        found = [("model.norm.weight", self.hidden)]
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            found += [(f"{prefix}.{n}.weight", self.hidden) for n in ("input_layernorm", "post_attention_layernorm")]
            if self.qk_norm:
                found += [(f"{prefix}.self_attn.{n}.weight", self.head_dim) for n in ("q_norm", "k_norm")]
        return found

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


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or not names:
        raise InputError(f"config.json: architectures is {names!r}, expected one of {', '.join(ARCHITECTURES)}")
    if not isinstance(names[0], str) or names[0] not in ARCHITECTURES:
        raise InputError(f"config.json: architecture {names[0]} is not supported; supported are {', '.join(ARCHITECTURES)}")
    return names[0]


def _divide(hidden: int, heads: int) -> int:
    if hidden % heads:
        raise InputError(
            f"config.json: hidden_size {hidden} is no multiple of num_attention_heads {heads}, and head_dim is missing"
        )
    return hidden // heads


def _flag(source: bool | str, fields: Fields) -> bool:
    return source if isinstance(source, bool) else fields.flag(source, default=False)


def _mixture(kind: Architecture, fields: Fields) -> Mixture:
    experts = fields.integer(next((key for key in EXPERTS if fields.get(key) is not None), EXPERTS[0]))
    active = fields.integer("num_experts_per_tok")
    if active > experts:
        raise InputError(f"config.json: num_experts_per_tok is {active}, but there are {experts} experts")
    return Mixture(experts, active, _flag(kind.normalized, fields), kind.mixture, kind.expert)


def _dtype(config: Mapping[str, Any]) -> str:
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"  # transformers' default
    if dtype not in DTYPES:
        raise InputError(f"config.json: torch_dtype {dtype!r} is not supported; supported are {', '.join(DTYPES)}")
    return dtype


def _windows(kind: Architecture, fields: Fields, layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer; layer_types, where given, decides."""
    types = fields.get("layer_types")
    given = fields.get("sliding_window") if "sliding_window" in fields.values else kind.default_window
    window = None if given is None else fields.integer("sliding_window", default=given)
    if kind.window == "none":
        window = None
    if kind.window in ("switched", "upper") and not fields.flag("use_sliding_window", default=False):
        window = None
    if types is not None:
        if not isinstance(types, list) or len(types) != layers or not set(types) <= {"full_attention", "sliding_attention"}:
            raise InputError(
                f"config.json: layer_types must name full_attention or sliding_attention for each of {layers} layers"
            )
        return tuple(window if t == "sliding_attention" else None for t in types)
    first = fields.integer("max_window_layers", default=28, minimum=0) if kind.window == "upper" else 0
    return tuple(window if layer >= first else None for layer in range(layers))


def _token_ids(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = config.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise InputError(f"config.json: {key} is {value!r:.60}, expected a token id or a list of them")
    return tuple(ids)
