"""Gemma 4: what is read of its config.json, in both of the forms that there are, and what is refused of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from appliance.quantize.job import check_kind
from models.heads import KVHeads
from models.order import as_published, turning_first
from models.rope import cos_sin_table
from models.spec import ModelSpec
from quant.errors import InputError
from tests.memory.gemma4 import EXPERTS, SMALL, TOLD


def read(**more: Any) -> ModelSpec:
    return ModelSpec.from_config({**SMALL, **more})


def test_heads_of_two_kinds() -> None:
    spec = read()
    assert spec.by_layer == (KVHeads(2, 64), KVHeads(2, 64), KVHeads(1, 128, True))
    assert spec.kv_shapes == ((2, 64), (2, 64), (1, 128)) and spec.unlike == [2, 0]
    names = [[m.name.removeprefix("self_attn.") for m in spec.layer_modules(layer)] for layer in (1, 2)]
    assert names[0][:4] == ["q_proj", "k_proj", "v_proj", "o_proj"] and names[1][:3] == ["q_proj", "k_proj", "o_proj"]
    assert [(m.N, m.K) for m in spec.layer_modules(2)][:3] == [(512, 256), (128, 256), (256, 512)]
    assert (spec.scale, spec.norm_offset, spec.v_norm, spec.one_by_one, spec.tie_embeddings) == (1.0, 0.0, True, False, True)
    part = spec.part(range(2, 3))
    assert part.by_layer == (KVHeads(1, 128, True),) and part.kv_shapes == ((1, 128),)
    own = read(attention_k_eq_v=False)
    assert own.by_layer[2] == KVHeads(2, 128), "num_global_key_value_heads is of layers whose values are keys"


def test_as_transformers_writes_it() -> None:
    old = {key: value for key, value in SMALL.items() if "global" not in key}
    by_layer = {"02": {"head_dim": 128, "num_key_value_heads": 1}}
    assert ModelSpec.from_config({**old, "per_layer_config": by_layer}) == read()
    alike = ModelSpec.from_config({**old, "per_layer_config": {}})
    assert alike.by_layer[2] == KVHeads(2, 64, True)


def test_a_share_of_each_head_turns_as_if_all_did() -> None:
    spec = read()
    assert [rope.rotary_dim for rope in spec.ropes] == [32, 64]
    assert spec.rope_of(2) == spec.rope and spec.rope_of(0) == spec.local_rope
    sin = cos_sin_table(spec.rope, 9)[:, 16:]
    assert sin.shape == (9, 16) and float(sin[1, 15]) == pytest.approx(math.sin(1e6 ** (-30 / 128)), rel=1e-5)


def test_what_turns_stands_before_the_rest() -> None:
    order = turning_first(2, 12, 4)
    assert order.tolist() == [0, 1, 6, 7, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13, 18, 19, 14, 15, 16, 17, 20, 21, 22, 23]
    assert torch.equal(as_published(order.view(2, 12), 2).flatten(), torch.arange(24))
    assert torch.equal(turning_first(3, 8, 8), torch.arange(24)) and torch.equal(
        as_published(order.view(2, 12), 6), order.view(2, 12)
    )


def test_experts_beside_the_mlp() -> None:
    spec = read(**EXPERTS)
    assert spec.mixture is not None and spec.mixture_of(1) is spec.mixture
    assert (spec.intermediate, spec.mlp_size, spec.mixture.active) == (128, 384, 2)
    names = {m.name for m in spec.layer_modules(0)}
    assert {"mlp.down_proj", "router.proj", "experts.4.down_proj"} <= names and "experts.5.down_proj" not in names
    small = dict(spec.small_tensors())
    assert small["model.layers.0.router.per_expert_scale"] == 5 and small["model.layers.0.router.scale"] == 256
    assert "model.layers.0.pre_feedforward_layernorm_2.weight" in small
    assert spec.part(range(1)).mixture == spec.mixture and read().mixture is None


def test_layers_that_read_keys_of_others_and_are_told_of_tokens() -> None:
    types = ["sliding_attention", "full_attention", "sliding_attention", *["full_attention", "sliding_attention"] * 2]
    spec = read(**{**TOLD, "num_hidden_layers": 7, "num_kv_shared_layers": 4, "layer_types": [*types[:6], "full_attention"]})
    assert spec.caches == (0, 1, 2, 1, 2, 1, 1) and (spec.kv_layers, spec.attention_layers) == (3, 7)
    assert spec.kv_shapes == ((2, 64), (2, 128), (2, 64)) and [heads.size for heads in spec.by_layer[3:]] == [128, 64, 128, 128]
    names = {layer: {m.name: (m.N, m.K) for m in spec.layer_modules(layer)} for layer in (0, 3)}
    assert "self_attn.k_proj" in names[0] and not {"self_attn.k_proj", "self_attn.v_proj"} & names[3].keys()
    assert names[0]["mlp.down_proj"] == (256, 384) and names[3]["mlp.down_proj"] == (256, 768) and spec.mlp_size == 768
    assert names[3]["per_layer_input_gate"] == (128, 256) and names[3]["per_layer_projection"] == (256, 128)
    tables = {m.name: (m.N, m.K) for m in spec.modules() if not m.in_layer}
    assert tables["model.embed_tokens_per_layer"] == (203, 7 * 128)
    assert tables["model.per_layer_model_projection"] == (7 * 128, 256)
    small = dict(spec.small_tensors())
    assert "model.layers.2.self_attn.k_norm.weight" in small and "model.layers.3.self_attn.k_norm.weight" not in small
    assert small["model.per_layer_projection_norm.weight"] == 128
    part = spec.part(range(2, 4))
    assert part.per_layer is not None and (part.per_layer.first, part.per_layer.layers) == (2, 7)
    assert part.shared == (False, True) and spec.part(range(2)).shared == ()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size_per_layer_input": 256}, "vocab_size_per_layer_input is 262144, but vocab_size 203: they must be the same"),
    ({"hidden_size_per_layer_input": -1}, "hidden_size_per_layer_input is -1, expected an integer of at least 0"),
    ({"num_kv_shared_layers": 1}, "num_kv_shared_layers is 1, but of the 2 layers before none has keys and values for each type"),
    ({"num_kv_shared_layers": 9}, "num_kv_shared_layers is 9, but of the 0 layers before none has keys and values for each type"),
    ({"use_double_wide_mlp": 2}, "use_double_wide_mlp is 2, expected true or false"),
    ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention = 'all' is not supported for Gemma4ForCausalLM"),
    ({"layer_types": ["full_attention", *["sliding_attention"] * 2]}, "layer_types ends with sliding_attention, but the last"),
    ({"layer_types": [["full_attention"], *["full_attention"] * 2]}, "layer_types must name full_attention or sliding_attention"),
    ({"num_global_key_value_heads": 3}, "num_attention_heads 4 is no multiple of 3 global key-value heads"),
    ({"global_head_dim": 0}, "global_head_dim is 0, expected an integer of at least 1"),
    ({"attention_k_eq_v": 1}, "attention_k_eq_v is 1, expected true or false"),
    ({"enable_moe_block": True}, "num_experts is missing"),
    ({**EXPERTS, "top_k_experts": 9}, "top_k_experts is 9, but there are 5 experts"),
    ({"per_layer_config": [1]}, r"per_layer_config is \[1\], expected an object by number of layer"),
    ({"per_layer_config": {"2": {"sliding_window": 4}}}, r"per_layer_config\[2\] is .*; known are head_dim and num_key"),
    ({"per_layer_config": {"0": {"head_dim": 32}}}, "per_layer_config has other heads for some layers of a type"),
    (
        {"per_layer_config": {"0": {"head_dim": 128}}, "layer_types": ["full_attention"] * 3},
        "per_layer_config has other heads for some layers of a type",
    ),
]


@pytest.mark.parametrize(("more", "message"), REFUSED)
def test_what_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(**more)


def test_its_layers_are_not_quantized_here(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a Gemma4ForCausalLM, whose layers this version serves and does not quantize"):
        check_kind(tmp_path, read())
