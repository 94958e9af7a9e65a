"""Tool calls in the text of an answer, found as the text comes: what the formats share.

A parser is one pass over the text. Every character goes, in order, to one of three places: content, the arguments of a call, or
nowhere, because it is markup (markers, the JSON around a call's name and arguments, white space next to them). Where a piece of
text goes never depends on how the text was cut into deltas; text that may still turn out to be markup is held back.

The rules, for all formats:

- A call begins once its name is known and its arguments have begun. From then on its arguments are passed on as they come and as
  the model wrote them. What looked like a call and turns out not to be one before that is content, its marker included.
- Arguments whose structure is broken stay arguments up to the next marker or the end: the client sees what the model wrote.
- Arguments that come before the name, or as a JSON string that holds an object, are given out in one piece. No arguments, or
  null, are ``{}``; other values are no call.
- A text that ends within a call leaves the arguments cut off; one that ends before the call began leaves content.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from appliance.text.delta import AnswerDelta, CallDelta, Piece, Thought
from appliance.text.tools.reader import Reader, Step, Steps, decoded, first, open_end

_ARGUMENTS = ("arguments", "parameters")
_PIECE = 4096


@dataclass(slots=True)
class ToolCall:
    id: str
    name: str
    arguments: str = ""  # JSON text, as the model wrote it


@dataclass(slots=True)
class ToolAnswer:
    """The sum of deltas."""

    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    def add(self, content: str, calls: tuple[CallDelta, ...]) -> None:
        self.content += content
        for news in calls:
            if news.name is not None:
                self.calls.append(ToolCall(news.id or "", news.name))
            self.calls[news.index].arguments += news.arguments


class ToolParser(Reader):
    """One answer's text. ``push`` it as it comes, then ``finish``; the sum of what they return is the answer."""

    openers: tuple[str, ...]  # the markers that begin calls
    ends: tuple[str, ...]  # the markers that end arguments whose structure is broken
    special: tuple[str, ...] = ()  # the markers that are special tokens, and yet must be in the text

    def __init__(
        self,
        new_id: Callable[[], str] | None = None,
        known: Sequence[str] = (),
        functions: Sequence[Mapping[str, Any]] = (),
        held: Collection[str] = (),
    ) -> None:
        """``new_id`` makes the ids of calls. ``known``: the tools' names, where a grammar holds their arguments (``lark``).

        ``functions``: the tools, for formats in which arguments have no types of their own, and the names of those of them whose
        arguments a grammar holds (``held``).
        """
        super().__init__()
        self.functions, self.held_names = functions, held
        self.known = tuple(json.dumps(name, ensure_ascii=False) for name in known)
        self.count = 0  # calls so far
        self.fresh = True  # nothing but markup since the beginning or since the latest call
        self.single = False  # whether nothing counts that comes behind the first call
        self._new_id = new_id or self.make_id
        self._streams = False  # what is read are arguments
        self._ending = False  # what is read is JSON behind a call's arguments
        self._news: list[Piece] = []
        self._steps = self._run()

    @staticmethod
    def make_id() -> str:
        return f"call_{secrets.token_hex(12)}"

    @property
    def satisfied(self) -> bool:
        """Whether what comes next cannot matter: the single call is complete."""
        return self.single and (self.count > 1 or (self.count == 1 and not self._streams and not self._ending))

    def push(self, text: str) -> AnswerDelta:
        if text:
            self.held += text
            next(self._steps)
            if self._streams:
                self._to_arguments(self.at)
        return self._delta()

    def finish(self) -> AnswerDelta:
        """What was held back, now that no more comes."""
        self._steps.close()
        if self._streams:
            self._to_arguments(len(self.held))
        elif not (self.count and self.fresh and (self._ending or self.is_layout(self.held.strip()))):
            self._to_content(len(self.held))
        return self._delta()

    def parse(self, text: str) -> ToolAnswer:
        """A whole text at once."""
        answer = ToolAnswer()
        pieces = (text[i : i + _PIECE] for i in range(0, len(text), _PIECE))  # cutting a long text in many places is slow
        for delta in (*map(self.push, pieces), self.finish()):
            answer.add(delta.content, delta.calls)
        return answer

    # What the formats say

    def read(self, marker: str) -> Steps:
        """Read what follows an opener: calls; by itself nothing. What is read and not dropped in the end is content."""
        yield from ()

    def opener(self) -> tuple[int, int, str] | None:
        """The first opener in what is held: where the layout before it starts, where it ends, and which one it is."""
        found = first(self.held, self.openers)
        return found and (len(self.held[: found[0]].rstrip()), found[0] + len(found[1]), found[1])

    def safe(self) -> int:
        """How much of what is held is content whatever comes: not the beginning of an opener, nor white space at the end."""
        n = len(self.held) - open_end(self.held, self.openers)
        return len(self.held[:n].rstrip())

    def is_layout(self, text: str) -> bool:
        """Whether a text's last characters, behind a call, are markup: nothing, or the beginning of a marker."""
        return any(one.startswith(text) for one in self.ends)

    # Where text goes

    def drop(self) -> None:
        """What is read is markup."""
        self.cut(self.at)

    def begin(self, name: str, arguments: str = "", call_id: str | None = None) -> None:
        """A call; what is read was its markup."""
        self.drop()
        self._tell(CallDelta(self.count, call_id or self._new_id(), name, arguments))
        self.count += 1
        self.fresh = True

    def give(self, arguments: str) -> None:
        """Arguments of the latest call; what is read was their text."""
        self.drop()
        self._tell(CallDelta(self.count - 1, arguments=arguments))

    def _to_content(self, n: int) -> None:
        if n:
            self._tell(self.cut(n))
            self.fresh = False

    def _to_arguments(self, n: int) -> None:
        if text := self.cut(n):
            self._tell(CallDelta(self.count - 1, arguments=text))

    def _tell(self, news: Piece) -> None:
        if self.single and (news.index if isinstance(news, CallDelta) else self.count):
            return
        last = self._news[-1] if self._news else None
        if isinstance(news, str) and isinstance(last, str):
            self._news[-1] = last + news
        elif isinstance(news, Thought) and isinstance(last, Thought):
            self._news[-1] = Thought(last.text + news.text)
        elif isinstance(news, CallDelta) and isinstance(last, CallDelta) and last.index == news.index:
            self._news[-1] = replace(last, arguments=last.arguments + news.arguments)
        else:
            self._news.append(news)

    def _delta(self) -> AnswerDelta:
        delta = AnswerDelta(tuple(self._news))
        self._news = []
        return delta

    # Reading

    def _run(self) -> Steps:
        while True:
            while (found := self.opener()) is None:
                self._to_content(self.safe())
                yield
            start, end, marker = found
            self._to_content(start)
            self.at = end - start
            yield from self.read(marker)
            if self.held[: self.at].strip():  # else it is white space, and what follows decides about it
                self._to_content(self.at)
            self.at = 0

    def arguments(self) -> Steps:
        """Read the object that comes next and pass it on; a broken one up to the next marker."""
        self._streams = True
        whole = yield from self.value()
        while not whole:
            found = first(self.held, self.ends, self.at)
            if found is not None:
                self.at = found[0]
                break
            self.at = len(self.held) - open_end(self.held[self.at :], self.ends)
            yield
        self._to_arguments(self.at)
        self._streams = False

    def object(self, keys: frozenset[str] | None = None) -> Step[bool]:
        """Read ``{"name": ..., "arguments": {...}}``, whose brace comes next. False where it does not fit, or has no end.

        ``keys``: no marker came before, so that these keys alone, arguments among them, tell a call from other JSON.
        """
        call = _Call()
        self.at += 1
        mark = yield from self.peek()
        while mark != "}" or call.empty:
            if mark != '"' or not (yield from self._member(call, keys)):
                break
            mark = yield from self.peek()
            if mark == ",":
                self.at += 1
                mark = yield from self.peek()
            elif mark != "}":
                break
        else:
            self.at += 1
            if not call.begun and call.name is not None and (keys is None or call.arguments is not None):
                call.begun = True
                self.begin(call.name, call.arguments or "{}")
            if call.begun:
                self.drop()
        self._ending = False
        return call.begun and not self.at

    def listed(self) -> Steps:
        """Read ``[{"name": ..., "arguments": {...}}, ...]`` behind its first bracket, as far as there are calls in it."""
        while (yield from self.peek()) == "{" and (yield from self.object()):
            mark = yield from self.peek()
            if mark in ",]":
                self.at += 1
            if mark == "]":
                self.drop()
            if mark != ",":
                return

    def _member(self, call: _Call, keys: frozenset[str] | None) -> Step[bool]:
        """Read a key and its value. False where it does not fit."""
        key = decoded((yield from self.string()))
        if (yield from self.peek()) != ":" or (keys is not None and key not in keys):
            return False
        self.at += 1
        call.empty = False
        mark = yield from self.peek()
        if key in _ARGUMENTS and mark == "{" and call.name is not None and not call.begun:
            self.begin(call.name)
            yield from self.arguments()
            call.begun = self._ending = True
            return True
        start = self.at
        if not (yield from self.value()):
            return False
        raw = self.held[start : self.at]
        if call.begun:
            return True
        if key == "name":
            call.name = name if isinstance(name := decoded(raw), str) and name else None
        elif key in _ARGUMENTS:
            call.arguments = _as_object(raw)
        if (key == "name" and call.name is None) or (key in _ARGUMENTS and call.arguments is None):
            return False
        if call.name is not None and call.arguments is not None:
            self.begin(call.name, call.arguments)
            call.begun = self._ending = True
        return True


@dataclass(slots=True)
class _Call:
    """What is known of the call whose JSON is being read."""

    name: str | None = None
    arguments: str | None = None
    begun: bool = False
    empty: bool = True


def _as_object(raw: str) -> str | None:
    """Arguments that are not passed on as they come: an object as it is, one within a string, or none. None for others."""
    if raw.startswith("{"):
        return raw
    value = decoded(raw)
    if raw == "null" or value == "":
        return "{}"
    return value if isinstance(value, str) and isinstance(decoded(value), dict) else None
