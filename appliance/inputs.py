"""What LLM takes: prompts in all their forms, with errors that name what was found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Number
from operator import index
from typing import Any

from appliance.core.params import BeamSearchParams, RequestError, SamplingParams, check_logprobs
from quant.errors import InputError

Prompt = str | Sequence[int] | Mapping[str, Any]

FORMS = "text, a list of token ids, {'prompt': text} or {'prompt_token_ids': ids}"
KEYS = ("prompt", "prompt_token_ids", "cache_salt")
MESSAGES = "a list of messages such as {'role': 'user', 'content': 'Hi'}"


def prompt_list(prompts: Any) -> list[Prompt]:
    """One prompt or several, as a list. Raises RequestError for what is neither."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if isinstance(prompts, bytes | bytearray) or not isinstance(prompts, Iterable) or getattr(prompts, "ndim", 1) != 1:
        raise RequestError(f"prompts cannot be {_found(prompts)}: give {FORMS}, or a list of these", param="prompt")
    many = _plain(prompts)
    return [many] if many and isinstance(many[0], Number) else many


def read_prompt(prompt: Any) -> tuple[str | None, list[int] | None, str]:
    """(text, token ids, cache_salt) of one prompt; text or ids are there. Raises RequestError naming what is wrong."""
    if isinstance(prompt, str):
        return prompt, None, ""
    if not isinstance(prompt, Mapping):
        return None, token_ids("prompt", prompt), ""
    if all(prompt.get(key) is None for key in KEYS[:2]):
        raise RequestError(f"a prompt needs 'prompt' or 'prompt_token_ids', found {[*prompt]!r:.80}", param="prompt")
    unknown = [key for key, value in prompt.items() if key not in KEYS and value is not None]
    if unknown:
        raise RequestError(f"a prompt has no {unknown[0]!r}: it may hold {', '.join(map(repr, KEYS))}", param="prompt")
    text, ids, salt = (prompt.get(key) for key in KEYS)
    if text is not None and not isinstance(text, str):
        raise RequestError(f"'prompt' must be text, found {_found(text)}", param="prompt")
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise RequestError(f"cache_salt must be text that is not empty, got {salt!r:.80}", param="cache_salt")
    return text, None if ids is None else token_ids("prompt_token_ids", ids), salt or ""


def token_ids(name: str, values: Any) -> list[int]:
    """As Python's integers, whatever integers they are (numpy's, torch's): the kernels read them as they lie in memory."""
    if isinstance(values, str | bytes | bytearray | Mapping) or not isinstance(values, Iterable):
        raise RequestError(f"{name} cannot be {_found(values)}: give {FORMS}", param="prompt")
    if getattr(values, "ndim", 1) != 1:
        raise RequestError(f"{name} cannot be {_found(values)}: give a list of token ids for each prompt", param="prompt")
    return [_token_id(f"{name}[{place}]", value) for place, value in enumerate(_plain(values))]


def params_list(params: Any, number: int, default: SamplingParams, max_logprobs: int) -> list[SamplingParams]:
    """One for each of ``number`` prompts: ``default`` for None. Raises InputError where they are too few, or do not do."""
    if params is None or isinstance(params, SamplingParams):
        return [_checked(default if params is None else params, max_logprobs)] * number
    if isinstance(params, BeamSearchParams):
        raise InputError("sampling_params cannot be BeamSearchParams: give them to beam_search()")
    if not isinstance(params, list | tuple):
        raise InputError(f"sampling_params cannot be {_found(params)}: give SamplingParams(...), or a list of them")
    wrong = next((one for one in params if not isinstance(one, SamplingParams)), params)
    if wrong is not params:
        raise InputError(f"sampling_params holds {_found(wrong)}: give SamplingParams(...) for each prompt")
    if len(params) != number:
        raise InputError(f"{len(params)} sampling_params for {number} prompts: give one for all, or one for each")
    return [_checked(one, max_logprobs) for one in params]


def _checked(given: SamplingParams, max_logprobs: int) -> SamplingParams:
    params = given.checked()
    for name in ("logprobs", "prompt_logprobs"):
        check_logprobs(name, getattr(params, name), max_logprobs, "max_logprobs of the LLM")
    return params


def beam_params(params: Any) -> BeamSearchParams:
    """Raises InputError where they are something else."""
    if isinstance(params, SamplingParams):
        raise InputError("params cannot be SamplingParams: give them to generate(), or BeamSearchParams here")
    if not isinstance(params, BeamSearchParams):
        raise InputError(f"params cannot be {_found(params)}: give BeamSearchParams(beam_width=..., max_tokens=...)")
    return replace(params)


def rank_list(priority: Any, number: int) -> list[Any]:
    """One for each of ``number`` prompts: 0 for None. Raises InputError where they are too few, or no list."""
    if priority is None:
        return [0] * number
    if isinstance(priority, str | bytes | Mapping) or not isinstance(priority, Iterable):
        raise InputError(f"priority cannot be {_found(priority)}: give a list with an integer for each prompt")
    ranks = list(priority)
    if len(ranks) != number:
        raise InputError(f"{len(ranks)} priorities for {number} prompts: give one for each")
    return ranks


def conversation_list(messages: Any) -> list[list[Any]]:
    """One conversation or several, as a list of them. Raises RequestError for what is neither; messages are not looked at."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise RequestError(f"messages cannot be {_found(messages)}: give {MESSAGES}, or a list of such lists", param="messages")
    many = list(messages)
    if not many or isinstance(many[0], Mapping):
        return [many]
    for place, one in enumerate(many):
        if isinstance(one, str | bytes) or not isinstance(one, Sequence):
            raise RequestError(f"messages[{place}] is {_found(one)}: give {MESSAGES}, or a list of such lists", param="messages")
    return [list(one) for one in many]


def template_arguments(given: Any) -> dict[str, Any]:
    """What chat_template_kwargs holds. Raises InputError for what is no dict of names, or an argument of chat()."""
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise InputError(f"chat_template_kwargs cannot be {_found(given)}: give a dict of the template's variables by name")
    taken = sorted({"add_generation_prompt", "continue_final_message", "tools"} & given.keys())
    if taken:
        raise InputError(f"chat_template_kwargs holds {taken[0]!r}: give it as an argument of chat()")
    return dict(given)


def _plain(values: Any) -> list[Any]:
    """Entries of an array or a tensor become Python's numbers; whatever else iterates keeps its own."""
    values = values.tolist() if hasattr(values, "tolist") else values
    return [one.tolist() if getattr(one, "ndim", None) == 0 else one for one in values]


def _token_id(where: str, value: Any) -> int:
    try:
        if not isinstance(value, bool):
            return index(value)
    except TypeError:
        pass
    raise RequestError(f"{where} is {_found(value)}: token ids are integers", param="prompt")


def _found(value: Any) -> str:
    """A value for an error: its type, and its shape or the beginning of what it looks like."""
    kind = type(value).__name__
    shape = getattr(value, "shape", None)
    return f"an array of shape {tuple(shape)} ({kind})" if shape is not None else f"{value!r:.60} ({kind})"
