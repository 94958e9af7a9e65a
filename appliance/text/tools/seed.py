"""Calls of Seed-OSS, which are written in tags: arguments are text, and the tool's parameters say what that stands for."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from appliance.text.delta import CallDelta
from appliance.text.tools.parser import ToolParser
from appliance.text.tools.reader import Step, Steps

_NAME, _KEY = re.compile(r"[-\w.:/]*"), re.compile(r"[^<>\n]*")


class SeedOss(ToolParser):
    """``<seed:tool_call><function=f><parameter=a>1</parameter></function></seed:tool_call>``, white space between the tags.

    Each argument is given out as JSON when it is complete. Where a call's tags are broken its arguments end; the rest is content.
    """

    START, END = "<seed:tool_call>", "</seed:tool_call>"
    openers = (START,)
    ends = special = (START, END)

    def read(self, marker: str) -> Steps:
        yield from self.peek()
        while (yield from self.sees("<function=")):
            name = yield from self.run_of(_NAME)
            if not name or not (yield from self.sees(">")):
                return
            self.begin(name, "{")
            self._ending = True
            whole = yield from self._arguments(name)
            self._ending = False
            if not whole:
                return
            yield from self.peek()
            if (yield from self.sees(self.END)):
                self.drop()
                return

    def _arguments(self, name: str) -> Step[bool]:
        """Read arguments and the end of the function. False where something else stands there."""
        given = next((one.get("parameters") for one in self.functions if one.get("name") == name), None)
        types = given.get("properties") if isinstance(given, Mapping) else None
        between = ""
        while True:
            yield from self.peek()
            if (yield from self.sees("</function>")):
                self._give("}")
                return True
            if not (yield from self.sees("<parameter=")):
                return False
            key = yield from self.run_of(_KEY)
            if not (yield from self.sees(">")):
                return False
            text = yield from self._until("</parameter>")
            value = typed(text, types.get(key) if isinstance(types, Mapping) else None)
            self._give(f"{between}{json.dumps(key, ensure_ascii=False)}: {value}")
            between = ", "

    def _until(self, mark: str) -> Step[str]:
        start = self.at
        while (end := self.held.find(mark, start)) < 0:
            start = max(start, len(self.held) - len(mark) + 1)
            yield
        text, self.at = self.held[self.at : end], end + len(mark)
        return text

    def _give(self, arguments: str) -> None:
        self.drop()
        self._tell(CallDelta(self.count - 1, arguments=arguments))


def typed(text: str, schema: Any) -> str:
    """An argument as JSON. A line break at either end belongs to the tags.

    What is no string by ``schema`` is read as JSON, or as Python writes it; without a type objects and lists are. What cannot be
    read so is text.
    """
    text = text.removeprefix("\n").removesuffix("\n")
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if kind != "string" and (kind is not None or text.lstrip()[:1] in ("{", "[")):
        for read in (json.loads, ast.literal_eval):
            try:
                return json.dumps(read(text.strip()), ensure_ascii=False, allow_nan=False)
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                continue
    return json.dumps(text, ensure_ascii=False)
