"""Fields of bodies that are checked by hand, and so have to be described by hand, for ``/openapi.json``."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import WithJsonSchema

_TEXT, _IDS = {"type": "string"}, {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPTS = {"type": "array", "items": {"anyOf": [_TEXT, _IDS]}, "minItems": 1}
Prompts = Annotated[Any, WithJsonSchema({"anyOf": [_TEXT, _IDS, _PROMPTS]})]
Stop = Annotated[Any, WithJsonSchema({"anyOf": [_TEXT, {"type": "array", "items": _TEXT}, {"type": "null"}]})]
_FUNCTION = {
    "type": "object",
    "properties": {"name": _TEXT, "description": _TEXT, "parameters": {"type": "object"}},
    "required": ["name"],
}
_TOOL = {"type": "object", "properties": {"type": {"const": "function"}, "function": _FUNCTION}, "required": ["function"]}
Tools = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "array", "items": _TOOL}, {"type": "null"}]})]
_NAMED = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {"type": "object", "properties": {"name": _TEXT}, "required": ["name"]},
    },
    "required": ["function"],
}
ToolChoice = Annotated[Any, WithJsonSchema({"anyOf": [{"enum": ["auto", "none", "required", None]}, _NAMED]})]

_MESSAGE = {
    "type": "object",
    "properties": {
        "role": _TEXT,
        "content": {"anyOf": [_TEXT, {"type": "array", "items": {"type": "object", "required": ["type"]}}, {"type": "null"}]},
    },
}
Messages = Annotated[list[dict[str, Any]], WithJsonSchema({"type": "array", "items": _MESSAGE})]

# Numbers, by the name that they have in all bodies; what reads them is SamplingParams, ``sampling.py`` and the like.
MAX_COMPLETIONS = 1024  # of a request: of all its prompts
_PENALTY: dict[str, float] = {"minimum": -2, "maximum": 2}
RANGES: dict[str, dict[str, float]] = {
    "n": {"minimum": 1, "maximum": MAX_COMPLETIONS},
    "best_of": {"minimum": 1, "maximum": MAX_COMPLETIONS},
    "temperature": {"minimum": 0},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"minimum": -1},
    "min_p": {"minimum": 0, "maximum": 1},
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "repetition_penalty": {"minimum": 0.001, "maximum": 1000},
    "length_penalty": {"minimum": -10, "maximum": 10},
    "seed": {"minimum": -(2**63), "maximum": 2**64 - 1},
    "max_tokens": {"minimum": 0},
    "max_completion_tokens": {"minimum": 1},
    "min_tokens": {"minimum": 0},
    "logprobs": {"minimum": -1},
    "top_logprobs": {"minimum": -1},
    "prompt_logprobs": {"minimum": -1},
    "truncate_prompt_tokens": {"minimum": -1},
}
