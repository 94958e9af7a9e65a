"""An answer as the events of a stream, and as the items that these add up to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from appliance.server.responses.items import Item, new_id, text_part
from appliance.server.responses.tools import Shown
from appliance.text.delta import AnswerDelta, CallDelta, Thought

Event = dict[str, Any]


class Numbered:
    """Makes events; each has a number."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, kind: str, **more: Any) -> Event:
        event = {"type": kind, "sequence_number": self._count, **more}
        self._count += 1
        return event


class Output:
    """The items of an answer in the order in which the model wrote them, one open at a time."""

    def __init__(self, event: Numbered, names: Shown) -> None:
        """``names``: of calls, where they are others than the model's."""
        self._names = names
        self.items: list[Item] = []
        self._event = event
        self._kind: str | None = None  # of the item that is open, the last one
        self._text: list[str] = []  # of that item
        self._scored: list[Any] = []  # log-probabilities of its tokens
        self._waiting: list[Any] = []  # those of tokens that are not told yet

    def push(self, news: AnswerDelta, scored: Sequence[Any] = ()) -> list[Event]:
        """``scored``: log-probabilities of the tokens. They are told with a message's text, as soon as that is."""
        events: list[Event] = []
        self._waiting += scored
        for piece in news.pieces:
            if isinstance(piece, CallDelta):
                events += self._call(piece)
            elif isinstance(piece, Thought):
                events += self._within("reasoning")
                events.append(self._told("response.reasoning_text.delta", piece.text, content_index=0))
            elif piece:
                events += self._within("message")
                scored, self._waiting = self._waiting, []
                self._scored += scored
                events.append(self._told("response.output_text.delta", piece, content_index=0, logprobs=scored))
        if self._kind in ("reasoning", "function_call"):
            self._waiting = []
        return events

    def finish(self, status: str) -> list[Event]:
        """End the item that is open; an answer that has neither text nor calls is an empty message."""
        if status == "completed" and all(item["type"] == "reasoning" for item in self.items):
            return [*self._within("message"), *self.close(status)]
        return self.close(status)

    def close(self, status: str = "completed") -> list[Event]:
        if self._kind is None:
            return []
        item, text, events = self.items[-1], "".join(self._text), []
        if self._kind == "function_call":
            item["arguments"] = text
            events.append(self._of_item("response.function_call_arguments.done", name=item["name"], arguments=text))
        elif self._kind == "reasoning":
            item["content"] = [part := {"type": "reasoning_text", "text": text}]
            events.append(self._of_item("response.reasoning_text.done", content_index=0, text=text))
            events.append(self._of_item("response.content_part.done", content_index=0, part=part))
        else:
            item["content"] = [part := text_part(text, self._scored)]
            scored = part["logprobs"]
            events.append(self._of_item("response.output_text.done", content_index=0, text=text, logprobs=scored))
            events.append(self._of_item("response.content_part.done", content_index=0, part=part))
        item["status"] = status
        self._kind = None
        events.append(self._event("response.output_item.done", output_index=len(self.items) - 1, item=item))
        return events

    def _call(self, news: CallDelta) -> list[Event]:
        events: list[Event] = []
        if news.name is not None:
            call = {"call_id": news.id, **self._names.get(news.name, {"name": news.name}), "arguments": ""}
            events += [*self.close(), *self._open("function_call", call)]
        if news.arguments:
            events.append(self._told("response.function_call_arguments.delta", news.arguments))
        return events

    def _within(self, kind: str) -> list[Event]:
        """See to it that an item of this kind is open."""
        if self._kind == kind:
            return []
        fields: dict[str, Any] = {"summary": []} if kind == "reasoning" else {"role": "assistant"}
        part = {"type": "reasoning_text", "text": ""} if kind == "reasoning" else text_part("")
        events = [*self.close(), *self._open(kind, {**fields, "content": []})]
        return [*events, self._of_item("response.content_part.added", content_index=0, part=part)]

    def _open(self, kind: str, fields: dict[str, Any]) -> list[Event]:
        item = {"id": new_id(kind), "type": kind, "status": "in_progress", **fields}
        self.items.append(item)
        self._kind, self._text, self._scored = kind, [], []
        return [self._event("response.output_item.added", output_index=len(self.items) - 1, item=dict(item))]

    def _told(self, kind: str, text: str, **more: Any) -> Event:
        self._text.append(text)
        return self._of_item(kind, delta=text, **more)

    def _of_item(self, kind: str, **more: Any) -> Event:
        return self._event(kind, item_id=self.items[-1]["id"], output_index=len(self.items) - 1, **more)
