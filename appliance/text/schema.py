"""JSON schemas, without what says nothing of the values that fit them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NOTES = frozenset({"description", "title", "default", "examples", "$comment"})
"""Keywords that constrain nothing."""
# Keywords with values that rule nothing out, as zod writes them, and formats that llguidance follows.
_IDLE: dict[str, tuple[object, ...]] = {
    "propertyNames": ({}, True, {"type": "string"}),
    "uniqueItems": (False,),
    "unevaluatedProperties": (True, {}),
}
_FORMATS = ("date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid")
# What holds schemas by names, and what is a schema or a list of them.
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_WITHIN = frozenset({"items", "prefixItems", "additionalProperties", "additionalItems", "anyOf", "allOf", "oneOf"})


def constraining(schema: Any, *, formats: bool) -> Any:
    """``formats``: those that cannot be followed stay, so that they are refused; else they are notes. Raises RecursionError."""
    if isinstance(schema, list):
        return [constraining(one, formats=formats) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, Mapping):
            kept[key] = {name: constraining(one, formats=formats) for name, one in value.items()}
        elif key not in NOTES and value not in _IDLE.get(key, ()) and (formats or key != "format" or value in _FORMATS):
            kept[key] = constraining(value, formats=formats) if key in _WITHIN else value
    return kept
