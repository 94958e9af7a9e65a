"""Reading text that comes in pieces: steps that stop where they need more of it."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
Step = Generator[None, None, T]  # yields where it needs more text
Steps = Step[None]
_SPACE, _IN_STRING, _SCALAR = re.compile(r"\s*"), re.compile(r'[^"\\]*'), re.compile(r"[-+.\w]*")


class Reader:
    """``held`` is the text that went nowhere yet, its first ``at`` characters are read.

    Of JSON only the structure is checked (strings, brackets, commas, colons), not what is within a string or how a number is
    spelled: models that get those wrong still show where a value ends.
    """

    def __init__(self) -> None:
        self.held, self.at = "", 0

    def cut(self, n: int) -> str:
        """Take the first ``n`` characters out."""
        text, self.held = self.held[:n], self.held[n:]
        self.at = max(0, self.at - n)
        return text

    def peek(self) -> Step[str]:
        """The next character, white space skipped."""
        yield from self.run_of(_SPACE)
        return self.held[self.at]

    def sees(self, text: str) -> Step[bool]:
        """Whether exactly this comes next; read if so."""
        while len(self.held) - self.at < len(text) and text.startswith(self.held[self.at :]):
            yield
        found = self.held.startswith(text, self.at)
        self.at += len(text) if found else 0
        return found

    def run_of(self, pattern: re.Pattern[str]) -> Step[str]:
        """The longest run of a pattern's characters (it has the form ``[...]*``). The character behind it has come, then."""
        parts = []
        while True:
            found = pattern.match(self.held, self.at)
            assert found is not None
            parts.append(found[0])
            self.at = found.end()
            if self.at < len(self.held):
                return "".join(parts)
            yield

    def until(self, mark: str) -> Step[str]:
        """What stands before a marker; that is read too."""
        start = self.at
        while (end := self.held.find(mark, start)) < 0:
            start = max(start, len(self.held) - len(mark) + 1)
            yield
        text, self.at = self.held[self.at : end], end + len(mark)
        return text

    def string(self) -> Step[str]:
        """The JSON string whose first quote comes next, as it is written."""
        self.at += 1
        parts = ['"']
        while True:
            parts.append((yield from self.run_of(_IN_STRING)))
            mark = self.held[self.at]
            parts.append(mark)
            self.at += 1
            if mark == '"':
                return "".join(parts)
            while self.at == len(self.held):
                yield
            parts.append(self.held[self.at])
            self.at += 1

    def value(self) -> Step[bool]:
        """Read one JSON value. False at the first character that breaks its structure."""
        closers: list[str] = []  # of the brackets that are open
        key = False  # a key is due, or the end of the object
        while True:
            mark = yield from self.peek()
            if closers and mark == closers[-1]:
                self.at += 1
                closers.pop()
            elif mark == '"':
                yield from self.string()
                if key:
                    if (yield from self.peek()) != ":":
                        return False
                    self.at += 1
                    key = False
                    continue
            elif key:
                return False
            elif mark in "{[":
                self.at += 1
                closers.append("}" if mark == "{" else "]")
                key = mark == "{"
                continue
            elif not (yield from self.run_of(_SCALAR)):
                return False
            if not closers:
                return True
            mark = yield from self.peek()
            if mark == ",":
                self.at += 1
                key = closers[-1] == "}"
            elif mark != closers[-1]:
                return False


def first(text: str, markers: Sequence[str], start: int = 0) -> tuple[int, str] | None:
    """(place, marker) of the marker that comes first."""
    return min(((place, one) for one in markers if (place := text.find(one, start)) >= 0), default=None)


def open_end(text: str, markers: Sequence[str]) -> int:
    """Length of the longest end of ``text`` with which one of the markers begins."""
    longest = max(map(len, markers), default=1) - 1
    for n in range(min(longest, len(text)), 0, -1):
        if any(len(one) > n and one.startswith(text[-n:]) for one in markers):
            return n
    return 0


def decoded(raw: str) -> object:
    """The value of JSON text; None where it is none. Line breaks within strings are let pass."""
    try:
        return json.loads(raw, strict=False)
    except (ValueError, RecursionError):
        return None
