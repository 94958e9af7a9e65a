"""Tensor parallel: what one of several cards holds, worked out by hand; and layouts that do not divide."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from appliance.config import EngineConfig
from appliance.memory.cards import find_card
from appliance.memory.demand import Demand
from appliance.memory.modules import Machinery
from appliance.memory.shard import EXCHANGE_BYTES, check_layout, shard, with_exchange
from models.spec import ModelSpec
from quant.errors import InputError
from quant.scheme import QuantScheme

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "torch_dtype": "float16",
}  # fmt: skip
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


def model(quantization: dict[str, Any] | None = None, **changes: Any) -> tuple[ModelSpec, QuantScheme]:
    config = {**LLAMA_8B, **changes, **({"quantization_config": quantization} if quantization else {})}
    return ModelSpec.from_config(config), QuantScheme.from_config(config)


def demand(spec: ModelSpec, scheme: QuantScheme) -> Demand:
    card = find_card("RTX 3090").device()
    return Demand.of(spec, scheme, Machinery.choose(EngineConfig(lm_head_dtype="model"), spec.dtype, card), model="llama")


def test_one_card_is_the_whole_model() -> None:
    spec, scheme = model(AWQ)
    assert shard(spec, 1) == spec and with_exchange(demand(spec, scheme), spec, 1) == demand(spec, scheme)
    check_layout(spec, spec, scheme, 1)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_bytes_of_one_card(ranks: int) -> None:
    """In float16: what is divided is exact, but that the vocabulary is filled up."""
    spec, scheme = model()
    part = shard(spec, ranks)
    whole, mine = demand(spec, scheme), with_exchange(demand(part, scheme), spec, ranks)
    for name in ("attention", "mlp"):
        assert mine.weights[name] * ranks == whole.weights[name], name
    tokens = {2: 64128, 4: 32064, 8: 16064}[ranks]  # of the vocabulary, in whole 64s
    assert mine.weights["embedding"] == mine.weights["head"] == tokens * 4096 * 2
    assert mine.weights["norms"] == whole.weights["norms"] == (32 * 2 + 1) * 4096 * 2
    assert (mine.kv_heads, mine.head_dim, mine.layers) == (8 // ranks, 128, 32)
    assert mine.hidden_bytes == whole.hidden_bytes and mine.exchange == EXCHANGE_BYTES
    assert mine.logits_row_bytes == 6 * tokens + 4 * 128256  # ours in float16 and float32, and all of them in float32


def test_parts_of_an_awq_model() -> None:
    spec, scheme = model(AWQ)
    part = shard(spec, 4)
    check_layout(spec, part, scheme, 4)
    assert demand(part, scheme).weights["mlp"] * 4 == demand(spec, scheme).weights["mlp"]


def test_heads_that_are_fewer_than_cards_are_on_several() -> None:
    spec, _ = model()
    part = shard(spec, 16)
    assert (part.heads, part.kv_heads, part.head_dim, part.intermediate) == (2, 1, 128, 896)
    assert shard(replace(spec, kv_heads=2), 8).kv_heads == 1


def test_a_vocabulary_that_does_not_divide_is_filled_up() -> None:
    spec, _ = model(vocab_size=32003)
    assert shard(spec, 2).vocab == 16064 and shard(spec, 1).vocab == 32003


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({}, 3, r"tensor parallel over 3 cards: 32 attention heads are no multiple of 3; 2, 4, 8, 16, 32 would do"),
        (
            {"num_attention_heads": 30, "num_key_value_heads": 5, "hidden_size": 3840},
            2,
            "5 key-value heads are no multiple of 2; 10, 30|5",
        ),
        ({"intermediate_size": 14337}, 2, "14337 features of the MLP are no multiple of 2; no number of cards would do"),
    ],
)
def test_models_that_do_not_divide(changes: dict[str, Any], ranks: int, message: str) -> None:
    spec, _ = model(**changes)
    with pytest.raises(InputError, match=message):
        shard(spec, ranks)


@pytest.mark.parametrize(
    ("quantization", "ranks", "message"),
    [
        ({**AWQ, "group_size": 128}, 32, r"layers.0.mlp.down_proj cannot be split: 448 inputs a card are no whole groups of 128"),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True},
            2,
            r"self_attn.o_proj cannot be split: its inputs have an order of their own \(desc_act\)",
        ),
        (
            {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
            32,
            r"mlp.gate_proj cannot be split: 448 x 4096 a card are no whole blocks of 128 x 128",
        ),
    ],
)
def test_weights_that_cannot_be_split(quantization: dict[str, Any], ranks: int, message: str) -> None:
    spec, scheme = model(quantization)
    with pytest.raises(InputError, match=message):
        check_layout(spec, shard(spec, ranks), scheme, ranks)
