"""In what a family of models may differ from plain Llama. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """How a family differs from plain Llama, and transformers' defaults for keys that configs leave out."""

    qkv_bias: bool | str = "attention_bias"  # a fact, or the config key that says
    o_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = False
    qk_norm: bool | str = False
    whole_qk_norm: bool = False  # it is over all heads at once, not over each
    late_qk_norm: bool = False  # it comes after rotation
    qk_names: tuple[str, str] = ("q_norm", "k_norm")  # of these norms within attention
    fused_qkv: bool = False  # and gate and up
    fused_gate_up: bool = False
    hybrid: bool = False  # layers may be another thing than attention, and MLPs have names of their own (quant/headers.py)
    window: str = "none"
    """Layers with sliding_window: none; "all"; "switched": all, if switched on; "upper": from max_window_layers on, if so;
    "lower": every other one before that, beginning with the first, if so; "unrotated": those that do not rotate, if so;
    "alternate": every other one, beginning with the first; "pattern": all but each sliding_window_pattern-th; "types": those
    that layer_types says, else the same, and none where sliding_window is null."""
    default_window: int | None = None
    default_head_dim: int | None = None
    eps: float = 1e-6
    theta: float = 1e4
    max_position: int = 2048
    mixture: str = ""  # the name of a mixture of experts within a layer; empty: one MLP
    router: str = "gate"  # within that
    expert: tuple[str, ...] = (
        "gate_proj",
        "up_proj",
        "down_proj",
    )  # the linears of each; of two the first has gate and up in turns
    expert_bias: bool = False  # whether router and experts have one
    clamped: bool = False  # gate and up, and up + 1 is multiplied (swiglu_limit, swiglu_alpha)
    sinks: bool = False  # heads have one more logit each, of which there is no value
    expert_size: str = "moe_intermediate_size"
    expert_count: str = "num_experts"
    expert_choice: str = "num_experts_per_tok"
    sparse: str = ""
    """Layers that have a mixture: all; "switched": all, if enable_moe_block says so; "step": each decoder_sparse_step-th, but for
    mlp_only_layers; "from": from dense_count on; "types": where mlp_layer_types says so, else the same; "range": each
    moe_layer_interval-th from moe_layer_start_index to moe_layer_end_index."""
    dense_count: str = "first_k_dense_replace"  # the key of "from"
    sigmoid: bool = False  # scores are sigmoids of the router's products, with n_group, topk_group and routed_scaling_factor
    share_least: float | None = None  # what the sum of scores is at least where shares are made of it; None: as read_mixture says
    by_largest: bool = False  # groups of experts are chosen by their largest score (topk_method), not by the sum of two
    correction: str = ""  # the name within the mixture of what is added to scores for the choice (moe_norm_min)
    shared: str = ""  # the name of an MLP within the mixture that every token goes through
    shared_count: str = ""  # as how many experts that is large; empty: shared_expert_intermediate_size says how large
    shared_gate: str = ""  # the linear beside it whose sigmoid is the share of what it gives; empty: 1
    beside: tuple[str, ...] = ()  # layers have their MLP, too: norms of what experts read, of what they give, and the MLP
    router_norm: str = ""  # the name within a layer of one of what the router reads, which is divided by the root of hidden_size
    gains: str = ""  # the name within a layer of what shares are multiplied by at last
    inner: str = "intermediate_size"  # of an MLP
    normalized: bool | str = "norm_topk_prob"
    unit_norms: bool = False  # norms multiply by 1 + their weight
    norms: tuple[str, str, str] = ("", "post_attention_layernorm", "")  # see ModelSpec.norms
    ungated: str = ""  # the activation of MLPs without a gate: "relu2", or "xielu" with tensors of its own
    input_norm: str = "input_layernorm"  # the name of that before attention
    gelu: bool = False  # gelu(gate) * up, in the approximation by tanh, instead of silu(gate) * up
    scaled_embedding: bool = False  # by the root of the hidden size
    soft_caps: tuple[str, ...] = ()  # the keys of those that it has
    partial_rotation: bool = False  # partial_rotary_factor says how much of a head rotates
    interleaved: bool = False  # neighbours in a head are rotated against each other, not its halves
    yarn: str = "yarn"  # the rope type that it calls so
    alpha: bool = False  # rope settings may have one, by which the base is stretched
    listed: tuple[str, ...] = ()  # keys that may have a list of one value for each layer
    local_theta: float | None = None  # layers with a window rotate otherwise than the others; where the config says no base
    global_heads: bool = False  # layers without one have heads of their own: global_head_dim, attention_k_eq_v
    per_layer_inputs: bool = False  # and hidden_size_per_layer_input, num_kv_shared_layers say more of them (models/per_layer.py)
    v_norm: bool = False  # values are normalized, too, without a weight
    layer_scalar: bool = False  # what a layer gives is multiplied by a number of its own
    scale: float | None = None  # of attention's scores, whatever the size of heads
    float16: bool = True  # whether its activations stay within what float16 holds; Granite's are kept larger, see models/spec.py
    unrotated: str = ""
    """Layers that rotate nothing: none; "listed": every no_rope_layer_interval-th, or those with a 0 in no_rope_layers; "full":
    those that see everything, if there is a sliding_window."""
    scaled_queries: bool = False  # by their position, see RopeSpec.query_beta
    multiplied: bool = False  # by what MULTIPLIERS say
    ahead: tuple[str, ...] = ()  # how tensors begin that guess tokens ahead
    ahead_count: str = ""  # or how many layers behind the others do so
    refused: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # more keys as in NEUTRAL
    delta: str = ""  # some layers are a DeltaNet: whose inputs are "split" or "fused"; and attention has an output gate
    passed_over: tuple[str, ...] = ()  # keys of NEUTRAL that mean nothing in it
    conv: bool = False  # some layers are a ShortConv; and some keys have names of their own (models/liquid.py)
    inner_scaled: bool = False  # and the size of MLPs is not what is said
    latent: bool = False  # attention is over latents (models/latent.py)
    text_part: bool = False  # of a model that reads more than text: its settings stand in text_config
    tied_by_text: bool = True  # the head is tied where either says so; else where the whole does, whatever its text part says
    texts: tuple[str, ...] = ()  # which of TEXTS that part may be; the first where it does not say
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of keys for which there is no field above
    rope: Mapping[str, Any] | None = None  # where neither rope_parameters nor rope_scaling say
