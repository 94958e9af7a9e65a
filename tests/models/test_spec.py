"""Reading config.json: what the supported families say, in old and new spelling, and what is refused, with its message."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kernels.scores import Scores
from models.spec import ARCHITECTURES, ModelSpec
from quant.errors import InputError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "eos_token_id": [2, 5],
    "bos_token_id": 1,
}
GONE = object()
QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}  # fmt: skip
GLM4_MOE = {
    "architectures": ["Glm4MoeForCausalLM"], "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
}  # fmt: skip
ERNIE_MOE = {"architectures": ["Ernie4_5_MoeForCausalLM"], "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24}
MIXTRAL = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}


def read(architecture: str = "LlamaForCausalLM", **changes: Any) -> ModelSpec:
    config = {**LLAMA, "architectures": [architecture], **changes}
    return ModelSpec.from_config({k: v for k, v in config.items() if v is not GONE})


def test_the_plain_case() -> None:
    spec = read()
    assert (spec.layers, spec.hidden, spec.heads, spec.kv_heads, spec.head_dim, spec.intermediate) == (3, 64, 8, 2, 8, 160)
    assert (spec.vocab, spec.max_len, spec.eps, spec.dtype) == (100, 512, 1e-5, "bfloat16")
    assert (spec.rope.kind, spec.rope.theta, spec.rope.rotary_dim) == ("default", 500000.0, 8)
    assert (spec.eos_token_ids, spec.bos_token_id) == ((2, 5), 1)
    assert not (spec.tie_embeddings or spec.qkv_bias or spec.o_bias or spec.mlp_bias or spec.qk_norm or spec.fused_qkv)
    assert spec.windows == (None, None, None)


def test_defaults_are_those_of_transformers() -> None:
    spec = read(num_key_value_heads=GONE, rope_theta=GONE, torch_dtype=GONE, eos_token_id=3, bos_token_id=None, rms_norm_eps=GONE)
    assert (spec.kv_heads, spec.rope.theta, spec.dtype, spec.eos_token_ids, spec.bos_token_id) == (8, 1e4, "float32", (3,), None)
    assert (spec.eps, read("Phi3ForCausalLM", rms_norm_eps=GONE).eps) == (1e-6, 1e-5)
    assert read("Qwen3ForCausalLM").head_dim == 128
    assert read(head_dim=16).head_dim == read(head_dim=16, hidden_size=60).head_dim == 16, "what is stated need not divide"
    assert read("MistralForCausalLM").windows == (4096,) * 3
    assert read("MistralForCausalLM", sliding_window=None).windows == (None,) * 3


@pytest.mark.parametrize(
    "architecture,biases", [
        ("LlamaForCausalLM", (True, True, False)), ("MistralForCausalLM", (False, False, False)),
        ("Qwen2ForCausalLM", (True, False, False)), ("Qwen3ForCausalLM", (True, True, False)),
        ("Phi3ForCausalLM", (False, False, False)),
    ],
)  # fmt: skip
def test_biases(architecture: str, biases: tuple[bool, ...]) -> None:
    spec = read(architecture, attention_bias=True)
    assert (spec.qkv_bias, spec.o_bias, spec.mlp_bias) == biases
    by_name = {m.name: m.bias for m in spec.layer_modules()}
    first = "self_attn.qkv_proj" if spec.fused_qkv else "self_attn.k_proj"
    assert (by_name[first], by_name["self_attn.o_proj"], by_name["mlp.down_proj"]) == biases


def test_sliding_windows() -> None:
    qwen = {"sliding_window": 32, "max_window_layers": 1}
    assert read("Qwen2ForCausalLM", **qwen).windows == (None, None, None)
    assert read("Qwen2ForCausalLM", **qwen, use_sliding_window=True).windows == (None, 32, 32)
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    assert read("Qwen3ForCausalLM", **qwen, use_sliding_window=True, layer_types=types).windows == (32, None, 32)
    assert read("Phi3ForCausalLM", sliding_window=32).windows == (32,) * 3
    assert read("MistralForCausalLM", sliding_window=32, layer_types=["sliding_attention"] * 3).windows == (32,) * 3
    assert read("MistralForCausalLM", sliding_window=None, layer_types=types).windows == (None,) * 3
    with pytest.raises(InputError, match="layer_types has full_attention, but all layers here have the sliding_window of 32"):
        read("MistralForCausalLM", sliding_window=32, layer_types=types)
    assert read(sliding_window=32, layer_types=types).windows == (None, None, None)
    assert read(sliding_window=32).windows == (None, None, None)  # Llama has none, whatever the config says
    assert read("Gemma2ForCausalLM", sliding_window=32, sliding_window_pattern=3).windows == (32, None, 32)
    assert read("Gemma3ForCausalLM", num_hidden_layers=7).windows == (4096,) * 5 + (None, 4096)
    assert read("Gemma3ForCausalLM", sliding_window=32, sliding_window_pattern=3).windows == (32, 32, None)
    assert read("Gemma3ForCausalLM", sliding_window=32, sliding_window_pattern=3, layer_types=types).windows == (32, None, 32)


def test_only_gemma_scales_queries_by_a_number_of_its_own() -> None:
    assert (
        read(query_pre_attn_scalar=3).scale
        == read().scale
        == read("Gemma2ForCausalLM", query_pre_attn_scalar=8, head_dim=4).scale
    )


@pytest.mark.parametrize("spelling", ["type", "rope_type"])
def test_old_and_new_rope_spelling_agree(spelling: str) -> None:
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = read(rope_scaling={spelling: "llama3", **llama3}).rope
    new = read(rope_theta=GONE, rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **llama3}).rope
    assert old == new
    assert (old.kind, old.factor, old.high_freq_factor, old.original_max_position) == ("llama3", 8.0, 4.0, 64)


def test_of_old_and_new_settings_the_old_count() -> None:
    """As in transformers, which also takes the base from beside them."""
    new = {"rope_type": "default", "rope_theta": 1e6}
    both = read(rope_theta=3e5, rope_parameters=new, rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert (both.rope.kind, both.rope.theta, both.rope.factor, both.max_len) == ("linear", 3e5, 2.0, 1024)
    own = {"rope_type": "linear", "factor": 2.0, "rope_theta": 2e5}
    assert read(rope_theta=GONE, rope_parameters=new, rope_scaling=own).rope.theta == 2e5
    assert read(rope_theta=GONE, rope_parameters=new, rope_scaling=None).rope.theta == 1e6


def test_what_gemma_has() -> None:
    two, three = read("Gemma2ForCausalLM"), read("Gemma3ForCausalLM", query_pre_attn_scalar=64, final_logit_softcapping=20)
    assert (two.cap, two.logit_cap, two.scale, two.embedding_scale) == (50.0, 30.0, 256**-0.5, 8.0)
    assert (three.cap, three.logit_cap, three.scale, three.qk_norm) == (None, 20.0, 64**-0.5, True)
    assert (two.head_dim, two.max_len, two.eos_token_ids) == (256, 512, (2, 5)) and two.local_rope is None
    for spec in (two, three):
        assert (spec.norm_offset, spec.post_norms, spec.gelu, spec.tie_embeddings) == (1.0, True, True, True)
    llama = read(head_dim=16)
    assert (llama.cap, llama.logit_cap, llama.scale, llama.embedding_scale, llama.norm_offset) == (None, None, 0.25, 1.0, 0.0)
    assert read("Gemma2ForCausalLM", attn_logit_softcapping=None).cap is None


def test_old_and_new_spelling_of_two_ropes_agree() -> None:
    """The length that is stated is that which scaling leads to."""
    scaled = {"rope_type": "linear", "factor": 8.0}
    old = read("Gemma3ForCausalLM", rope_theta=1e6, rope_local_base_freq=2e4, rope_scaling=scaled)
    nested = {"full_attention": {**scaled, "rope_theta": 1e6}, "sliding_attention": {"rope_theta": 2e4, "rope_type": "default"}}
    new = read("Gemma3ForCausalLM", rope_theta=GONE, rope_parameters=nested)
    assert old.ropes == new.ropes and old.max_len == 512
    assert (old.rope.kind, old.rope.theta, old.rope.factor) == ("linear", 1e6, 8.0)
    assert old.local_rope is not None and (old.local_rope.kind, old.local_rope.theta) == ("default", 2e4)
    assert read("Gemma3ForCausalLM", num_hidden_layers=6).rope_of(4).theta == 1e4
    assert read("Gemma3ForCausalLM", num_hidden_layers=6, rope_theta=GONE).rope_of(5).theta == 1e6


def test_the_text_part_of_a_model_that_reads_pictures() -> None:
    """As google/gemma-3-4b-it publishes it, whose text_config leaves out what is as transformers has it."""
    text = {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }  # fmt: skip
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106], "model_type": "gemma3",
        "text_config": text, "torch_dtype": "bfloat16", "vision_config": {"hidden_size": 1152}, "mm_tokens_per_image": 256,
    }  # fmt: skip
    spec = ModelSpec.from_config(config)
    assert (spec.heads, spec.kv_heads, spec.head_dim, spec.vocab, spec.max_len) == (8, 4, 256, 262208, 131072)
    assert (spec.dtype, spec.eos_token_ids, spec.windows[:6]) == ("bfloat16", (1, 106), (1024,) * 5 + (None,))
    assert abs(spec.num_parameters / 1e9 - 3.88) < 0.01  # and 0.42 in the vision tower: 4.30
    assert ModelSpec.from_config({**config, "hidden_size": 77, "sliding_window": 3}) == ModelSpec.from_config(config)
    with pytest.raises(InputError, match="text_config is None, expected an object"):
        ModelSpec.from_config({**config, "text_config": None})


def test_lengths_that_scaling_gives() -> None:
    assert read(rope_scaling={"type": "linear", "factor": 4}).max_len == 2048
    assert read(rope_scaling={"type": "dynamic", "factor": 2.0}).max_len == 1024
    yarn = {"type": "yarn", "factor": 4.0}
    assert read(rope_scaling={**yarn, "original_max_position_embeddings": 512}).max_len == 2048
    assert read(rope_scaling={**yarn, "original_max_position_embeddings": 128}).max_len == 512
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    phi = read("Phi3ForCausalLM", rope_scaling={"type": "su", **factors}, original_max_position_embeddings=128)
    assert (phi.rope.kind, phi.rope.factor, phi.rope.original_max_position, phi.max_len) == ("longrope", 4.0, 128, 512)


def test_modules_are_named_and_shaped_as_published() -> None:
    spec = read(head_dim=16, attention_bias=True)
    shapes = {m.name: (m.N, m.K) for m in spec.modules()}
    assert shapes["model.embed_tokens"] == shapes["lm_head"] == (100, 64)
    assert shapes["model.layers.2.self_attn.q_proj"] == (128, 64)
    assert shapes["model.layers.2.self_attn.v_proj"] == (32, 64)
    assert shapes["model.layers.0.self_attn.o_proj"] == (64, 128)
    assert shapes["model.layers.0.mlp.down_proj"] == (64, 160)
    assert len(shapes) == 3 * 7 + 2
    assert "lm_head" not in {m.name for m in read(tie_word_embeddings=True).modules()}
    phi = {m.name: (m.N, m.K) for m in read("Phi3ForCausalLM").layer_modules()}
    assert phi == {
        "self_attn.qkv_proj": (64 + 2 * 16, 64), "self_attn.o_proj": (64, 64),
        "mlp.gate_up_proj": (320, 64), "mlp.down_proj": (64, 160),
    }  # fmt: skip


def test_mixtures_of_experts() -> None:
    qwen, mixtral = read(**QWEN3_MOE, attention_bias=True, sliding_window=32), read(**MIXTRAL, rope_theta=GONE)
    assert qwen.mixture is not None and mixtral.mixture is not None
    assert (qwen.intermediate, qwen.qk_norm, qwen.o_bias, qwen.head_dim, qwen.windows) == (24, True, True, 8, (None,) * 3)
    assert (qwen.mixture.experts, qwen.mixture.active, qwen.mixture.normalized) == (8, 2, True)
    assert not read(**{**QWEN3_MOE, "norm_topk_prob": GONE}).mixture.normalized  # type: ignore[union-attr]
    assert read(**QWEN3_MOE, sliding_window=32, use_sliding_window=True).windows == (32,) * 3
    assert (mixtral.intermediate, mixtral.rope.theta, mixtral.qkv_bias, mixtral.windows) == (160, 1e6, False, (None,) * 3)
    assert (mixtral.mixture.experts, mixtral.mixture.active, mixtral.mixture.normalized) == (4, 2, True)
    renamed = {**QWEN3_MOE, "num_experts": GONE, "num_local_experts": 8}  # as newer transformers write it
    assert read(**renamed).mixture == read(**QWEN3_MOE).mixture

    shapes = {m.name: (m.N, m.K, m.part) for m in qwen.modules()}
    assert shapes["model.layers.1.mlp.gate"] == (8, 64, "router")
    assert (
        shapes["model.layers.2.mlp.experts.7.gate_proj"] == shapes["model.layers.2.mlp.experts.7.up_proj"] == (24, 64, "experts")
    )
    assert shapes["model.layers.0.mlp.experts.0.down_proj"] == (64, 24, "experts")
    assert len(shapes) == 3 * (4 + 1 + 8 * 3) + 2
    shapes = {m.name: (m.N, m.K, m.part) for m in mixtral.layer_modules()}
    assert shapes["block_sparse_moe.gate"] == (4, 64, "router")
    assert shapes["block_sparse_moe.experts.3.w1"] == shapes["block_sparse_moe.experts.3.w3"] == (160, 64, "experts")
    assert shapes["block_sparse_moe.experts.3.w2"] == (64, 160, "experts")
    attention, expert = 3 * 64 * (2 * 64 + 2 * 16), 3 * 3 * 24 * 64
    assert qwen.linear_parameters == (attention + 3 * 8 * 64 + 8 * expert, attention + 3 * 8 * 64 + 2 * expert)


def test_an_mlp_beside_the_experts() -> None:
    spec = read(
        "Qwen2MoeForCausalLM", sliding_window=32, moe_intermediate_size=24, shared_expert_intermediate_size=56, num_experts=5
    )
    shapes = {m.name: (m.N, m.K, m.part) for m in spec.layer_modules()}
    assert shapes["mlp.shared_expert_gate"] == (1, 64, "router")
    assert shapes["mlp.shared_expert.gate_proj"] == shapes["mlp.shared_expert.up_proj"] == (56, 64, "mlp")
    assert shapes["mlp.shared_expert.down_proj"] == (64, 56, "mlp") and len(shapes) == 4 + 2 + 3 + 5 * 3
    assert spec.qkv_bias and not spec.o_bias and spec.windows == (None,) * 3 and spec.mixture is not None
    assert (spec.mixture.active, spec.mixture.normalized, spec.mixture.shared) == (4, False, 56)
    on = {"use_sliding_window": True, "max_window_layers": 1}
    assert read("Qwen2MoeForCausalLM", num_experts=5, **on).windows == (4096, None, None)
    assert read("Qwen2MoeForCausalLM", num_experts=5, **{**on, "max_window_layers": 3, "sliding_window": 7}).windows == (
        7,
        None,
        7,
    )


def test_layers_with_and_without_experts() -> None:
    glm, ernie = read(**GLM4_MOE, use_qk_norm=True), read(**ERNIE_MOE)
    assert glm.mixture is not None and ernie.mixture is not None
    assert (glm.qk_norm, glm.rope.rotary_dim, glm.interleaved) == (True, 4, False)
    assert (ernie.qk_norm, ernie.tie_embeddings, ernie.interleaved) == (False, True, True)
    assert glm.mixture.scores == Scores(sigmoid=True, least=1e-20) and ernie.mixture.scores == Scores(least=1e-12)
    assert glm.mixture.normalized and ernie.mixture.normalized and not read(**GLM4_MOE, norm_topk_prob=False).mixture.normalized  # type: ignore[union-attr]
    assert (glm.mixture.shared, ernie.mixture.shared, glm.mlp_size, glm.widest_mlp) == (24, 48, 160, 160)
    assert glm.ahead == ("model.layers.3.",) and ernie.ahead == ("model.mtp_",)
    assert read(**GLM4_MOE, num_nextn_predict_layers=0).ahead == ()
    for spec, correction in ((glm, "gate"), (ernie, "moe_statics")):
        shapes = {m.name: (m.N, m.K, m.part) for m in spec.modules()}
        assert shapes["model.layers.0.mlp.gate_proj"] == (160, 64, "mlp") and "model.layers.0.mlp.gate" not in shapes
        assert (
            shapes["model.layers.2.mlp.experts.3.down_proj"] == (64, 24, "experts") and "model.layers.2.mlp.up_proj" not in shapes
        )
        assert shapes["model.layers.1.mlp.shared_experts.up_proj"] == (spec.mixture.shared, 64, "mlp")  # type: ignore[union-attr]
        names = [name for name, _ in spec.small_tensors() if "correction" in name]
        assert names == [f"model.layers.{layer}.mlp.{correction}.e_score_correction_bias" for layer in (1, 2)]
        wide = spec.small_nbytes(4) - spec.small_nbytes(2)
        assert wide == 2 * sum(numel for name, numel in spec.small_tensors() if "correction" not in name)


def test_which_layers_have_experts() -> None:
    def without(**config: Any) -> tuple[int, ...]:
        found = read(**{**config, "num_hidden_layers": 7})
        return tuple(range(7)) if found.mixture is None else found.mixture.dense_layers

    assert without(**QWEN3_MOE) == () and without(**GLM4_MOE) == without(**ERNIE_MOE) == (0,)
    assert without(**QWEN3_MOE, decoder_sparse_step=3, mlp_only_layers=[5]) == (0, 1, 3, 4, 5, 6)
    assert without(**GLM4_MOE, first_k_dense_replace=0) == () and without(**GLM4_MOE, first_k_dense_replace=9) == tuple(range(7))
    assert read(**GLM4_MOE, first_k_dense_replace=9).intermediate == 160
    assert without(**ERNIE_MOE, moe_layer_start_index=2, moe_layer_end_index=4) == (0, 1, 5, 6)
    assert without(**ERNIE_MOE, moe_layer_interval=2) == (0, 2, 4, 6)
    spec = read(**GLM4_MOE, sliding_window=3)
    assert spec.unlike == [1, 0] and spec.part(range(1)).mixture is None and spec.part(range(1)).intermediate == 160
    last, both = spec.part(range(2, 3)), spec.part(range(2))
    assert last.mixture_of(0) is not None and last.layers == len(last.windows) == 1
    assert both.layers == 2 and both.mixture_of(0) is None and both.mixture_of(1) is not None


@pytest.mark.parametrize("architecture", [name for name, kind in ARCHITECTURES.items() if not kind.mixture])
def test_parameters_are_counted_once_each(architecture: str) -> None:
    more: dict[str, Any] = {"attention_bias": True, "head_dim": 8, "tie_word_embeddings": False}
    if ARCHITECTURES[architecture].hybrid:
        more |= {"layer_types": ["attention"] * 3, "num_local_experts": 0, "shared_intermediate_size": 160}
    if ARCHITECTURES[architecture].delta:
        more |= {"layer_types": ["full_attention"] * 3}
    if ARCHITECTURES[architecture].conv:
        more["block_auto_adjust_ff_dim"] = False
    if ungated := ARCHITECTURES[architecture].ungated:
        more["hidden_act"] = ungated
    part = {key: value for key, value in (LLAMA | more).items() if key not in ("architectures", "hidden_act")}
    spec = read(architecture, **more, text_config=part)
    q, kv = 64, 16
    rows = (2 if spec.output_gate else 1) * q + 2 * kv
    linears = 64 * rows + q * 64 + (2 if spec.ungated else 3) * 160 * 64
    biases = rows * spec.qkv_bias + 64 * spec.o_bias
    norms = 2 * (spec.pre_norm + spec.post_norms) * 64 + (q + kv if spec.whole_qk_norm else 2 * 8 * spec.qk_norm)
    norms += 2 * (spec.ungated == "xielu")
    assert spec.num_parameters == 2 * 100 * 64 + 3 * (linears + biases + norms) + 64


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["JambaForCausalLM"]}, "architecture JambaForCausalLM is not supported; supported are Llama"),
    ({"num_experts": 4}, "num_experts = 4 is not supported for LlamaForCausalLM"),
    ({**QWEN3_MOE, "num_experts": GONE}, "num_experts is missing, expected an integer of at least 1"),
    ({**QWEN3_MOE, "num_experts_per_tok": 9}, "num_experts_per_tok is 9, but there are 8 experts"),
    ({**QWEN3_MOE, "decoder_sparse_step": 0}, "decoder_sparse_step is 0, expected an integer of at least 1"),
    ({**QWEN3_MOE, "mlp_only_layers": 0.5}, "mlp_only_layers is 0.5, expected a list of numbers of layers"),
    ({**MIXTRAL, "decoder_sparse_step": 2}, "decoder_sparse_step = 2 is not supported for MixtralForCausalLM"),
    ({**MIXTRAL, "mlp_only_layers": [0]}, "mlp_only_layers = [0] is not supported for MixtralForCausalLM"),
    ({**GLM4_MOE, "n_routed_experts": GONE}, "n_routed_experts is missing, expected an integer of at least 1"),
    ({**GLM4_MOE, "n_group": 3}, "n_group is 3, expected at most 64 groups of equally many of the 8 experts, two or more"),
    ({**GLM4_MOE, "n_group": 8}, "n_group is 8, expected at most 64 groups of equally many of the 8 experts, two or more"),
    ({**GLM4_MOE, "n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}, "topk_group is 1 of 4 groups of 2 experts"),
    ({**GLM4_MOE, "topk_group": 2}, "topk_group is 2 of 1 groups of 8 experts, expected as many as have the 2"),
    ({**GLM4_MOE, "routed_scaling_factor": 0}, "routed_scaling_factor is 0, expected a positive number"),
    ({**GLM4_MOE, "first_k_dense_replace": -1}, "first_k_dense_replace is -1, expected an integer of at least 0"),
    ({**ERNIE_MOE, "use_bias": True}, "use_bias = True is not supported for Ernie4_5_MoeForCausalLM"),
    ({**ERNIE_MOE, "moe_k": 5}, "moe_k is 5, but there are 4 experts"),
    ({**QWEN3_MOE, "norm_topk_prob": 1}, "norm_topk_prob is 1, expected true or false"),
    ({**QWEN3_MOE, "moe_intermediate_size": GONE}, "moe_intermediate_size is missing, expected an integer of at least 1"),
    ({"architectures": GONE}, "architectures is None, expected one of LlamaForCausalLM, "),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported is silu"),
    ({"pretraining_tp": 2}, "pretraining_tp = 2 is not supported for LlamaForCausalLM"),
    ({"hidden_size": GONE}, "hidden_size is missing, expected an integer of at least 1"),
    ({"hidden_size": "64"}, "hidden_size is '64', expected an integer of at least 1"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected an integer of at least 1"),
    ({"num_hidden_layers": 2**40}, "num_hidden_layers is 1099511627776, expected at most 65536"),
    ({**QWEN3_MOE, "num_experts": 2**40}, "num_experts is 1099511627776, expected at most 65536"),
    ({**GLM4_MOE, "num_nextn_predict_layers": 2**40}, "num_nextn_predict_layers is 1099511627776, expected at most 65536"),
    ({"vocab_size": True}, "vocab_size is True, expected an integer of at least 1"),
    ({"intermediate_size": -4}, "intermediate_size is -4"),
    ({"hidden_size": 60}, "hidden_size 60 is no multiple of num_attention_heads 8, and head_dim is missing"),
    ({"num_key_value_heads": 3}, "num_attention_heads 8 is no multiple of num_key_value_heads 3"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0, expected a positive number"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', expected true or false"),
    ({"torch_dtype": "float8"}, "torch_dtype 'float8' is not supported; supported are float16, bfloat16, float32"),
    ({"eos_token_id": "</s>"}, "eos_token_id is '</s>', expected a token id or a list of them"),
    ({"rope_scaling": {"type": "xpos", "factor": 2}}, "rope type 'xpos' is not supported; supported are default, linear, "),
    ({"rope_scaling": {"type": "linear"}}, "rope type linear needs 'factor' and it is missing"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope settings of config.json: factor is '2', expected a positive"),
    ({"rope_scaling": {"type": "yarn", "factor": 2, "power": 3}}, "hold 'power', which the yarn kind does not know"),
    ({"rope_scaling": {"type": "linear", "factor": 2}, "rope_theta": GONE, "rope_parameters": {"rope_theta": 1e6}},
     "both rope_parameters and rope_scaling, and a rope_theta in the first only"),
    ({"architectures": [[]]}, "architecture [] is not supported"),
    ({"hidden_size": 10**400}, "hidden_size is 1000"),
    ({"rope_theta": float("inf")}, "rope_theta is inf, expected a number above 1"),
    ({"rope_scaling": [2]}, "rope_scaling is [2], expected an object or null"),
    ({"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0] * 4}}, "short_factor has 1 values, expected 4"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "settings by layer type is not supported"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not supported for LlamaForCausalLM"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not supported for LlamaForCausalLM"),
    ({"layer_types": ["full_attention"]}, "layer_types must name full_attention or sliding_attention for each of 3 layers"),
]  # fmt: skip


@pytest.mark.parametrize("changes,message", REFUSED)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        read(**changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "changes,message", [
        ({"hidden_activation": "gelu"}, "hidden_activation 'gelu' is not supported; supported is gelu_pytorch_tanh"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not supported for Gemma3ForCausalLM"),
        ({"final_logit_softcapping": 0}, "final_logit_softcapping is 0, expected a positive number"),
        ({"sliding_window": None}, "sliding_window is missing, expected an integer"),
        ({"query_pre_attn_scalar": -1}, "query_pre_attn_scalar is -1, expected a positive number"),
        ({"rope_parameters": {"rope_type": "default"}}, "expected full_attention and sliding_attention in it"),
        ({"rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}}, "partial_rotary_factor is 0.5, expected 1"),
        ({"rope_parameters": {"full_attention": [2]}}, "rope_parameters is [2], expected an object or null"),
        ({"rope_parameters": {"full_attention": {}}, "rope_scaling": {"factor": 2}}, "has both rope_parameters and rope_scaling"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not supported for Gemma3ForCausalLM"),
    ],
)  # fmt: skip
def test_refused_of_gemma(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        read("Gemma3ForCausalLM", **changes)
    assert message in str(error.value)


def test_published_configs(shared_data: Path) -> None:
    """Those of supported families parse with their published sizes; the others are refused by their architecture's name."""
    seen = set()
    for path in sorted((shared_data / "configs").glob("*.json")):
        config = json.loads(path.read_text())
        name = config["architectures"][0]
        if name in ARCHITECTURES:
            spec = ModelSpec.from_config(config)
            text = config.get("text_config", config)
            assert (spec.hidden, spec.layers, spec.vocab) == (text["hidden_size"], text["num_hidden_layers"], text["vocab_size"])
            seen.add(path.name.split("_")[0])
        else:
            with pytest.raises(InputError, match=f"architecture {name} is not supported"):
                ModelSpec.from_config(config)
    assert seen >= {
        "Qwen--Qwen3-30B-A3B",
        "mistralai--Mixtral-8x7B-v0.1",
        "Qwen--Qwen3-0.6B",
        "Qwen--Qwen3-32B-FP8",
        "Qwen--Qwen3.5-27B",
        "meta-llama--Meta-Llama-3.1-8B",
        "meta-llama--Meta-Llama-3.1-70B",
    }


def test_parameter_counts_of_published_models(shared_data: Path) -> None:
    published = {
        "meta-llama--Meta-Llama-3.1-8B": 8.03, "Qwen--Qwen3-8B": 8.19, "Qwen--Qwen3-0.6B": 0.596,
        "Qwen--Qwen3-30B-A3B": 30.5, "mistralai--Mixtral-8x7B-v0.1": 46.7,
    }  # fmt: skip
    for name, billions in published.items():
        spec = ModelSpec.from_config(json.loads((shared_data / "configs" / f"{name}_config.json").read_text()))
        assert abs(spec.num_parameters / 1e9 - billions) < 0.006 * billions, name


def test_spec_needs_no_torch() -> None:
    root = Path(__file__).resolve().parents[2]
    code = "import models.spec, kernels.layout, sys; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
