"""Liquid's families, some of whose layers are a short convolution (models/conv.py): rows of ARCHITECTURES. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.family import Architecture
from models.fields import Fields

LFM2 = Architecture(
    qkv_bias=False, o_bias=False, qk_norm=True, qk_names=("q_layernorm", "k_layernorm"), input_norm="operator_norm",
    norms=("", "ffn_norm", ""), conv=True, eps=1e-5, theta=1e6, max_position=128000, inner_scaled=True,
    refused={"conv_bias": (None, False)},
    defaults={"num_key_value_heads": 8, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2},
)  # fmt: skip
LFM2_MOE = replace(
    LFM2, inner_scaled=False, mixture="feed_forward", expert=("w1", "w3", "w2"), sparse="from", dense_count="num_dense_layers",
    sigmoid=True, correction="expert_bias", share_least=1e-6,
    refused={"conv_bias": (None, False), "use_expert_bias": (None, True)},
    defaults={
        **LFM2.defaults, "num_dense_layers": 2, "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 1792,
        "norm_topk_prob": True,
    },
)  # fmt: skip


def renamed(kind: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under the keys of other families, which these have names of their own for; and the size of their MLPs.

    ``block_auto_adjust_ff_dim`` makes that two thirds of what is said, times a factor, rounded up to a multiple.
    """
    names = {"norm_eps": "rms_norm_eps", "tie_embedding": "tie_word_embeddings", "block_ff_dim": "intermediate_size"}
    found = {**config, **{ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None}}
    fields = Fields(found)
    if kind.inner_scaled and fields.flag("block_auto_adjust_ff_dim", default=True):
        inner = int(2 * fields.integer("intermediate_size") / 3)
        inner = int(fields.number("block_ffn_dim_multiplier", default=1.0) * inner)
        multiple = fields.integer("block_multiple_of", default=256)
        found["intermediate_size"] = -(-inner // multiple) * multiple
    return found
