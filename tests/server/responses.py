"""What the tests of /v1/responses share: its events put together, and questions asked both ways."""

from __future__ import annotations

import json
from typing import Any

from tests.server.conftest import Served

TOOL: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
NESTED = {"type": "function", "function": {name: value for name, value in TOOL.items() if name != "type"}}
CALL_OF_ROME = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'


def say(served: Served, text: str, seed: int = 0) -> None:
    served.client.say(text, seed)  # type: ignore[attr-defined]


def told(text: str) -> list[dict[str, Any]]:
    """The events of a stream; the names of events are their types, and their numbers have no gaps."""
    found = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}" and event["sequence_number"] == len(found)
        found.append(event)
    return found


def plain(value: Any) -> Any:
    """Without what is another one each time."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in ("id", "call_id", "created_at", "completed_at")}
    return value


def summed(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items of a stream, put together from its deltas alone, and every event in its place."""
    items: list[dict[str, Any]] = []
    opened = -1
    for event in events:
        kind, index = event["type"].removeprefix("response."), event.get("output_index")
        if index is None:
            continue
        if kind == "output_item.added":
            assert opened == -1 and index == len(items) and event["item"]["status"] == "in_progress"
            items.append(event["item"])
            opened = index
            continue
        item = items[index]
        assert opened == index
        if kind == "output_item.done":
            assert event["item"] == {**item, "status": event["item"]["status"]}
            items[index], opened = event["item"], -1
            continue
        assert event["item_id"] == item["id"]
        part = item["content"][event["content_index"]] if event.get("content_index") is not None and item["content"] else None
        match kind:
            case "content_part.added":
                item["content"].append(event["part"])
            case "content_part.done":
                assert event["part"] == part
            case "output_text.delta" | "reasoning_text.delta":
                assert event["delta"] and part is not None
                part["text"] += event["delta"]
                part.get("logprobs", []).extend(event.get("logprobs", []))
            case "output_text.done" | "reasoning_text.done":
                assert part is not None and event["text"] == part["text"]
            case "function_call_arguments.delta":
                item["arguments"] += event["delta"]
            case "function_call_arguments.done":
                assert (event["name"], event["arguments"]) == (item["name"], item["arguments"])
            case _:
                raise AssertionError(event)
    assert opened == -1
    return items


def ask(served: Served, **body: Any) -> dict[str, Any]:
    """The response, whole and from the stream, which must agree but for ids and times."""
    body = {"input": "hello", **body}
    answer = served.post("/v1/responses", **body)
    assert answer.status_code == 200, answer.text
    whole: dict[str, Any] = answer.json()
    with served.http as http:
        events = told(http.post("/v1/responses", json={**body, "stream": True}).text)
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    begun, last = events[0]["response"], events[-1]
    assert begun["status"] == "in_progress" and begun["output"] == [] and begun["id"] == last["response"]["id"]
    assert last["type"] == ("response.completed" if whole["status"] == "completed" else "response.incomplete")
    assert plain(last["response"]) == plain(whole)
    assert summed(events) == last["response"]["output"]
    return whole


def kinds(response: dict[str, Any]) -> list[str]:
    return [item["type"] for item in response["output"]]
