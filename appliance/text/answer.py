"""A chat answer's text taken apart: reasoning, content, tool calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from pydantic_core import from_json

from appliance.text.delta import AnswerDelta, CallDelta, Piece, Thought
from appliance.text.detokenizer import MARK
from appliance.text.reasoning import ReasoningParser, tokens_until
from appliance.text.tools.harmony import Harmony
from appliance.text.tools.parser import ToolAnswer, ToolParser

_PIECE = 4096


@dataclass(slots=True)
class Answer(ToolAnswer):
    """The sum of deltas."""

    reasoning: str = field(default="", kw_only=True)


class AnswerParser:
    """One answer. Without parsers all of its text is content."""

    def __init__(self, reasoning: ReasoningParser | None, tools: ToolParser | None, *, parallel: bool = True) -> None:
        """Not ``parallel``: the answer ends with its first call."""
        self._reasoning, self._tools = reasoning, tools
        self._counted: int | None = None  # tokens of reasoning that has come to its end
        self._arguments: list[str] = []  # of the latest call
        if tools is not None:
            tools.single = not parallel

    @property
    def may_end(self) -> bool:
        """Whether it can be ``satisfied`` at all."""
        return self._tools is not None and self._tools.single

    @property
    def satisfied(self) -> bool:
        """Whether what comes next cannot matter."""
        return self._tools is not None and self._tools.satisfied

    def push(self, text: str, *, last: bool = False) -> AnswerDelta:
        """``last``: no more comes, and what was held back is given out."""
        found: tuple[Piece, ...] = ()
        if self._reasoning is not None:
            parts = [self._reasoning.push(text), *([self._reasoning.finish()] if last else [])]
            reasoning, text = "".join(one.reasoning for one in parts), "".join(one.content for one in parts)
            found = (Thought(reasoning),) if reasoning else ()
        if self._tools is None:
            return AnswerDelta((*found, text) if text else found)
        calls = self._tools.push(text).pieces
        calls += self._tools.finish().pieces if last else ()
        for one in calls:
            if isinstance(one, CallDelta):
                self._arguments = [] if one.name is not None else self._arguments
                self._arguments.append(one.arguments)
        return AnswerDelta(found + calls)

    def parse(self, text: str) -> Answer:
        """A whole text at once. (In pieces, since cutting a long text in many places is slow.)"""
        answer = Answer()
        for i in range(0, len(text) + 1, _PIECE):
            delta = self.push(text[i : i + _PIECE], last=i + _PIECE > len(text))
            answer.reasoning += delta.reasoning
            answer.add(delta.content, delta.calls)
        return answer

    def cut(self, stop_reason: int | str | None) -> bool:
        """Whether a stop string ended the answer in the midst of a call: nobody should act on that."""
        return isinstance(stop_reason, str) and bool(self._arguments) and not _is_json("".join(self._arguments))

    def finish_reason(self, reason: str | None, stop_reason: int | str | None = None) -> str | None:
        """OpenAI's word for how the answer ended."""
        called = self._tools is not None and self._tools.count > 0
        return "tool_calls" if reason == "stop" and called and not self.cut(stop_reason) else reason

    def reasoning_tokens(self, ids: Sequence[int], spelled: Callable[[int], bytes]) -> int:
        """How many of its tokens so far are reasoning, tags included. ``spelled``: the bytes of a token."""
        state = "none" if self._reasoning is None else self._reasoning.state
        if self._reasoning is None or state != "closed":
            return len(ids) if state == "open" else 0
        if self._counted is None:
            ended = self._reasoning.ended
            self._counted = tokens_until(ended, map(spelled, ids)) - (ended != self._reasoning.tags.end)
        return self._counted


class HarmonyAnswer(AnswerParser):
    """One answer whose calls and reasoning are messages of one format."""

    def __init__(self, before: str, shown: Mapping[int, str], *, calls: bool, parallel: bool = True) -> None:
        """``before``, ``calls``: as ``Harmony`` has them. ``shown``: what the text has for special tokens."""
        marked = any(text.startswith(MARK) for text in shown.values())
        super().__init__(None, Harmony(before=before, calls=calls, marked=marked), parallel=parallel)
        self._shown = shown
        self._shadow = Harmony(before=before, calls=calls, marked=marked)  # reads the tokens that were counted
        self._seen = self._thoughts = self._header = 0  # tokens: counted, of reasoning, of the header that is being read

    def reasoning_tokens(self, ids: Sequence[int], spelled: Callable[[int], bytes]) -> int:
        for token in ids[self._seen :]:
            before = self._shadow.place
            self._shadow.push(self._shown.get(token) or spelled(token).decode(errors="replace"))
            self._header += 1
            if "reasoning" in (before, self._shadow.place):
                self._thoughts += self._header
            if self._shadow.place != "header" or "reasoning" in (before, self._shadow.place):
                self._header = 0
        self._seen = len(ids)
        return self._thoughts


def _is_json(text: str) -> bool:
    try:
        from_json(text)
    except ValueError:
        return False
    return True
