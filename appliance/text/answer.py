"""A chat answer's text taken apart: reasoning, content, tool calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from appliance.text.reasoning import ReasoningParser
from appliance.text.tools.parser import CallDelta, ToolAnswer, ToolParser

_PIECE = 4096


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """What a piece of text adds: reasoning, then text and news of calls in their order."""

    reasoning: str = ""
    pieces: tuple[str | CallDelta, ...] = ()

    @property
    def content(self) -> str:
        return "".join([piece for piece in self.pieces if isinstance(piece, str)])

    @property
    def calls(self) -> tuple[CallDelta, ...]:
        return tuple([piece for piece in self.pieces if not isinstance(piece, str)])


@dataclass(slots=True)
class Answer(ToolAnswer):
    """The sum of deltas."""

    reasoning: str = field(default="", kw_only=True)


class AnswerParser:
    """One answer. Without parsers all of its text is content."""

    def __init__(self, reasoning: ReasoningParser | None, tools: ToolParser | None, *, parallel: bool = True) -> None:
        """Not ``parallel``: the answer ends with its first call."""
        self._reasoning, self._tools = reasoning, tools
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

    @property
    def reasoning(self) -> Literal["none", "open", "closed"]:
        """Whether there was reasoning so far, and has come to its end."""
        return "none" if self._reasoning is None else self._reasoning.state

    def push(self, text: str, *, last: bool = False) -> AnswerDelta:
        """``last``: no more comes, and what was held back is given out."""
        reasoning = ""
        if self._reasoning is not None:
            parts = [self._reasoning.push(text), *([self._reasoning.finish()] if last else [])]
            reasoning, text = "".join(one.reasoning for one in parts), "".join(one.content for one in parts)
        if self._tools is None:
            return AnswerDelta(reasoning, (text,) if text else ())
        found = self._tools.push(text).pieces
        return AnswerDelta(reasoning, found + self._tools.finish().pieces if last else found)

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
