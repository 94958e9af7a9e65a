"""What families have beside plain Llama, on a card: small models whole, against the reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tests.kernels.triton.conftest  # noqa: F401  (chooses the interpreter)
from kernels.ops import Ops, get_ops
from models.loader import load_model
from models.spec import ModelSpec
from quant.checkpoint import Checkpoint
from tests.kernels.triton.conftest import DEVICE
from tests.models.test_against_transformers import feed

from kernels.triton.ops import make_ops  # isort: skip  (after that conftest has chosen the interpreter)

SMALL = {
    "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": 67, "max_position_embeddings": 64, "torch_dtype": "float32",
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Ministral3": {  # operators one by one, but for a context within the first
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 900.0, "factor": 8.0, "original_max_position_embeddings": 8,
                            "llama_4_scaling_beta": 0.7},
    },
    "SmolLM3": {"no_rope_layers": [0, 1]},
    "Olmo3": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7},
    "Gemma4": {
        "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7, "global_head_dim": 32,
        "num_global_key_value_heads": 1, "attention_k_eq_v": True, "hidden_size_per_layer_input": 0,
    },
    "Gemma4 that is told of tokens": {
        "layer_types": ["sliding_attention", "full_attention", "full_attention"], "num_hidden_layers": 3, "sliding_window": 7,
        "global_head_dim": 32, "hidden_size_per_layer_input": 24, "vocab_size_per_layer_input": 67, "num_kv_shared_layers": 1,
        "use_double_wide_mlp": True,
    },
    "DeepseekV3": {  # attention over latents; cards have no experts in float32, and no layer has any here
        "first_k_dense_replace": 2, "kv_lora_rank": 24, "q_lora_rank": 20, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12,
        "v_head_dim": 10, "n_group": 1, "topk_group": 1, "rope_scaling": {
            "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale_all_dim": 1.0,
        },
    },
    "HunYuanDenseV1": {"rope_scaling": {"type": "dynamic", "alpha": 20.0, "factor": 1.0}},
    "Arcee": {"mlp_bias": False},
    "Apertus": {},
    "Granite": {
        "embedding_multiplier": 3.0, "residual_multiplier": 0.3, "attention_multiplier": 0.4, "logits_scaling": 0.5,
        "rms_norm_eps": 0.1,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_logits(tmp_path: Path, name: str) -> None:
    config = {**SMALL, **FAMILIES[name], "architectures": [f"{name.split()[0]}ForCausalLM"]}
    spec, rng = ModelSpec.from_config(config), torch.Generator().manual_seed(3)
    tensors = {f"{m.name}.weight": 0.3 * torch.randn(m.N, m.K, generator=rng) for m in spec.modules()}
    tensors |= {norm: 1 + 0.3 * torch.randn(size, generator=rng) for norm, size in spec.small_tensors()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = torch.randint(spec.vocab, (19,), generator=rng)

    def logits(ops: Ops, **rows: int) -> torch.Tensor:
        with Checkpoint.open(tmp_path) as checkpoint:
            decoder = load_model(checkpoint, spec, ops, dtype=torch.float32, max_len=len(ids), lm_head_dtype="model")
        return feed(decoder, ids, [18, 1] if not rows else [11, 8], block_size=16, **rows)

    expected = logits(get_ops("cpu", reference=True))
    assert expected.std() > 0.3
    ours = make_ops(torch.device(DEVICE))
    assert (logits(ours).cpu() - expected).abs().max() < 2e-4
    for last in (1, 3) if any(spec.shared) else ():  # layers that store nothing compute these alone
        assert (logits(ours, last=last).cpu() - expected[-last:]).abs().max() < 2e-4
