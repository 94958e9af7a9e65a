"""tools and tool_choice, in the form that chat has them in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from appliance.server.messages.schemas import CountRequest, wrong


def chat_tools(body: CountRequest, known: set[str]) -> dict[str, Any]:
    """tools and tool_choice in OpenAI's form. Of those to be loaded late only the ``known`` ones count."""
    tools = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(body.tools or ())]
    names = [tool["function"]["name"] for tool in tools]
    seen: set[str] = set()
    for i, name in enumerate(names):
        if name in seen:
            wrong(f"tools[{i}].name", f"is that of another tool, too: {name!r:.80}")
        seen.add(name)
    choice, late = body.tool_choice, [bool(tool.get("defer_loading")) for tool in body.tools or ()]
    if choice is not None and choice.name:
        known = known | {choice.name}
    found: dict[str, Any] = {
        "tools": [t for t, name, later in zip(tools, names, late, strict=True) if not later or name in known]
    }
    if choice is None:
        return found
    if choice.type != "tool":
        if choice.type == "any" and not names:
            wrong("tool_choice", "'any' needs tools")
        form: Any = {"any": "required"}.get(choice.type, choice.type)
    elif choice.name is None:
        wrong("tool_choice.name", "is required where type is 'tool'", "missing_required_parameter")
    elif choice.name not in seen:
        wrong("tool_choice.name", f"is {choice.name!r:.80}, tools are: {', '.join(names) or 'none':.500}")
    else:
        form = {"type": "function", "function": {"name": choice.name}}
    return {**found, "tool_choice": form, "parallel_tool_calls": not choice.disable_parallel_tool_use}


def _tool(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    kind, name, schema = tool.get("type") or "custom", tool.get("name"), tool.get("input_schema")
    if kind != "custom":
        message = f"is of type {kind!r:.80}, which is Anthropic's own: declare a tool with name, description and input_schema"
        wrong(where, message, "unsupported_parameter")
    if not isinstance(name, str) or not name:
        wrong(f"{where}.name", f"must be text, got {name!r:.80}")
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        wrong(f"{where}.input_schema", f"must be a JSON schema of type 'object', got {schema!r:.80}")
    if not isinstance(tool.get("description") or "", str):
        wrong(f"{where}.description", f"must be text, got {tool['description']!r:.80}")
    if not isinstance(strict := tool.get("strict") or False, bool):
        wrong(f"{where}.strict", f"must be true or false, got {strict!r:.80}")
    function = {"name": name, "description": tool.get("description") or "", "parameters": {"type": "object", **schema}}
    return {"type": "function", "function": {**function, "strict": True} if strict else function}
