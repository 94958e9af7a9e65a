"""A conversation as clients send it, made into the plain data that chat templates are written for."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from typing import Any

from appliance.core.params import RequestError

_REASONING = ("reasoning_content", "thinking", "reasoning")


def plain_messages(messages: Sequence[Any], convert: Callable[[Any], Any]) -> list[dict[str, Any]]:
    """Fresh copies of the messages: text content in the form ``convert`` gives it, tool arguments as objects.

    Nothing in them is null: clients send back what they got, and templates ask whether a field is there.
    Raises RequestError naming the message that is not one, or whose content is not text.
    """
    if isinstance(messages, str | Mapping) or not messages:
        raise RequestError(
            "messages must be a list of at least one message such as {'role': 'user', 'content': 'Hi'}", param="messages"
        )
    return [_message(index, message, convert) for index, message in enumerate(messages)]


def join_parts(content: Any) -> Any:
    """Content as one string, its parts a line each; for templates that know nothing else."""
    return "\n".join(part["text"] for part in content) if isinstance(content, list) else content


def split_parts(content: Any) -> Any:
    """Content as a list of parts; for templates that know nothing else."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def one_call_each(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation for templates that write one call a message (gpt-oss), and either text or a thought beside it.

    Calls that were made at once become turns of their own, each with its result.
    """
    told: list[dict[str, Any]] = []
    rest = deque(messages)
    while rest:
        message = rest.popleft()
        calls = message.get("tool_calls") if message["role"] == "assistant" else None
        if not calls:
            told.append(message)
            continue
        if (thought := message.get("thinking")) and (text := message["content"]):
            said = f"{thought}\n\n{text}"
            message = {**message, "thinking": said, "reasoning_content": said, "content": ""}
        results = []
        while rest and rest[0]["role"] == "tool":
            results.append(rest.popleft())
        for call in calls[:-1]:
            call_id = call.get("id") if isinstance(call, Mapping) else None
            its = [one.get("tool_call_id") == call_id for one in results]
            told += [{**message, "tool_calls": [call]}, *compress(results, its)]
            results = [one for one, told_ in zip(results, its, strict=True) if not told_]
            message = {"role": "assistant", "content": ""}
        told += [{**message, "tool_calls": calls[-1:]}, *results]
    return told


def calls_as_text(messages: Sequence[dict[str, Any]], write: Callable[[Sequence[tuple[str, str]]], str]) -> list[dict[str, Any]]:
    """The conversation for templates that know no calls: in the text, as the model wrote them. ``write`` names and arguments."""
    told = []
    for message in messages:
        functions = [call.get("function") for call in message.get("tool_calls", ()) if isinstance(call, Mapping)]
        calls = [
            (
                str(one.get("name")),
                json.dumps(given if isinstance(given := one.get("arguments"), Mapping) else {}, ensure_ascii=False),
            )
            for one in functions
            if isinstance(one, Mapping)
        ]
        if calls and isinstance(message["content"], str):
            message = {**message, "content": message["content"] + write(calls)}
        told.append(message)
    return told


def _message(index: int, message: Any, convert: Callable[[Any], Any]) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"{where} must be an object with a 'role', got {message!r:.80}", param=where)
    plain = {name: value for name, value in message.items() if value is not None and (name != "tool_calls" or value)}
    if "content" not in plain and message["role"] not in (
        "assistant",
        "tool",
    ):  # of these nothing can come; of a user it is a slip
        raise RequestError(f"{where}.content must be text or a list of text parts, got nothing", param=f"{where}.content")
    if plain.get("images"):  # as Ollama's clients send them
        raise RequestError(f"{where}.images: this model reads text only", param=f"{where}.images")
    plain["content"] = convert(_text(plain.get("content", ""), f"{where}.content"))
    if plain["role"] == "developer":  # a system message by another name, which templates do not know
        plain["role"] = "system"
    reasoning = next((plain[name] for name in _REASONING if name in plain), None)
    if reasoning is not None:  # templates read it under either name, clients send it under all three
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    calls = plain.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise RequestError(f"{where}.tool_calls must be a list, got {type(calls).__name__}", param=f"{where}.tool_calls")
    if calls:
        plain["tool_calls"] = [_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return plain


def _text(content: Any, where: str) -> Any:
    """A string as it is; a list as text parts, a refusal among them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be text or a list of text parts, got {type(content).__name__}", param=where)
    parts = [_part(part) for part in content]
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RequestError(
                f"{where}[{i}] is of type {kind!r}: this model reads {{'type': 'text', 'text': ...}} only", param=where
            )
    return [dict(part) for part in parts]


def _part(part: Any) -> Any:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    refused = isinstance(part, Mapping) and part.get("type") == "refusal"
    return {"type": "text", "text": part.get("refusal")} if refused else part


def _tool_call(call: Any, where: str) -> Any:
    """OpenAI sends a function's arguments as JSON text; templates write them as an object."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError) as error:  # ValueError also for integers of thousands of digits
        raise RequestError(f"{where}.function.arguments is not JSON: {error}", param=where) from None
    return {**call, "function": {**function, "arguments": arguments}}
