"""An answer as the events of a stream; and the whole of it, which is the sum of its events."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from pydantic_core import from_json

from appliance.server.messages.signature import signature
from appliance.server.messages.tool_input import ToolInput
from appliance.text.delta import AnswerDelta, CallDelta, Thought

Event = dict[str, Any]
# The kinds of deltas: kind -> the key that holds what is new.
DELTAS = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature", "input_json_delta": "partial_json"}


class Blocks:
    """Blocks of content, one open at a time: thinking, text, calls, in the order in which the model wrote them."""

    def __init__(self, *, thinking_shown: bool = True) -> None:
        self._shown = thinking_shown
        self._count = 0  # blocks that have begun
        self._open: str | None = None  # the type of the one that is open
        self._thoughts: list[str] = []
        self._input = ToolInput()

    def push(self, news: AnswerDelta) -> list[Event]:
        events: list[Event] = []
        for piece in news.pieces:
            if isinstance(piece, CallDelta):
                events += self._call(piece)
            elif isinstance(piece, Thought):
                events += self._within("thinking", {"thinking": "", "signature": ""})
                self._thoughts.append(piece.text)
                if self._shown:
                    events.append(self._delta("thinking_delta", piece.text))
            elif piece:
                events += [*self._within("text", {"text": ""}), self._delta("text_delta", piece)]
        return events

    def finish(self, *, cut: bool = False) -> list[Event]:
        """End the block that is open. ``cut``: the answer was cut off, not ended by the model."""
        if self._open is None:
            return []
        events = []
        if self._open == "thinking":
            events.append(self._delta("signature_delta", signature("".join(self._thoughts), shown=self._shown)))
            self._thoughts = []
        elif self._open == "tool_use":
            events.append(self._delta("input_json_delta", self._input.finish(cut=cut)))
        self._open = None
        return [*events, {"type": "content_block_stop", "index": self._count - 1}]

    def _call(self, news: CallDelta) -> list[Event]:
        events: list[Event] = []
        if news.name is not None:
            events += self.finish()
            self._input = ToolInput()
            events += self._within("tool_use", {"id": news.id, "name": news.name, "input": {}})
        if text := self._input.push(news.arguments):
            events.append(self._delta("input_json_delta", text))
        return events

    def _within(self, kind: str, empty: dict[str, Any]) -> list[Event]:
        """See to it that a block of this kind is open."""
        if self._open == kind:
            return []
        ended = self.finish()
        self._open = kind
        self._count += 1
        return [*ended, {"type": "content_block_start", "index": self._count - 1, "content_block": {"type": kind, **empty}}]

    def _delta(self, kind: str, text: str) -> Event:
        return {"type": "content_block_delta", "index": self._count - 1, "delta": {"type": kind, DELTAS[kind]: text}}


async def message_of(batches: AsyncGenerator[list[Event], None]) -> dict[str, Any]:
    """The message that a stream tells."""
    message: dict[str, Any] = {}
    parts: dict[str, list[str]] = {}  # of the block that is open, by key
    async with aclosing(batches):
        async for batch in batches:
            for event in batch:
                match event["type"]:
                    case "message_start":
                        message = event["message"]
                    case "content_block_start":
                        message["content"].append(dict(event["content_block"]))
                        parts = {}
                    case "content_block_delta":
                        key = DELTAS[event["delta"]["type"]]
                        parts.setdefault(key, []).append(event["delta"][key])
                    case "content_block_stop":
                        found = {key: "".join(pieces) for key, pieces in parts.items()}
                        if (text := found.pop("partial_json", None)) is not None:
                            found["input"] = from_json(text)
                        message["content"][-1].update(found)
                    case "message_delta":
                        message |= event["delta"]
                        message["usage"] = event["usage"] | {"service_tier": message["usage"]["service_tier"]}
    return message
