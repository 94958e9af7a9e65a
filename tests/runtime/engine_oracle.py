"""Run by a test in a process and folder of its own: what transformers answers with small random models, in float32.

    python engine_oracle.py OUTPUT_DIR < request.json      {"Qwen3_5": {"lengths": [...], "tokens": ...}, ...}

Writes OUTPUT_DIR/NAME/model and OUTPUT_DIR/NAME/expected.json, {cases: [{prompt, answer, margin, logprobs}], talks: [[{..}]]}:
greedy answers of so many tokens, how certain the least certain of them was, and the log-probabilities of the prompt's tokens but
the first. With "talks", "turns" and "system" also so many conversations that begin with the same "system" tokens: each turn has
the one before it, its answer, and a few tokens more.
"""

import json
import random
import sys
from pathlib import Path

import torch
from transformers import (
    DeepseekV3ForCausalLM,
    Gemma4ForCausalLM,
    Lfm2MoeForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3NextForCausalLM,
)

CONFIG = {
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "linear_conv_kernel_dim": 4,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 900.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}
GEMMA4 = {  # heads of two kinds, and experts beside MLPs
    **{key: value for key, value in CONFIG.items() if not key.startswith(("linear", "rope"))},
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "sliding_window": 24,
    "global_head_dim": 24,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 30.0,
    "enable_moe_block": True,
    "num_experts": 5,
    "top_k_experts": 2,
    "moe_intermediate_size": 24,
}
TOLD = GEMMA4 | {  # of tokens beside hidden states; and layers that read the keys of others
    "enable_moe_block": False, "attention_k_eq_v": False, "num_global_key_value_heads": None, "hidden_size_per_layer_input": 12,
    "vocab_size_per_layer_input": 256, "num_kv_shared_layers": 2, "use_double_wide_mlp": True,
}  # fmt: skip
LATENT = {key: value for key, value in CONFIG.items() if not key.startswith(("linear", "layer", "head_dim", "rope"))} | {
    "num_key_value_heads": 4, "q_lora_rank": 20, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12,
    "v_head_dim": 10, "moe_intermediate_size": 28, "n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 3, "topk_group": 2,
    "first_k_dense_replace": 1, "num_hidden_layers": 2,
}  # fmt: skip
LIQUID = {
    **{key: value for key, value in CONFIG.items() if not key.startswith(("linear", "rope"))},
    "layer_types": ["conv", "full_attention", "conv", "conv"],
    "num_dense_layers": 1,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
KINDS = {
    "Qwen3_5": (Qwen3_5ForCausalLM, CONFIG),
    "Qwen3Next": (Qwen3NextForCausalLM, CONFIG | EXPERTS),
    "DeepseekV3": (DeepseekV3ForCausalLM, LATENT),
    "Gemma4": (Gemma4ForCausalLM, GEMMA4),
    "Lfm2Moe": (Lfm2MoeForCausalLM, LIQUID),
    "Gemma4Told": (Gemma4ForCausalLM, TOLD),
}


def main() -> None:
    for name, asked in json.load(sys.stdin).items():
        answer(*KINDS[name], Path(sys.argv[1]) / name, asked)


def answer(kind, settings, output, asked) -> None:
    torch.manual_seed(0)
    config = kind.config_class(**settings)
    config._attn_implementation = config._experts_implementation = "eager"
    model = kind(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread, middle = (2.0, -2.0) if name.endswith("A_log") else (0.3, 1.0) if parameter.dim() == 1 else (0.25, 0.0)
            parameter.copy_(torch.randn_like(parameter) * spread + middle)  # some states last, some are forgotten at once
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.copy_(0.5 + torch.rand_like(buffer))
    model.save_pretrained(output / "model")
    rng = random.Random(0)
    cases = [case(model, said(rng, length), asked["tokens"]) for length in asked["lengths"]]
    system, talks = said(rng, asked.get("system", 0)), []
    for _ in range(asked.get("talks", 0)):
        text, turns = system, []
        for _ in range(asked["turns"]):
            turns.append(case(model, [*text, *said(rng, rng.randrange(1, 24))], asked["tokens"]))
            text = turns[-1]["prompt"] + turns[-1]["answer"]
        talks.append(turns)
    (output / "expected.json").write_text(json.dumps({"cases": cases, "talks": talks}))


def said(rng, length) -> list[int]:
    return [rng.randrange(3, 256) for _ in range(length)]


def case(model, prompt, tokens) -> dict:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        scores = model(ids).logits[0].log_softmax(-1)
    first, second = torch.cat(out.logits).topk(2).values.unbind(1)
    logprobs = [scores[i, token].item() for i, token in enumerate(prompt[1:])]
    answer = out.sequences[0, len(prompt) :].tolist()
    return {"prompt": prompt, "answer": answer, "margin": (first - second).min().item(), "logprobs": logprobs}


if __name__ == "__main__":
    main()
