"""A chat answer's text taken apart: reasoning, content, tool calls."""

from __future__ import annotations

from dataclasses import dataclass, field

from appliance.text.reasoning import ReasoningParser
from appliance.text.tools.parser import CallDelta, ToolAnswer, ToolDelta, ToolParser

_PIECE = 4096


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """What a piece of text adds."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[CallDelta, ...] = ()


@dataclass(slots=True)
class Answer(ToolAnswer):
    """The sum of deltas."""

    reasoning: str = field(default="", kw_only=True)


class AnswerParser:
    """One answer. Without parsers all of its text is content."""

    def __init__(self, reasoning: ReasoningParser | None, tools: ToolParser | None, *, parallel: bool = True) -> None:
        """Not ``parallel``: only the first call is given out."""
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
        return AnswerDelta(reasoning, "".join(one.content for one in found), calls)

    def parse(self, text: str) -> Answer:
        """A whole text at once. (In pieces, since cutting a long text in many places is slow.)"""
        answer = Answer()
        for i in range(0, len(text) + 1, _PIECE):
            delta = self.push(text[i : i + _PIECE], last=i + _PIECE > len(text))
            answer.reasoning += delta.reasoning
            answer.add(delta.content, delta.calls)
        return answer

    def finish_reason(self, reason: str | None) -> str | None:
        """OpenAI's word for how the answer ended."""
        return "tool_calls" if reason == "stop" and self._tools is not None and self._tools.count else reason
