"""A conversation told otherwise, for chat templates that refuse it as it came, or leave out a part of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def told_otherwise(messages: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The same, for templates that take no system, or one of each role in turn, and a system's words at the beginning alone."""
    yield from _told_by_the_user(messages)
    if (turns := one_of_each(messages)) is not None:
        yield turns
        yield from _told_by_the_user(turns)


def arguments_as_text(messages: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The same with arguments of calls as JSON text, as OpenAI sends them: some templates know no others. None without calls."""
    if not any(message.get("tool_calls") for message in messages):
        return
    yield [
        {**message, "tool_calls": [_with_text(call) for call in message["tool_calls"]]} if message.get("tool_calls") else message
        for message in messages
    ]


def _with_text(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), Mapping):
        return call
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def one_of_each(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Neighbours of one role joined, and what the system says later told by the user; None: there is nothing of either."""
    groups: list[list[dict[str, Any]]] = []
    begun = changed = False
    for message in messages:
        begun = begun or message.get("role") != "system"
        if begun and message.get("role") == "system":
            message, changed = {**message, "role": "user"}, True
        role, kind = message.get("role"), type(message.get("content"))
        last = groups[-1][-1] if groups else {}
        if role in ("system", "user") and kind in (str, list) and (last.get("role"), type(last.get("content"))) == (role, kind):
            groups[-1].append(message)
        else:
            groups.append([message])
    if len(groups) == len(messages) and not changed:
        return None
    return [one[0] if len(one) == 1 else {**one[0], "content": _joined(one)} for one in groups]


def _told_by_the_user(messages: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The conversation with the system's words before the first user's; none where these two do not stand at its beginning."""
    first = messages[:2]
    kinds = {type(message.get("content")) for message in first}
    if [message.get("role") for message in first] == ["system", "user"] and kinds in ({str}, {list}):
        yield [{**first[1], "content": _joined(first)}, *messages[2:]]


def _joined(messages: Sequence[dict[str, Any]]) -> Any:
    """One content of several, which are all texts or all lists of parts."""
    contents = [message["content"] for message in messages]
    return "\n\n".join(contents) if isinstance(contents[0], str) else [part for content in contents for part in content]


def unsaid(messages: Sequence[dict[str, Any]], text: str) -> bool:
    """Whether something that the system says is not in the text: many templates take its first, or its last message alone."""
    at = 0
    for content in (message.get("content") for message in messages if message.get("role") == "system"):
        for part in content if isinstance(content, list) else [{"text": content}]:
            said = part.get("text") if isinstance(part, Mapping) else None
            if isinstance(said, str) and (at := text.find(said.strip(), at)) < 0:
                return True
    return False
