"""What a piece of text adds to an answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CallDelta:
    """News of call ``index``: the first of a call has ``id`` and ``name``, the others more ``arguments``."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Thought:
    """A piece of reasoning."""

    text: str


Piece = str | Thought | CallDelta


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """Text, thoughts and news of calls, in their order."""

    pieces: tuple[Piece, ...] = ()

    @property
    def reasoning(self) -> str:
        return "".join([piece.text for piece in self.pieces if isinstance(piece, Thought)])

    @property
    def content(self) -> str:
        return "".join([piece for piece in self.pieces if isinstance(piece, str)])

    @property
    def calls(self) -> tuple[CallDelta, ...]:
        return tuple([piece for piece in self.pieces if isinstance(piece, CallDelta)])
