"""Calls that are written as Python, of OLMo 3 and LFM2."""

from __future__ import annotations

import re

from appliance.text.tools.parser import ToolParser
from appliance.text.tools.reader import Step, Steps
from appliance.text.tools.tags import KEYWORD, Tagging, typed

_NAME, _PLAIN, _IN_STRING = re.compile(r"[-\w.:/]*"), re.compile(r"""[^,()\[\]{}"'<]*"""), re.compile(r"""[^"'\\]*""")
_CLOSERS = {"(": ")", "[": "]", "{": "}"}


class Olmo3(ToolParser):
    """``<function_calls>f(a="x", b=[1, 2])``, and the next call on a line of its own.

    Arguments have names, and values as Python or JSON writes them. Each is given out as JSON when it is complete. Where the
    structure of a call is broken its arguments end; the rest is content.
    """

    START, END = "<function_calls>", "</function_calls>"
    openers: tuple[str, ...] = (START,)
    ends = special = (START, END)
    around, between = ("", ""), ""  # what stands before the first call and behind the last one, and what between two
    tags = Tagging("", "=")

    def read(self, marker: str) -> Steps:
        calls = self.count
        yield from self.peek()
        if not (yield from self.sees(self.around[0])):
            return
        while True:
            yield from self.peek()
            if self.count > calls and (yield from self._ends()):
                return
            if self.count > calls and not (yield from self.sees(self.between)):
                return
            yield from self.peek()
            name = yield from self.run_of(_NAME)
            if not name or not (yield from self.sees("(")):
                return
            key = yield from self._key()
            if key is None:
                return
            self.begin(name, "{")
            self._ending = True
            whole = yield from self._arguments(key)
            self._ending = False
            if not whole:
                return

    def _ends(self) -> Step[bool]:
        """Whether the calls end here; what says so is dropped."""
        if not (yield from self.sees(self.around[1] or self.END)):
            return False
        self.drop()
        if self.around[1]:
            yield from self.peek()
            if (yield from self.sees(self.END)):
                self.drop()
        return True

    def _key(self) -> Step[str | None]:
        """An argument's name, with what stands behind it read; empty at the end of the arguments, None at something else."""
        if (yield from self.peek()) == ")":
            return ""
        key = yield from self.run_of(KEYWORD)
        yield from self.peek()
        return key if key and (yield from self.sees("=")) else None

    def _arguments(self, key: str | None) -> Step[bool]:
        """Read a call's arguments behind the first one's name, and the bracket behind them."""
        between = ""
        while key:
            yield from self.peek()
            start = self.at
            if not (yield from self._value()):
                return False
            value = typed(self.held[start : self.at].strip(), {"type": "any"})
            mark = self.held[self.at]
            self.give(f"{between}{typed(key, {'type': 'string'})}: {value}")
            between = ", "
            if mark != ",":
                break
            self.at += 1
            key = yield from self._key()
        if key is None or (yield from self.peek()) != ")":
            return False
        self.at += 1
        self.give("}")
        return True

    def _value(self) -> Step[bool]:
        """Read a value up to the comma or bracket behind it. False where its brackets do not match, or there is none."""
        closers: list[str] = []
        start = self.at
        while True:
            yield from self.run_of(_PLAIN)
            mark = self.held[self.at]
            if not closers and mark in ",)":
                return self.at > start
            self.at += 1
            if mark in "\"'":
                yield from self._string(mark)
            elif mark in _CLOSERS:
                closers.append(_CLOSERS[mark])
            elif (mark in ")]}" and (not closers or closers.pop() != mark)) or (mark == "<" and not closers):
                return False

    def _string(self, quote: str) -> Steps:
        """Read a string behind its first quote."""
        while True:
            yield from self.run_of(_IN_STRING)
            mark = self.held[self.at]
            self.at += 1
            if mark == quote:
                return
            if mark == "\\":
                while self.at == len(self.held):
                    yield
                self.at += 1


class Lfm2(Olmo3):
    """``<|tool_call_start|>[f(a="x", b=[1, 2]), g()]<|tool_call_end|>``."""

    START, END = "<|tool_call_start|>", "<|tool_call_end|>"
    openers = (START,)
    ends = special = (START, END)
    around, between = ("[", "]"), ","
