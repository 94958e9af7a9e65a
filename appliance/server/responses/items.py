"""Items, of which an input and an output are made, and the messages that chat templates are written for.

An item is kept in the shape in which OpenAI lists it: with an id, content as parts, a status.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from appliance.core.params import RequestError
from appliance.server.responses.tools import shown

Item = dict[str, Any]
ROLES = ("user", "assistant", "system", "developer")
KINDS = ("message", "function_call", "function_call_output", "reasoning", "item_reference")
TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}  # of a part: type -> its key
MAX_ITEMS = 8192  # of an input: about 10 microseconds each, in which nobody else is answered
PREFIX = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


def new_id(kind: str) -> str:
    return f"{PREFIX[kind]}_{uuid.uuid4().hex}"


def text_part(text: str, logprobs: Sequence[Any] = ()) -> Item:
    """What an assistant's message consists of."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def items_of(given: Any, known: Callable[[str], Item | None], history: Sequence[Item]) -> list[Item]:
    """An ``input`` as items. ``known``: an item that is kept, by its id; ``history``: the items before. Raises RequestError."""
    if given is None or isinstance(given, str):
        given = [{"role": "user", "content": given}] if given else []
    if not isinstance(given, list):
        _refuse("input", f"must be text or a list of items, got {type(given).__name__}")
    if len(given) > MAX_ITEMS:
        _refuse("input", f"has {len(given)} items: at most {MAX_ITEMS} are taken")
    calls = {item["call_id"] for item in history if item["type"] == "function_call"}
    found, referred = [], set[str]()
    for i, one in enumerate(given):
        item = _item(one, f"input[{i}]", known, referred)
        if item["type"] == "function_call":
            calls.add(item["call_id"])
        elif item["type"] == "function_call_output" and item["call_id"] not in calls:
            _refuse(
                f"input[{i}].call_id", f"is {item['call_id']!r:.80}, and there is no function_call before it with that call_id"
            )
        found.append(item)
    if not found and not history:
        _refuse("input", "is required: text or a list of items", "missing_required_parameter")
    return found


def _item(given: Any, where: str, known: Callable[[str], Item | None], referred: set[str]) -> Item:
    """``referred``: ids of the references so far. An item that came again and again would make a small body any size."""
    if not isinstance(given, Mapping):
        _refuse(where, f"must be an item such as {{'role': 'user', 'content': 'Hi'}}, got {given!r:.80}")
    given = {name: value for name, value in given.items() if value is not None}
    kind = given.get("type") or ("message" if "role" in given else "item_reference" if "id" in given else None)
    if kind not in KINDS:
        _refuse(f"{where}.type", f"is {kind!r:.80}: there is {', '.join(KINDS)}", "unsupported_parameter")
    if kind == "item_reference":
        item = known(_needed(given, "id", where))
        if item is None:
            _refuse(f"{where}.id", f"is {given['id']!r:.80}: no item of that id is kept here", "item_not_found")
        if given["id"] in referred:
            _refuse(f"{where}.id", f"is {given['id']!r:.80}: the input has that item already")
        referred.add(given["id"])
        return item
    head = {"id": given.get("id") if isinstance(given.get("id"), str) else new_id(kind), "type": kind}
    match kind:
        case "message":
            return head | _message(given, where)
        case "function_call":
            namespace = ("namespace",) if "namespace" in given else ()
            named = {name: _needed(given, name, where) for name in ("call_id", *namespace, "name", "arguments")}
            return {**head, **named, "status": "completed"}
        case "function_call_output":
            output = given.get("output")
            texts = output if isinstance(output, str) else [_part(*one) for one in _parts(output, f"{where}.output")]
            return {**head, "call_id": _needed(given, "call_id", where), "output": texts, "status": "completed"}
    parts = [(text, "reasoning_text") for text in _thoughts(given, "content", where)]
    summary = [{"type": "summary_text", "text": text} for text in _thoughts(given, "summary", where)]
    if not parts and not summary and given.get("encrypted_content"):
        _refuse(
            f"{where}.encrypted_content", "cannot be read here: send the item's content, or leave it out", "unsupported_parameter"
        )
    return {
        **head,
        "summary": summary,
        "content": [{"type": kind_, "text": text} for text, kind_ in parts],
        "status": "completed",
    }


