"""The families that are served: how each differs from plain Llama, and which of them a config.json is of. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE_LITE
from models.family import Architecture
from models.fields import Fields
from models.gemma import GEMMA2, GEMMA3, GEMMA4
from models.liquid import LFM2, LFM2_MOE, renamed
from models.qwen import QWEN2, QWEN2_MOE, QWEN2_VL, QWEN3_5, QWEN3_5_MOE, QWEN3_NEXT
from quant.errors import InputError

GLM = Architecture(
    o_bias=False,
    fused_gate_up=True,
    default_head_dim=128,
    eps=1.5625e-7,
    max_position=131072,
    partial_rotation=True,
    interleaved=True,
    defaults={
        "num_key_value_heads": 2,
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
        "eos_token_id": [151329, 151336, 151338],
    },
)
GPT_OSS = Architecture(
    window="alternate",
    default_head_dim=64,
    eps=1e-5,
    theta=150000.0,
    max_position=131072,
    mixture="mlp",
    router="router",
    expert=("gate_up_proj", "down_proj"),
    expert_size="intermediate_size",
    expert_bias=True,
    normalized=True,
    clamped=True,
    sinks=True,
    float16=False,  # trained in bfloat16: in float16 the experts' products go to infinity, as others found
    defaults={
        "attention_bias": True,
        "sliding_window": 128,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "torch_dtype": "bfloat16",  # that of the tensors; transformers looks at these where a config says nothing
    },
    rope={
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
)
GLM4_MOE = Architecture(
    o_bias=False, qk_norm="use_qk_norm", eps=1e-5, max_position=131072, partial_rotation=True,
    mixture="mlp", sparse="from", sigmoid=True, correction="gate.e_score_correction_bias", expert_count="n_routed_experts",
    shared="shared_experts", shared_count="n_shared_experts", ahead_count="num_nextn_predict_layers",
    defaults={
        "num_key_value_heads": 8, "partial_rotary_factor": 0.5, "moe_intermediate_size": 1408, "num_experts_per_tok": 8,
        "n_shared_experts": 1, "norm_topk_prob": True,
    },
)  # fmt: skip
ERNIE = Architecture(
    qkv_bias="use_bias", o_bias="use_bias", mlp_bias="use_bias", eps=1e-5, theta=5e5, max_position=131072, interleaved=True,
    defaults={"num_key_value_heads": 2, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2},
)  # fmt: skip
ERNIE_MOE = replace(
    ERNIE, qkv_bias=False, o_bias=False, mlp_bias=False, refused={"use_bias": (None, False)},  # the head has one then, too
    mixture="mlp", sparse="range", normalized=True, correction="moe_statics.e_score_correction_bias",
    expert_count="moe_num_experts", expert_choice="moe_k", shared="shared_experts", shared_count="moe_num_shared_experts",
    ahead=("model.mtp_",),
    defaults={
        **ERNIE.defaults, "num_key_value_heads": 4, "moe_k": 6, "moe_num_shared_experts": 2, "moe_intermediate_size": 1536,
    },
)  # fmt: skip
OLMO2 = Architecture(
    qk_norm=True, whole_qk_norm=True, eps=1e-5, norms=("post_attention_layernorm", "", "post_feedforward_layernorm"),
    defaults={"eos_token_id": 50279},
)  # fmt: skip
EXAONE4 = Architecture(
    qkv_bias=False, o_bias=False, qk_norm=True, eps=1e-5, window="types", unrotated="full",
    norms=("post_attention_layernorm", "", "post_feedforward_layernorm"),
    defaults={
        "num_key_value_heads": 32, "sliding_window": 4096, "sliding_window_pattern": 4, "bos_token_id": 0, "eos_token_id": 2,
    },
)  # fmt: skip
HUNYUAN = Architecture(
    qk_norm=True, late_qk_norm=True, qk_names=("query_layernorm", "key_layernorm"), eps=1e-5, alpha=True,
    refused={"num_experts": (None, 0, 1), "use_cla": (None, False), "use_qk_norm": (None, True)},
    defaults={"bos_token_id": 1, "eos_token_id": 2},
)  # fmt: skip
ARCEE = Architecture(
    mlp_bias="mlp_bias",
    ungated="relu2",
    eps=1e-5,
    max_position=4096,
    defaults={"bos_token_id": 128000, "eos_token_id": 128001},
)
ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(mlp_bias="mlp_bias"),
    "MistralForCausalLM": Architecture(qkv_bias=False, o_bias=False, window="all", default_window=4096, max_position=131072),
    "Ministral3ForCausalLM": Architecture(
        qkv_bias=False, o_bias=False, window="all", default_head_dim=128, eps=1e-5, theta=1e6, max_position=262144,
        scaled_queries=True, defaults={"rope_parameters": {
            "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16384, "mscale": 1.0, "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        }},
    ),
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": Architecture(
        qk_norm=True, window="upper", default_window=4096, default_head_dim=128, max_position=32768,
    ),
    "Phi3ForCausalLM": Architecture(
        qkv_bias=False, o_bias=False, fused_qkv=True, window="all", eps=1e-5, max_position=4096, partial_rotation=True,
        yarn="longrope", defaults={"original_max_position_embeddings": 4096},
    ),
    "Qwen2MoeForCausalLM": QWEN2_MOE,
    "Qwen3MoeForCausalLM": Architecture(
        qk_norm=True, window="switched", default_window=4096, max_position=32768, mixture="mlp", sparse="step",
    ),
    "MixtralForCausalLM": Architecture(
        qkv_bias=False, o_bias=False, window="all", eps=1e-5, theta=1e6, max_position=131072,
        mixture="block_sparse_moe", expert=("w1", "w3", "w2"), expert_size="intermediate_size", normalized=True,
    ),
    "MiniMaxM2ForCausalLM": Architecture(
        qkv_bias=False, o_bias=False, qk_norm=True, whole_qk_norm=True, default_head_dim=128, theta=5e6, max_position=196608,
        partial_rotation=True, mixture="block_sparse_moe", expert=("w1", "w3", "w2"), expert_size="intermediate_size",
        normalized=True, sigmoid=True, correction="e_score_correction_bias", ahead_count="num_mtp_modules",
        refused={"scoring_func": (None, "sigmoid")}, defaults={
            "num_key_value_heads": 8, "num_local_experts": 256, "num_experts_per_tok": 8, "bos_token_id": 200034,
            "eos_token_id": 200020,
        },
    ),
    "GptOssForCausalLM": GPT_OSS,
    "GlmForCausalLM": GLM,
    "Glm4ForCausalLM": replace(
        GLM, norms=("post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
        float16=False,  # what its MLPs add goes beyond it, as others found
    ),
    "Glm4MoeForCausalLM": GLM4_MOE,
    "Glm4MoeLiteForCausalLM": GLM4_MOE_LITE,
    "DeepseekV2ForCausalLM": DEEPSEEK_V2,
    "DeepseekV3ForCausalLM": DEEPSEEK_V3,
    "Glm4vMoeForConditionalGeneration": replace(
        GLM4_MOE, qk_norm=False, max_position=65536, text_part=True, defaults={**GLM4_MOE.defaults, "attention_bias": True},
    ),
    "SolarOpenForCausalLM": replace(
        GLM4_MOE, qk_norm=False, sparse="", theta=1e6, default_head_dim=128, partial_rotation=False, ahead_count="",
        defaults={**GLM4_MOE.defaults, "partial_rotary_factor": None, "moe_intermediate_size": 1280},
    ),
    "Dots1ForCausalLM": replace(
        GLM4_MOE, o_bias="attention_bias", qk_norm=True, eps=1e-6, max_position=2048, partial_rotation=False, ahead_count="",
        window="upper", default_window=4096, defaults={
            "moe_intermediate_size": 1408, "first_k_dense_replace": 0, "n_shared_experts": 0, "max_window_layers": 62,
            "use_sliding_window": True,
        },
    ),
    "Ernie4_5ForCausalLM": ERNIE,
    "Ernie4_5_MoeForCausalLM": ERNIE_MOE,
    "Gemma2ForCausalLM": GEMMA2,
    "Gemma3ForCausalLM": GEMMA3,
    "Gemma3ForConditionalGeneration": replace(GEMMA3, text_part=True),
    "Gemma4ForCausalLM": GEMMA4,
    "Gemma4ForConditionalGeneration": replace(GEMMA4, text_part=True),
    "GraniteForCausalLM": Architecture(mlp_bias="mlp_bias", multiplied=True, float16=False),
    "GraniteMoeForCausalLM": Architecture(
        multiplied=True, float16=False, mixture="block_sparse_moe", router="router", expert_size="intermediate_size",
        normalized=True, defaults={"num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "GraniteMoeHybridForCausalLM": Architecture(
        hybrid=True, inner="shared_intermediate_size", multiplied=True, float16=False, unrotated="listed",
        defaults={"num_local_experts": 8},
    ),
    "Olmo2ForCausalLM": OLMO2,
    "Olmo3ForCausalLM": replace(
        OLMO2, window="pattern", theta=5e5, local_theta=5e5,
        defaults={**OLMO2.defaults, "sliding_window": 4096, "sliding_window_pattern": 4},
    ),
    "OlmoeForCausalLM": Architecture(
        qk_norm=True, whole_qk_norm=True, eps=1e-5, max_position=4096, mixture="mlp", expert_size="intermediate_size",
        refused={"clip_qkv": (None,)}, defaults={"num_experts": 64, "num_experts_per_tok": 8, "eos_token_id": 50279},
    ),
    "Exaone4ForCausalLM": EXAONE4,
    "ExaoneMoeForCausalLM": replace(
        EXAONE4, norms=("", "post_attention_layernorm", ""), mixture="mlp", sparse="types", sigmoid=True,
        correction="e_score_correction_bias", shared="shared_experts", shared_count="num_shared_experts", ahead=("mtp.",),
        defaults={
            **EXAONE4.defaults, "bos_token_id": 1, "eos_token_id": 53, "moe_intermediate_size": 1024, "num_experts": 64,
            "num_experts_per_tok": 8, "num_shared_experts": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
        },
    ),
    "HunYuanDenseV1ForCausalLM": HUNYUAN,
    "HunYuanMoEV1ForCausalLM": replace(
        HUNYUAN, mixture="mlp", router="gate.wg", expert_size="intermediate_size", expert_choice="moe_topk", normalized=True,
        shared="shared_mlp", shared_count="num_shared_expert", listed=("num_experts", "moe_topk", "num_shared_expert"),
        refused={
            "use_cla": (None, False), "use_qk_norm": (None, True), "use_mixed_mlp_moe": (None, True),
            "moe_layer_num_skipped": (None, 0),
        },
        defaults={**HUNYUAN.defaults, "num_shared_expert": 1},
    ),
    "ArceeForCausalLM": ARCEE,
    "ApertusForCausalLM": Architecture(
        qk_norm=True, ungated="xielu", input_norm="attention_layernorm", norms=("", "feedforward_layernorm", ""), eps=1e-5,
        theta=1.2e7, max_position=65536, defaults={"bos_token_id": 1, "eos_token_id": 2},
        refused={"qk_norm": (None, True), "post_norm": (None, False)}, rope={
            "rope_type": "llama3", "rope_theta": 1.2e7, "factor": 8.0, "original_max_position_embeddings": 8192,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        },
    ),
    "SeedOssForCausalLM": Architecture(
        o_bias="attention_out_bias", mlp_bias="mlp_bias", default_head_dim=128, max_position=524288,
        defaults={"attention_bias": True},
    ),
    "SmolLM3ForCausalLM": Architecture(
        mlp_bias="mlp_bias", window="unrotated", theta=2e6, max_position=32768, unrotated="listed",
        passed_over=("pretraining_tp",), defaults={"tie_word_embeddings": True},
    ),
    "Mistral3ForConditionalGeneration": Architecture(text_part=True, texts=("mistral", "ministral3")),
    "Lfm2ForCausalLM": LFM2,
    "Lfm2MoeForCausalLM": LFM2_MOE,
    "LlavaForConditionalGeneration": Architecture(text_part=True, texts=("llama", "mistral")),
    "Qwen2VLForConditionalGeneration": QWEN2_VL,
    "Qwen2_5_VLForConditionalGeneration": QWEN2_VL,
    "Qwen3VLForConditionalGeneration": Architecture(
        qk_norm=True, text_part=True, default_head_dim=128, theta=5e5, max_position=128000,
    ),
    "Qwen3VLMoeForConditionalGeneration": Architecture(
        qk_norm=True, text_part=True, tied_by_text=False, theta=5e5, max_position=128000, mixture="mlp", sparse="step",
        normalized=True,
        defaults={"num_key_value_heads": 16, "moe_intermediate_size": 1408, "num_experts_per_tok": 4},
    ),
    "Qwen3_5ForCausalLM": QWEN3_5,
    "Qwen3_5ForConditionalGeneration": replace(QWEN3_5, text_part=True),
    "Qwen3_5MoeForCausalLM": QWEN3_5_MOE,
    "Qwen3_5MoeForConditionalGeneration": replace(QWEN3_5_MOE, text_part=True),
    "Qwen3NextForCausalLM": QWEN3_NEXT,
}  # fmt: skip
TEXTS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    }),
    "mistral": ("MistralForCausalLM", {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }),
    "ministral3": ("Ministral3ForCausalLM", {}),
}  # fmt: skip
"""The family of a text part by its model_type, and transformers' defaults of what files of such models leave out."""
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
# Keys that would change the arithmetic, with the values under which they do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "pretraining_tp": (None, 1),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "use_bidirectional_attention": (None, False),
    "is_causal": (None, True),
}
OF_THE_WHOLE = (
    "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "tie_word_embeddings",
    "quantization_config", "use_bidirectional_attention", "is_causal",
)  # fmt: skip
EXPERTS = ("num_experts", "num_local_experts")  # either has the number of a mixture's experts
DENSE: dict[str, tuple[Any, ...]] = dict.fromkeys(EXPERTS, (None, 0))
ALL_SPARSE: dict[str, tuple[Any, ...]] = {"decoder_sparse_step": (None, 1), "mlp_only_layers": (None, [])}
"""The same of models whose layers have one MLP each, and of those whose layers are all mixtures."""


