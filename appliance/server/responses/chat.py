"""A body as the chat request that does the same, and chat's errors in the names of this API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from appliance.core.params import RequestError
from appliance.server.responses.schemas import InputTokensRequest, ResponsesRequest
from appliance.server.responses.tools import functions, placed
from appliance.server.schemas import ChatRequest, SamplingFields, build

# What fields are called here: chat's name -> OpenAI's in responses. The longest that fits counts.
NAMES = {
    "response_format.json_schema.schema": "text.format.schema",
    "response_format": "text.format",
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "allowed_tools.tools": "tools",
}
OWN = ("stream_options", "max_tokens", "response_format", "stream")  # of the fields shared with chat, what is said otherwise


def chat_request(body: InputTokensRequest, messages: list[dict[str, Any]]) -> ChatRequest:
    """Raises RequestError naming the body's field."""
    same = [name for name in SamplingFields.model_fields if name in body.model_fields_set and name not in OWN]
    fields: dict[str, Any] = {
        **{name: getattr(body, name) for name in (*same, "chat_template_kwargs", "documents", "parallel_tool_calls")},
        "messages": messages,
        "tools": None if body.tools is None else functions(body.tools),
        "tool_choice": _choice(body.tool_choice),
        "response_format": _format(body.text.format),
        "reasoning_effort": body.reasoning.effort,
    }
    if isinstance(body, ResponsesRequest):
        fields |= {"max_completion_tokens": body.max_output_tokens}
        fields |= {"logprobs": body.scored, "top_logprobs": body.top_logprobs} if body.scored else {}
    return build(ChatRequest, fields)


def renamed(error: RequestError, body: InputTokensRequest) -> RequestError:
    """An error of what chat shares, with the names that fields have here."""
    error = placed(error, body.tools)
    param = error.param or ""
    name = next((there + param[len(here) :] for here, there in NAMES.items() if param.startswith(here)), param)
    name = name.replace(".function.", ".") if name.startswith("tool") else name
    if name == param:
        return error
    return RequestError(str(error).replace(param, name, 1), param=name, code=error.code, status=error.status)


def _choice(choice: Any) -> Any:
    if not isinstance(choice, Mapping):
        return choice
    match choice.get("type", "function"):
        case "function":
            return {"type": "function", "function": {name: value for name, value in choice.items() if name != "type"}}
        case "allowed_tools":
            tools = choice.get("tools")
            return {
                "type": "allowed_tools",
                "allowed_tools": {"mode": choice.get("mode"), "tools": functions(tools, "tool_choice.tools")},
            }
        case kind:
            message = f"tool_choice is of type {kind!r:.80}, which OpenAI runs itself: here are functions only"
            raise RequestError(message, param="tool_choice", code="unsupported_parameter")


def _format(form: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """``text.format`` as chat has it: name and schema in an object of their own."""
    if form is None or form.get("type") != "json_schema":
        return None if form is None else dict(form)
    return {"type": "json_schema", "json_schema": {name: value for name, value in form.items() if name != "type"}}
