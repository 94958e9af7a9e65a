"""A chat answer's text taken apart: reasoning, content, tool calls."""

from __future__ import annotations

from dataclasses import dataclass

from appliance.text.reasoning import ReasoningParser
from appliance.text.tools.parser import CallDelta, ToolAnswer, ToolDelta, ToolParser

_PIECE = 4096


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """What a piece of text adds."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[CallDelta, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.calls)


class AnswerParser:
    """``reasoning`` and ``answer`` are the sums of all deltas; without parsers all text is content."""

    def __init__(self, reasoning: ReasoningParser | None, tools: ToolParser | None, *, parallel: bool = True) -> None:
        """Not ``parallel``: only the first call is given out."""
        self.reasoning = ""
        self.answer = ToolAnswer()
        self._reasoning, self._tools, self._parallel = reasoning, tools, parallel

    def push(self, text: str, *, last: bool = False) -> AnswerDelta:
        """``last``: no more comes, and what was held back is given out."""
        reasoning = ""
        if self._reasoning is not None:
            parts = [self._reasoning.push(text), *([self._reasoning.finish()] if last else [])]
            reasoning, text = "".join(one.reasoning for one in parts), "".join(one.content for one in parts)
        found = [ToolDelta(text)]
        if self._tools is not None:
            found = [self._tools.push(text), *([self._tools.finish()] if last else [])]
        calls = tuple(news for one in found for news in one.calls if self._parallel or news.index == 0)
        delta = AnswerDelta(reasoning, "".join(one.content for one in found), calls)
        self.reasoning += delta.reasoning
        self.answer.add(delta.content, delta.calls)
        return delta

    def parse(self, text: str) -> None:
        """A whole text at once. (In pieces, since cutting a long text in many places is slow.)"""
        for i in range(0, len(text), _PIECE):
            self.push(text[i : i + _PIECE])
        self.push("", last=True)

    def finish_reason(self, reason: str | None) -> str | None:
        """OpenAI's word for how the answer ended."""
        return "tool_calls" if reason == "stop" and self.answer.calls else reason
