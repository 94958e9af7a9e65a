"""Calls of Gemma 4: ``<|tool_call>call:f{city:<|"|>Zürich<|"|>,days:[1,2]}<tool_call|>``.

Arguments are an object whose keys stand bare and whose strings stand between two tokens of their own; all else is as in JSON, and
JSON, to which a grammar holds the model (``choice.FORMS``), is read alike. They are given out as JSON, each when it is complete.
"""

from __future__ import annotations

import json
import re

from appliance.text.tools.parser import ToolParser
from appliance.text.tools.reader import Step, Steps, decoded

_NAME, _BARE = re.compile(r"[-\w.:/]*"), re.compile(r'[^,\[\]{}<"]*')
_KEY = re.compile(r'[^:,\[\]{}<"]*')
_LITERAL = re.compile(r"true|false|null|-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")


class Gemma4(ToolParser):
    """Where the structure of arguments is broken they end; the rest is content."""

    START, END, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
    openers = (START,)
    ends = (START, END)
    special = (*ends, QUOTE)

    def read(self, marker: str) -> Steps:
        if not (yield from self.sees("call:")):
            return
        name = yield from self.run_of(_NAME)
        if not name or not (yield from self.sees("{")):
            return
        self.begin(name, "{")
        self._ending = True
        if (yield from self._members()):
            yield from self.peek()
            if (yield from self.sees(self.END)):
                self.drop()
        self._ending = False

    def _members(self) -> Step[bool]:
        """Read arguments to the brace that ends them. False at the first character that does not fit."""
        closers, made = ["}"], ""  # of the brackets that are open; JSON that was not given out
        empty = True  # whether nothing stands behind the last bracket that opened
        while True:
            mark = yield from self.peek()
            if mark == closers[-1]:
                self.at += 1
                made += closers.pop()
                if len(closers) <= 1:
                    made = self._give(made)
                if not closers:
                    return True
                empty = False
                continue
            if not empty:
                if mark != ",":
                    return False
                self.at += 1
                made += ", "
            if closers[-1] == "}":
                key = yield from self._text(_KEY)
                if not key or (yield from self.peek()) != ":":
                    return False
                self.at += 1
                made += f"{key}: "
            mark = yield from self.peek()
            empty = mark in "{["
            if empty:
                self.at += 1
                made += mark
                closers.append("}" if mark == "{" else "]")
            elif part := (yield from self._text(_BARE)):
                made += part
                if len(closers) == 1:
                    made = self._give(made)
            else:
                return False

    def _text(self, bare: re.Pattern[str]) -> Step[str]:
        """A string or what stands bare, as JSON; empty where neither comes next."""
        mark = yield from self.peek()
        if mark == '"':
            raw = yield from self.string()
            value = decoded(raw)
            return raw if isinstance(value, str) and raw.isprintable() else json.dumps(raw[1:-1] if value is None else value)
        if (yield from self.sees(self.QUOTE)):
            return json.dumps((yield from self.until(self.QUOTE)), ensure_ascii=False)
        text = (yield from self.run_of(bare)).rstrip()
        if bare is _BARE and (text == "None" or _LITERAL.fullmatch(text)):
            return "null" if text == "None" else text  # templates write what Python has for null
        return json.dumps(text, ensure_ascii=False) if text else ""

    def _give(self, arguments: str) -> str:
        """Give this out; nothing is left of it."""
        self.give(arguments)
        return ""


class FunctionGemma(Gemma4):
    """``<start_function_call>call:f{city:<escape>Zürich<escape>}<end_function_call>``."""

    START, END, QUOTE = "<start_function_call>", "<end_function_call>", "<escape>"
    openers = (START,)
    ends = (START, END)
    special = (*ends, QUOTE)
