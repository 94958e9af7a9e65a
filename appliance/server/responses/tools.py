"""Tools, of which some stand in namespaces: for the model these are functions, too, whose names begin with the namespace's.

OpenAI's web search is left out: no answer has to use it, and Codex offers it of its own accord. Its other tools are refused:
an answer may be meant to come from these (from files, say).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from appliance.core.params import RequestError

Shown = Mapping[str, Mapping[str, str]]
"""What a function that the model knows by a name is called in an item: its own name, and that of its namespace."""


def shown(namespace: str | None, name: str) -> str:
    """The name of a function that the model knows it by."""
    if not namespace:
        return name
    return f"{namespace}{name}" if namespace.endswith("_") or name.startswith("_") else f"{namespace}__{name}"


def left_out(tool: Any) -> bool:
    """Whether it is OpenAI's web search, under any of its names."""
    return isinstance(tool, Mapping) and str(tool.get("type")).startswith("web_search")


def functions(tools: Any, field: str = "tools") -> list[dict[str, Any]]:
    """As chat has them. Raises RequestError with the place."""
    return [tool for _, tool, _ in _each(tools, field)]


def namespaced(tools: Any) -> Shown:
    """Of the functions that stand in namespaces."""
    return {tool["function"]["name"]: {"namespace": one, "name": own} for _, tool, (one, own) in _each(tools or []) if one}


def placed(error: RequestError, tools: Any) -> RequestError:
    """An error of one of ``functions``, at the place where that stands in ``tools``."""
    found = re.match(r"tools\[(\d+)\]", error.param or "")
    if found is None or (place := [place for place, _, _ in _each(tools)][int(found[1])]) == found[0]:
        return error
    param, text = (told.replace(found[0], place, 1) for told in (error.param or "", str(error)))
    return RequestError(text, param=param, code=error.code, status=error.status)


def _each(tools: Any, field: str = "tools") -> Iterator[tuple[str, dict[str, Any], tuple[str, str]]]:
    """(place, as chat has it, (namespace or "", own name)) of each function."""
    if not isinstance(tools, list):
        raise RequestError(f"{field} must be a list, got {type(tools).__name__}", param=field)
    for i, tool in enumerate(tools):
        where = f"{field}[{i}]"
        if left_out(tool):
            continue
        if not isinstance(tool, Mapping) or tool.get("type") != "namespace":
            yield where, as_chat(tool, where), ("", "")
            continue
        name, inner, about = tool.get("name"), tool.get("tools"), tool.get("description")
        if not isinstance(name, str) or not name:
            raise RequestError(f"{where}.name must be text, got {name!r:.80}", param=f"{where}.name")
        if not isinstance(inner, list):
            raise RequestError(f"{where}.tools must be a list of functions, got {inner!r:.80}", param=f"{where}.tools")
        if not isinstance(about, str | None):
            raise RequestError(f"{where}.description must be text, got {about!r:.80}", param=f"{where}.description")
        for k, one in enumerate(inner):
            function = (found := as_chat(one, f"{where}.tools[{k}]"))["function"]
            if isinstance(own := function.get("name"), str) and own:  # or it is refused with all others
                function["name"] = shown(name, own)
            if k == 0 and about:  # which is for the model, too
                function["description"] = f"{about}\n\n{function.get('description') or ''}".rstrip()
            yield f"{where}.tools[{k}]", found, (name, str(own))


def as_chat(tool: Any, where: str) -> dict[str, Any]:
    """OpenAI has the fields of a function beside its type here, and in an object of their own in chat."""
    if not isinstance(tool, Mapping):
        raise RequestError(f"{where} must be {{'type': 'function', 'name': ...}}, got {tool!r:.80}", param=where)
    if (kind := tool.get("type", "function")) != "function":
        message = f"{where} is of type {kind!r:.80}: only functions are taken here ('type': 'function'), which the client runs"
        raise RequestError(message, param=where, code="unsupported_parameter")
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}
