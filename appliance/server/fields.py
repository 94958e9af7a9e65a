"""Request fields that are not served: which of them are harmless, and which would change the answer and are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from appliance.core.params import RequestError

# Accepted: these cannot change the text of the answer here.
HARMLESS = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prompt_cache_options",
        "parallel_tool_calls",
        "prediction",  # of the answer: it is to make the same one faster
        "stream_interval",
        "include_reasoning",
        "cache_prompt",
        "mm_processor_kwargs",
        "media_io_kwargs",
        "id_slot",
        "guided_decoding_backend",
        "timings_per_token",
        "return_progress",
        "vllm_xargs",  # for extensions of the server, of which there are none
    }
)

_OFF: tuple[object, ...] = (False, "", [], {})  # False == 0, so 0 is among them
_SAMPLER = "this sampler is not supported: use temperature, top_p, top_k, min_p and the penalties"
_MAX_TOKENS = "not supported under this name: use max_tokens"
_TEMPLATE = 'not supported under this name: use chat_template_kwargs, as in {"enable_thinking": false}'
_SYSTEM = "not supported here: send a message with the role system"
_TOOLS = "this older form is not supported: use tools and tool_choice"

# Known, and they would change the answer: field -> (values that ask for nothing, what to do instead).
REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "structural_tag": (_OFF, "structural tags are not supported: use tools, or a grammar"),
    "functions": (_OFF, _TOOLS),
    "function_call": ((*_OFF, "none", "auto"), _TOOLS),
    "suffix": (_OFF, "filling in the middle is not supported: send the prompt alone"),
    "early_stopping": ((*_OFF, "never"), "not supported: a beam search ends when nothing better can come"),
    "logits_processors": (_OFF, "logits processors are not supported: use logit_bias, bad_words or allowed_token_ids"),
    "audio": (_OFF, "audio is not supported: only text is"),
    "modalities": ((*_OFF, ["text"]), "only the modality 'text' is supported"),
    "web_search_options": (_OFF, "web search is not supported: leave it out"),
    "moderation": (_OFF, "moderation is not supported: leave it out"),
    "verbosity": ((*_OFF, "medium"), "verbosity is not supported: ask for it in the prompt"),
    "chat_template": (_OFF, "templates are not taken from requests: start the server with --chat-template"),
    "prompt_embeds": (_OFF, "embeddings as a prompt are not supported: send text or token ids"),
    "kv_transfer_params": (_OFF, "not supported: leave it out"),
    "n_predict": ((), _MAX_TOKENS),
    "num_predict": ((), _MAX_TOKENS),
    "max_new_tokens": ((), _MAX_TOKENS),
    "max_output_tokens": ((), _MAX_TOKENS),
    "stop_sequences": (_OFF, "not supported under this name: use stop"),
    "enable_thinking": ((), _TEMPLATE),
    "thinking": (_OFF, _TEMPLATE),
    "think": ((), _TEMPLATE),
    "reasoning": (_OFF, "not supported under this name: use reasoning_effort"),
    "extra_body": (_OFF, "an argument of OpenAI's client, which takes it out: what it holds belongs in the request itself"),
    "system": (_OFF, _SYSTEM),
    "instructions": (_OFF, _SYSTEM),
    "random_seed": ((), "not supported under this name: use seed"),
    "num_beams": ((1,), 'not supported under this name: use "use_beam_search": true, and n'),
    "format": (_OFF, "not supported under this name: use response_format"),
    "n_probs": (_OFF, "not supported under this name: use logprobs"),
    "repeat_penalty": ((1, 1.0), "not supported under this name: use repetition_penalty"),
    "mirostat": (_OFF, _SAMPLER),
    "mirostat_mode": (_OFF, _SAMPLER),
    "typical_p": ((1, 1.0), _SAMPLER),
    "tfs_z": ((1, 1.0), _SAMPLER),
    "top_a": (_OFF, _SAMPLER),
    "top_n_sigma": ((-1, -1.0), _SAMPLER),
    "dynatemp_range": (_OFF, _SAMPLER),
    "dry_multiplier": (_OFF, _SAMPLER),
    "xtc_probability": (_OFF, _SAMPLER),
}


# The same of embeddings.
_WRITTEN = "write what the model is to make of a text before the text itself: nothing is put there by name"
REFUSED_OF_EMBEDDINGS: dict[str, tuple[tuple[object, ...], str]] = {
    "messages": ((), "conversations have no embeddings here: send input"),
    "input_type": (_OFF, _WRITTEN),
    "prompt_name": (_OFF, _WRITTEN),
    "instruction": (_OFF, _WRITTEN),
    "task": (_OFF, _WRITTEN),
    "embed_dtype": ((*_OFF, "float32"), "embeddings are float32 here"),
    "endianness": ((*_OFF, "native", "little"), "the lowest byte comes first here"),
    "images": (_OFF, "only texts have embeddings here"),
}


def refuse(fields: Mapping[str, Any], table: Mapping[str, tuple[tuple[object, ...], str]] = REFUSED) -> None:
    """Raise RequestError for the first field that would change the answer and cannot be served."""
    for name, value in fields.items():
        if name in table and value not in table[name][0]:
            raise RequestError(f"{name}: {table[name][1]}", param=name, code="unsupported_parameter")


def unknown(fields: Mapping[str, Any]) -> list[str]:
    """Names that are in neither list."""
    return [name for name in fields if name not in HARMLESS and name not in REFUSED]
