"""How long a model may think before it answers: vLLM's ``thinking_token_budget``."""

from __future__ import annotations

from dataclasses import dataclass, field

SOON = 16  # tokens of an answer within which thoughts begin, or there are none


@dataclass(frozen=True, slots=True)
class ThinkingMarks:
    """What the thoughts of a model stand between, and where one request is in them. Made by the text layer."""

    start: tuple[int, ...]
    end: int
    close: tuple[int, ...]  # what is written to end them: the end at least
    thought: int | None = None  # tokens of the prompt that are thoughts already; None: the answer does not begin with thoughts
    again: bool = False  # whether they may begin anew after their end


@dataclass(slots=True)
class Thinking:
    """One completion's thoughts. It reads the tokens that are new whenever it is asked, so it need not hear of each."""

    budget: int
    marks: ThinkingMarks
    place: int  # tokens that were read; the prompt's at first
    within: bool = field(init=False)
    left: int = field(init=False)
    over: bool = field(default=False, init=False)  # there is nothing left to watch for
    _closing: int = field(default=0, init=False)  # tokens of ``close`` that were written
    _begin: int = field(init=False)  # the place where the answer begins

    def __post_init__(self) -> None:
        self.within, self.left, self._begin = self.marks.thought is not None, self.budget - (self.marks.thought or 0), self.place

    def forced(self, tokens: list[int]) -> int | None:
        """The token that must come next, if thoughts have taken what they may."""
        while self.place < len(tokens) and not self.over:
            self.place += 1
            self._read(tokens)
        if self.over or not (self._closing or (self.within and self.left <= 0)):
            return None
        return self.marks.close[self._closing]

    def _read(self, tokens: list[int]) -> None:
        """The token before ``place``."""
        marks, token = self.marks, tokens[self.place - 1]
        if self._closing or (self.within and self.left <= 0):  # it was forced
            self._closing = (self._closing + 1) % len(marks.close) if token == marks.close[self._closing] else 0
            self.within = self._closing != 0
            self.over = not self.within and not marks.again
        elif not self.within:
            written = tokens[max(self._begin, self.place - len(marks.start)) : self.place]
            self.within = tuple(written) == marks.start
            self.over = not (self.within or marks.again) and len(written) == len(marks.start) and self.place - self._begin > SOON
        elif token == marks.end:
            self.within, self.over = False, not marks.again
        else:
            self.left -= 1