def _message(given: Mapping[str, Any], where: str) -> Item:
    role, content = given.get("role"), given.get("content")
    if role not in ROLES:
        _refuse(f"{where}.role", f"is {role!r:.80}: there is {', '.join(ROLES)}")
    if isinstance(content, str):
        content = [{"type": "input_text", "text": content}]
    parts = [_part(*one) for one in _parts(content, f"{where}.content")]
    if role == "assistant":
        parts = [text_part(part["text"]) for part in parts]
    return {"role": role, "status": "completed", "content": parts}


def _parts(content: Any, where: str) -> list[tuple[Any, str]]:
    """(part, place) of each."""
    if not isinstance(content, list):
        _refuse(where, f"must be text or a list of parts, got {'nothing' if content is None else type(content).__name__}")
    return [(part, f"{where}[{i}]") for i, part in enumerate(content)]


def _part(part: Any, where: str) -> Item:
    if not isinstance(part, Mapping):
        _refuse(where, f"must be a part such as {{'type': 'input_text', 'text': 'Hi'}}, got {part!r:.80}")
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in TEXTS:
        _refuse(where, f"is of type {kind!r:.80}: this model reads 'input_text' and 'output_text' only", "unsupported_parameter")
    return {"type": "input_text", "text": _needed(part, TEXTS[kind], where)}


def _thoughts(given: Mapping[str, Any], name: str, where: str) -> list[str]:
    found = given.get(name) or []
    if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
        _refuse(f"{where}.{name}", f"must be a list of parts with a text, got {found!r:.80}")
    return [_needed(one, "text", f"{where}.{name}[{i}]") for i, one in enumerate(found)]


def _needed(given: Mapping[str, Any], name: str, where: str) -> str:
    value = given.get(name)
    if not isinstance(value, str):
        code = None if name in given else "missing_required_parameter"
        _refuse(f"{where}.{name}", f"must be text, got {'nothing' if value is None else repr(value)[:80]}", code)
    return value


def _refuse(where: str, message: str, code: str | None = None) -> NoReturn:
    raise RequestError(f"{where} {message}", param=where, code=code)


def messages_of(instructions: str | None, items: Sequence[Item]) -> list[dict[str, Any]]:
    """The conversation: reasoning, text and calls of one turn are one message, and what the system says first is one."""
    messages: list[dict[str, Any]] = []
    first = [instructions] if instructions else []  # what the system says first: thousands of texts are joined once
    for item in items:
        last: dict[str, Any] = messages[-1] if messages else {"role": None}
        match item["type"]:
            case "message":
                text = _joined(item["content"])
                role = "system" if item["role"] == "developer" else item["role"]
                if role == "system" and not messages:
                    first.append(text)
                elif role == "assistant" and last["role"] == role and not last["content"] and "tool_calls" not in last:
                    last["content"] = text  # behind its reasoning
                else:
                    messages.append({"role": role, "content": text})
            case "reasoning":
                if text := _joined(item["content"] or item["summary"]):
                    messages.append({"role": "assistant", "content": "", "reasoning_content": text})
            case "function_call":
                if last["role"] != "assistant":
                    messages.append(last := {"role": "assistant", "content": ""})
                function = {"name": shown(item.get("namespace"), item["name"]), "arguments": item["arguments"]}
                last.setdefault("tool_calls", []).append({"id": item["call_id"], "type": "function", "function": function})
            case "function_call_output":
                output = item["output"]
                text = output if isinstance(output, str) else _joined(output)
                messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": text})
    return [*([{"role": "system", "content": "\n\n".join(first)}] if first else []), *messages]


def _joined(parts: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(part["text"] for part in parts)
