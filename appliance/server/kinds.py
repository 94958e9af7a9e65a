"""Fields of bodies that are checked by hand, and so have to be described by hand."""

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
