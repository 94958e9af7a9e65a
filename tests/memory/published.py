"""Checkpoints of real models as they are published: every tensor has its name, type and shape, and no data, or random ones.

Shapes are those that AutoAWQ, GPTQModel and llm-compressor write (README of each); nothing here comes from the planner.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

from quant.headers import read_header

SIZES = {"F16": 2, "BF16": 2, "F32": 4, "I32": 4, "I64": 8, "I8": 1, "F8_E4M3": 1, "U8": 1}
Tensors = dict[str, tuple[str, tuple[int, ...]]]
SMALL: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 256, "intermediate_size": 640, "moe_intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 300,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu", "torch_dtype": "bfloat16",
    "tie_word_embeddings": False, "num_experts": 7, "num_experts_per_tok": 3, "norm_topk_prob": True,
}  # fmt: skip
MIXTRAL = {key: value for key, value in SMALL.items() if key not in ("num_experts", "moe_intermediate_size")} | {
    "architectures": ["MixtralForCausalLM"], "num_local_experts": 5, "num_experts_per_tok": 2,
}  # fmt: skip
QWEN2_MOE = {**SMALL, "architectures": ["Qwen2MoeForCausalLM"], "shared_expert_intermediate_size": 384, "qkv_bias": False}
GLM4_MOE = {key: value for key, value in SMALL.items() if key != "num_experts"} | {
    "architectures": ["Glm4MoeForCausalLM"], "n_routed_experts": 6, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1, "routed_scaling_factor": 1.5, "rope_theta": 1e6,
}  # fmt: skip
ERNIE_MOE = {key: value for key, value in SMALL.items() if "num_experts" not in key} | {
    "architectures": ["Ernie4_5_MoeForCausalLM"], "moe_num_experts": 5, "moe_k": 2, "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1, "tie_word_embeddings": True,
}  # fmt: skip
DEEPSEEK_V3 = {key: value for key, value in GLM4_MOE.items() if key != "head_dim"} | {
    "architectures": ["DeepseekV3ForCausalLM"], "q_lora_rank": 128, "kv_lora_rank": 128, "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 48, "v_head_dim": 32, "n_group": 3, "topk_group": 2,
}  # fmt: skip
DEEPSEEK_V2 = DEEPSEEK_V3 | {
    "architectures": ["DeepseekV2ForCausalLM"], "q_lora_rank": None, "topk_method": "group_limited_greedy",
    "norm_topk_prob": False, "num_nextn_predict_layers": 0,
}  # fmt: skip
GLM4_MOE_LITE = DEEPSEEK_V3 | {"architectures": ["Glm4MoeLiteForCausalLM"], "n_group": 1, "topk_group": 1}

GPT_OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"], "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False, "num_local_experts": 5, "num_experts_per_tok": 2,
    "attention_bias": True, "sliding_window": 12, "swiglu_limit": 2.0, "rope_theta": 150000,
    "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "truncate": False},
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
    },
}  # fmt: skip


def write_headers(directory: Path, tensors: Tensors, config: dict[str, Any]) -> Path:
    """A checkpoint of any size that takes no disk: a true header, and a hole where the data would be."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + SIZES[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def linears(config: dict[str, Any], layer: int = 99) -> dict[str, tuple[int, int]]:
    """[out, in] of the linears of one layer, from config.json; where the first ones are others, of one of the last."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    q, kv = heads * size, config["num_key_value_heads"] * size
    attention = {
        "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
    }  # fmt: skip
    if "kv_lora_rank" in config:
        attention = latent_linears(config)
    first = config.get("first_k_dense_replace", config.get("moe_layer_start_index", 0))
    counts = (config.get(key) or 0 for key in ("num_experts", "n_routed_experts", "moe_num_experts") if layer >= first)
    experts = [f"mlp.experts.{e}" for e in range(max(counts, default=0))]
    experts += [f"block_sparse_moe.experts.{e}" for e in range(config.get("num_local_experts") or 0)]
    names = ("w1", "w3", "w2") if "num_local_experts" in config else ("gate_proj", "up_proj", "down_proj")
    inner = config.get("moe_intermediate_size") or inner if experts else inner
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    mlps = {f"{mlp}.{name}": shape for mlp in experts or ["mlp"] for name, shape in zip(names, shapes, strict=True)}
    own, shared = config.get("shared_expert_intermediate_size"), "mlp.shared_expert"
    if own:
        mlps["mlp.shared_expert_gate"] = (1, hidden)
    elif several := config.get("n_shared_experts", config.get("moe_num_shared_experts")):
        own, shared = several * inner if experts else None, "mlp.shared_experts"
    if own:
        shapes = ((own, hidden), (own, hidden), (hidden, own))
        mlps |= {f"{shared}.{name}": shape for name, shape in zip(names, shapes, strict=True)}
    return attention | ({f"{experts[0].split('.')[0]}.gate": (len(experts), hidden)} if experts else {}) | mlps


def latent_linears(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Those of attention over latents."""
    hidden, heads, rank = (config[key] for key in ("hidden_size", "num_attention_heads", "kv_lora_rank"))
    rope, nope, value = (config[key] for key in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
    queries = {"q_proj": (heads * (nope + rope), hidden)}
    if q := config["q_lora_rank"]:
        queries = {"q_a_proj": (q, hidden), "q_b_proj": (heads * (nope + rope), q)}
    rest = {"kv_a_proj_with_mqa": (rank + rope, hidden), "kv_b_proj": (heads * (nope + value), rank)}
    return {f"self_attn.{n}": shape for n, shape in {**queries, **rest, "o_proj": (hidden, heads * value)}.items()}


def awq(name: str, N: int, K: int, group: int) -> Tensors:
    return {
        f"{name}.qweight": ("I32", (K, N // 8)),
        f"{name}.qzeros": ("I32", (K // group, N // 8)),
        f"{name}.scales": ("F16", (K // group, N)),
    }


def gptq(name: str, N: int, K: int, group: int) -> Tensors:
    return {
        f"{name}.qweight": ("I32", (K // 8, N)),
        f"{name}.qzeros": ("I32", (K // group, N // 8)),
        f"{name}.scales": ("F16", (K // group, N)),
        f"{name}.g_idx": ("I32", (K,)),
    }


def packed(name: str, N: int, K: int, group: int) -> Tensors:
    return {
        f"{name}.weight_packed": ("I32", (N, K // 8)),
        f"{name}.weight_scale": ("BF16", (N, K // group)),
        f"{name}.weight_shape": ("I64", (2,)),
    }


def int8(name: str, N: int, K: int, group: int) -> Tensors:
    return {f"{name}.weight": ("I8", (N, K)), f"{name}.weight_scale": ("BF16", (N, 1))}


def fp8(name: str, N: int, K: int, group: int) -> Tensors:
    return {f"{name}.weight": ("F8_E4M3", (N, K)), f"{name}.weight_scale": ("BF16", (N, 1))}


def nvfp4(name: str, N: int, K: int, group: int) -> Tensors:
    """As llm-compressor writes it, with activations in 4 bits."""
    return {
        f"{name}.weight_packed": ("U8", (N, K // 2)),
        f"{name}.weight_scale": ("F8_E4M3", (N, K // group)),
        f"{name}.weight_global_scale": ("F32", (1,)),
        f"{name}.input_global_scale": ("F32", (1,)),
    }


def mxfp4(name: str, N: int, K: int, group: int) -> Tensors:
    """As llm-compressor writes it."""
    return {f"{name}.weight_packed": ("U8", (N, K // 2)), f"{name}.weight_scale": ("U8", (N, K // group))}


def modelopt(name: str, N: int, K: int, group: int) -> Tensors:
    """NVFP4 as NVIDIA's ModelOpt writes it, with scales of an FP8 cache."""
    found: Tensors = {
        f"{name}.weight": ("U8", (N, K // 2)),
        f"{name}.weight_scale": ("F8_E4M3", (N, K // group)),
        f"{name}.weight_scale_2": ("F32", ()),
        f"{name}.input_scale": ("F32", ()),
    }
    return found | cache_scale(name)


def modelopt_fp8(name: str, N: int, K: int, group: int) -> Tensors:
    """One scale a weight, as ModelOpt 0.47 wrote it."""
    scales = {f"{name}.{kind}_scale": ("F32", ()) for kind in ("weight", "input")}
    return {f"{name}.weight": ("F8_E4M3", (N, K))} | scales | cache_scale(name)


def modelopt_channels(name: str, N: int, K: int, group: int) -> Tensors:
    return {f"{name}.weight": ("F8_E4M3", (N, K)), f"{name}.weight_scale": ("F32", (N,))} | cache_scale(name)


def modelopt_blocks(name: str, N: int, K: int, group: int) -> Tensors:
    return {f"{name}.weight": ("F8_E4M3", (N, K)), f"{name}.weight_scale": ("F32", (-(-N // 128), 1, -(-K // 128), 1))}


def modelopt_mx(name: str, N: int, K: int, group: int) -> Tensors:
    return {f"{name}.weight": ("F8_E4M3", (N, K)), f"{name}.weight_scale": ("U8", (N, K // 32))}


def fp8_blocks(name: str, N: int, K: int, group: int) -> Tensors:
    """As DeepSeek publishes it."""
    return {f"{name}.weight": ("F8_E4M3", (N, K)), f"{name}.weight_scale_inv": ("F32", (-(-N // 128), -(-K // 128)))}


def cache_scale(name: str) -> Tensors:
    part = name.rpartition(".")[2][0]
    return {f"{name}.{part}_scale": ("F32", ())} if name.endswith(("k_proj", "v_proj")) else {}


def dense(name: str, N: int, K: int, group: int) -> Tensors:
    return {f"{name}.weight": ("BF16", (N, K))}


def _compressed(layout: str, bits: int, kind: str, strategy: str, group: int | None, activations: str | None) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, "group_size": group, "dynamic": False}
    inputs = None if activations is None else {
        "num_bits": 8, "type": activations, "symmetric": True, "strategy": "token", "dynamic": True,
    }  # fmt: skip
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups, "ignore": ["lm_head"]}


GPTQ = {"quant_method": "gptq", "bits": 4, "sym": True, "checkpoint_format": "gptq"}
VARIANTS: dict[str, tuple[Any, int, dict[str, Any] | None]] = {  # tensors of a linear, group size, quantization_config
    "none": (dense, 0, None),
    "awq": (awq, 128, {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}),
    "gptq": (gptq, 128, {**GPTQ, "group_size": 128, "desc_act": False}),
    "gptq-act-order": (gptq, 32, {**GPTQ, "group_size": 32, "desc_act": True}),
    "ct-w4a16": (packed, 128, _compressed("pack-quantized", 4, "int", "group", 128, None)),
    "ct-w8a8": (int8, 0, _compressed("int-quantized", 8, "int", "channel", None, "int")),
    "ct-fp8": (fp8, 0, _compressed("float-quantized", 8, "float", "channel", None, "float")),
}
FLOAT4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
MX4 = {**FLOAT4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
FLOATS4: dict[str, tuple[Any, int, dict[str, Any] | None]] = {  # the same on a CPU alone
    "ct-nvfp4": (nvfp4, 16, {
        "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "ignore": ["lm_head", "re:.*mlp.gate$"],
        "config_groups": {"group_0": {
            "targets": ["Linear"], "weights": {**FLOAT4, "dynamic": False, "scale_dtype": "torch.float8_e4m3fn"},
            "input_activations": {**FLOAT4, "dynamic": "local"}, "format": "nvfp4-pack-quantized",
        }},
    }),
    "ct-mxfp4": (mxfp4, 32, {
        "quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized", "ignore": ["lm_head", "re:.*mlp.gate$"],
        "config_groups": {"group_0": {
            "targets": ["Linear"], "weights": {**MX4, "dynamic": False}, "input_activations": {**MX4, "dynamic": True},
            "format": "mxfp4-pack-quantized",
        }},
    }),
    "modelopt-nvfp4": (modelopt, 16, {
        "quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "model.layers.*.mlp.gate"],
        "producer": {"name": "modelopt", "version": "0.37.0"},
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "config_groups": {"group_0": {
            "targets": ["Linear"], "weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
            "input_activations": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
        }},
    }),
}  # fmt: skip
MODELOPT: dict[str, tuple[Any, int, dict[str, Any] | None]] = {
    name: (make, 0, {
        "quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head", "model.layers.*.mlp.gate"],
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "producer": {"name": "modelopt", "version": "0.47.0"},
    })
    for name, make, algorithm in (
        ("modelopt-fp8", modelopt_fp8, "FP8"), ("modelopt-fp8-channels", modelopt_channels, "FP8_PER_CHANNEL_PER_TOKEN"),
        ("modelopt-fp8-blocks", modelopt_blocks, "fp8_pb_wo"), ("modelopt-mxfp8", modelopt_mx, "MXFP8"),
    )
}  # fmt: skip
BLOCKS: dict[str, tuple[Any, int, dict[str, Any] | None]] = {
    "fp8-blocks": (fp8_blocks, 0, {
        "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128],
    }),
}  # fmt: skip
ALL = VARIANTS | FLOATS4 | MODELOPT | BLOCKS


def write_published(directory: Path, config: dict[str, Any], variant: str) -> Path:
    """The model of a config.json in one of VARIANTS, FLOATS4, MODELOPT or BLOCKS; embedding, head and norms stay in bfloat16."""
    make, group, quantization = ALL[variant]
    hidden, vocab, layers = config["hidden_size"], config["vocab_size"], config["num_hidden_layers"]
    tensors: Tensors = {"model.embed_tokens.weight": ("BF16", (vocab, hidden)), "model.norm.weight": ("BF16", (hidden,))}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = ("BF16", (vocab, hidden))
    ahead = config.get("num_nextn_predict_layers", 0)  # layers behind the others, that guess further tokens
    for layer in range(layers, layers + ahead):
        prefix = f"model.layers.{layer}"
        tensors |= {f"{prefix}.{name}.weight": ("BF16", (hidden,)) for name in ("enorm", "hnorm", "shared_head.norm")}
        tensors |= {f"{prefix}.eh_proj.weight": ("BF16", (hidden, 2 * hidden))}
    for layer in range(layers + ahead):
        prefix = f"model.layers.{layer}"
        names = ["input_layernorm", "post_attention_layernorm"]
        if config["architectures"][0].startswith("Gemma"):
            names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        for norm in names:
            tensors[f"{prefix}.{norm}.weight"] = ("BF16", (hidden,))
        if config["architectures"][0] in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Gemma3ForCausalLM"):
            for norm in ("q_norm", "k_norm"):
                tensors[f"{prefix}.self_attn.{norm}.weight"] = ("BF16", (config["head_dim"],))
        if "kv_lora_rank" in config:
            ranks = {"q_a_layernorm": config["q_lora_rank"], "kv_a_layernorm": config["kv_lora_rank"]}
            tensors |= {f"{prefix}.self_attn.{norm}.weight": ("BF16", (rank,)) for norm, rank in ranks.items() if rank}
        gates = dict.fromkeys(("DeepseekV3ForCausalLM", "Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM"), "gate")
        correction = (gates | {"Ernie4_5_MoeForCausalLM": "moe_statics"}).get(config["architectures"][0])
        if correction and "mlp.gate" in linears(config, layer):
            experts = linears(config, layer)["mlp.gate"][0]
            shape = (experts,) if correction == "gate" else (1, experts)
            tensors[f"{prefix}.mlp.{correction}.e_score_correction_bias"] = ("F32", shape)
        for name, (N, K) in linears(config, layer).items():
            tensors |= (dense if name.endswith((".gate", "_gate")) else make)(
                f"{prefix}.{name}", N, K, group
            )  # routers are left alone
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    return write_headers(directory, tensors, config if quantization is None else {**config, "quantization_config": quantization})


def write_gpt_oss(directory: Path, config: dict[str, Any]) -> Path:
    """gpt-oss as published: experts in MXFP4, all of a layer in one tensor, and what is left in bfloat16."""
    hidden, inner, vocab, experts = (
        config[key] for key in ("hidden_size", "intermediate_size", "vocab_size", "num_local_experts")
    )
    heads, size = config["num_attention_heads"], config["head_dim"]
    tensors: Tensors = {"model.norm.weight": ("BF16", (hidden,))}
    tensors |= {f"{name}.weight": ("BF16", (vocab, hidden)) for name in ("model.embed_tokens", "lm_head")}
    q, kv = heads * size, config["num_key_value_heads"] * size
    dense = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    linears = {f"self_attn.{name}": shape for name, shape in dense.items()} | {"mlp.router": (experts, hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = ("BF16", (hidden,))
        tensors[f"{prefix}.self_attn.sinks"] = ("BF16", (heads,))
        for name, (N, K) in linears.items():
            tensors |= {f"{prefix}.{name}.weight": ("BF16", (N, K)), f"{prefix}.{name}.bias": ("BF16", (N,))}
        for name, N, K in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            stacked = f"{prefix}.mlp.experts.{name}"
            tensors[f"{stacked}_blocks"] = ("U8", (experts, N, K // 32, 16))
            tensors[f"{stacked}_scales"] = ("U8", (experts, N, K // 32))
            tensors[f"{stacked}_bias"] = ("BF16", (experts, N))
    return write_headers(directory, tensors, config)


def fill(directory: Path, variant: str) -> Path:
    """Random values that a loader takes, in place of the hole: scales are positive, orders are orders, GPTQ is symmetric."""
    import torch
    from safetensors.torch import save_file

    rng, index = torch.Generator().manual_seed(0), read_header(directory / "model.safetensors")
    group, orders, tensors = ALL[variant][1], {}, {}
    for name, info in index.items():
        if name.endswith("qzeros") and variant.startswith("gptq"):
            found = torch.full(info.shape, 0x77777777, dtype=torch.int32)
        elif name.endswith("g_idx"):
            K = info.shape[0]
            order = orders.setdefault(K, torch.randperm(K, generator=rng)) if "order" in variant else torch.arange(K)
            found = (order // group).int()
        elif name.endswith("weight_shape"):
            rows, words = index[name.replace("shape", "packed")].shape
            found = torch.tensor([rows, words * 8])
        elif info.dtype in ("I32", "I8"):
            bits = 31 if info.dtype == "I32" else 7
            found = torch.randint(-(2**bits), 2**bits - 1, info.shape, generator=rng, dtype=torch.int64)
            found = found.to(torch.int32 if info.dtype == "I32" else torch.int8)
        elif info.dtype == "U8":
            low, high = (119, 125) if name.endswith(("scales", "scale")) else (0, 256)
            found = torch.randint(low, high, info.shape, generator=rng, dtype=torch.uint8)
        elif info.dtype == "F8_E4M3" and name.endswith("scale"):
            found = (448 * torch.rand(info.shape, generator=rng) + 1).to(torch.float8_e4m3fn)
        elif name.endswith("correction_bias"):
            found = 0.1 * torch.randn(info.shape, generator=rng)
        elif info.dtype == "F32":  # of parts of what becomes one weight, each its own
            found = 1e4 * (1 + torch.rand(info.shape, generator=rng))
            found = found if name.endswith("global_scale") else 1 / found
        elif info.dtype == "F8_E4M3":
            found = torch.randn(info.shape, generator=rng).to(torch.float8_e4m3fn)
        else:
            found = (0.01 * torch.rand(info.shape, generator=rng) + 0.001).to(
                {"F16": torch.float16, "BF16": torch.bfloat16}[info.dtype]
            )
        tensors[name] = found
    save_file(tensors, directory / "model.safetensors")
    return directory


def livelier(folder: Path) -> Path:
    """Norms about 1, and routers that tell experts apart: random scales alone give shares that hardly differ."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors, rng = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(5)
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            tensors[name] = (1 + 0.1 * torch.randn(tensor.shape, generator=rng)).to(tensor.dtype)
        elif name.endswith(("gate.weight", "embed_tokens.weight", "lm_head.weight")):
            tensors[name] = (0.2 * torch.randn(tensor.shape, generator=rng)).to(tensor.dtype)
        elif name.endswith(".weight") and tensor.dtype == torch.bfloat16:
            tensors[name] = (0.06 * torch.randn(tensor.shape, generator=rng)).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors")
    return folder