def headless(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a model's layers alone, as that of many models that make embeddings: MistralModel."""
    match config.get("architectures"):
        case [str(name), *_]:
            return name.endswith("Model") and f"{name.removesuffix('Model')}ForCausalLM" in ARCHITECTURES
    return False


def read_architecture(config: Mapping[str, Any]) -> tuple[str, Architecture, Fields]:
    """(its name, how it differs, the settings of its text with transformers' defaults).

    InputError naming the architecture, key or value that is not supported.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or not names:
        raise InputError(f"config.json: architectures is {names!r}, expected one of {', '.join(ARCHITECTURES)}")
    name = names[0]
    if headless(config):  # nothing is drawn from what the embedding makes of its hidden states
        name, config = f"{name.removesuffix('Model')}ForCausalLM", {**config, "tie_word_embeddings": True}
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise InputError(f"config.json: architecture {name} is not supported; supported are {', '.join(ARCHITECTURES)}")
    kind = ARCHITECTURES[name]
    if kind.text_part:
        kind, config = _text_part(name, kind, config)
    config, own = {**kind.defaults, **config}, {*kind.soft_caps, *kind.passed_over, *(MULTIPLIERS if kind.multiplied else ())}
    if kind.rope and not config.get("rope_parameters") and not config.get("rope_scaling"):
        config["rope_scaling"] = kind.rope
    experts = {} if kind.sparse in ("step", "switched") else ALL_SPARSE if kind.mixture else DENSE
    for key in kind.listed:
        if isinstance(given := config.get(key), list):
            if not given or any(one != given[0] for one in given):
                raise InputError(f"config.json: {key} is {given!r:.60}, and layers that differ in it are not supported in {name}")
            config[key] = given[0]
    for key, allowed in {**NEUTRAL, **experts, **kind.refused}.items():
        if config.get(key) not in allowed and key not in own:
            raise InputError(f"config.json: {key} = {config[key]!r} is not supported for {name}")
    if kind.hybrid:
        config = _attention_alone(name, config)
    if kind.conv:
        config = renamed(kind, config)
    key, known = ("hidden_activation", ("gelu_pytorch_tanh",)) if kind.gelu else ("hidden_act", ("silu", "swish"))
    known = (kind.ungated,) if kind.ungated else known
    if (activation := config.get(key, known[0])) not in known:
        raise InputError(f"config.json: {key} {activation!r} is not supported; supported is {known[0]}")
    return name, kind, Fields(config)


def _text_part(name: str, kind: Architecture, config: Mapping[str, Any]) -> tuple[Architecture, dict[str, Any]]:
    """(its family, what config.json says of it). What it says OF_THE_WHOLE holds for the text part, too."""
    part = config.get("text_config")
    if part is None and not kind.texts and "hidden_size" in config:
        return kind, dict(config)  # as Qwen2-VL was published: everything in one place
    if not isinstance(part, Mapping):
        raise InputError(f"config.json: text_config is {part!r:.60}, expected an object")
    tied = {"tie_word_embeddings": True} if kind.tied_by_text and part.get("tie_word_embeddings") is True else {}
    part = part if kind.tied_by_text else {**part, "tie_word_embeddings": None}
    part = {**part, **{key: config[key] for key in OF_THE_WHOLE if config.get(key) is not None}, **tied}
    if not kind.texts:
        return kind, part
    text = part.get("model_type") or kind.texts[0]
    if text not in kind.texts:
        raise InputError(
            f"config.json: text_config has the model_type {text!r:.60}, which is not supported in {name}; "
            f"supported are {', '.join(kind.texts)}"
        )
    family, defaults = TEXTS[text]
    return ARCHITECTURES[family], {**defaults, **part}


def _attention_alone(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a hybrid model all of whose layers have attention; by position_embedding_type all of them rotate, or none."""
    types = config.get("layer_types")
    if not isinstance(types, list) or not types or not all(one in ("attention", "full_attention") for one in types):
        found = (
            next((one for one in types if one not in ("attention", "full_attention")), None) if isinstance(types, list) else types
        )
        raise InputError(f"config.json: layer_types has {found!r:.60}, and of {name} only layers of attention are supported")
    if (rotation := config.get("position_embedding_type")) not in ("rope", None):
        raise InputError(f"config.json: position_embedding_type is {rotation!r:.60}, expected rope or null")
    return {**config, "layer_types": None, "no_rope_layers": [int(rotation == "rope")] * len(types)}
