"""Calls whose names and arguments stand between markers of their own, which are mostly tokens: DeepSeek, Kimi K2, Solar Open."""

from __future__ import annotations

import re

from appliance.text.tools.parser import ToolParser
from appliance.text.tools.reader import Step, Steps

_NAME, _ID, _MARKER = re.compile(r"[-\w.:/]*"), re.compile(r"[-\w]*"), re.compile(r"<[|｜].+?[|｜]>")
_PARTS = re.compile(r"(\{\w+\})|\s+")
_NUMBERED = re.compile(r"(functions\.)?(.+?)(:\d+)?")


class Marked(ToolParser):
    """What such formats share: calls stand in a section, their arguments are JSON, white space between markers is none."""

    section: str  # begins calls
    close: str  # ends them
    head: str  # of one call, with {name} and, where it has one, {id}
    end: str  # of one call
    _parts: tuple[str, ...]

    def __init_subclass__(cls) -> None:
        cls.openers = (cls.section,)
        cls.special = tuple(dict.fromkeys(_MARKER.findall(cls.section + cls.head + cls.end + cls.close)))
        cls.ends = (*cls.special, cls.end.lstrip())
        cls._parts = tuple(part for part in _PARTS.split(cls.head) if part)

    def read(self, marker: str) -> Steps:
        calls = self.count
        while True:
            call = yield from self._head()
            if call is None:
                break
            if (yield from self.peek()) != "{":
                if not (yield from self._all_of(self.end.split())):
                    return
                self.begin(call[0], "{}", call[1])
                continue
            self.begin(call[0], call_id=call[1])
            yield from self.arguments()
            self._ending = True
            whole = yield from self._all_of(self.end.split())
            self._ending = False
            if not whole:
                return
            self.drop()
        if self.count > calls and not self.at and (yield from self._all_of([self.close])):
            self.drop()

    def _head(self) -> Step[tuple[str, str | None] | None]:
        """What stands before a call's arguments: its name and id. None where something else does, which may be read."""
        found: dict[str, str] = {}
        start = self.at
        for part in self._parts:
            yield from self.peek()
            if part in ("{name}", "{id}"):
                found[part] = yield from self.run_of(_NAME if part == "{name}" else _ID)
            elif not (yield from self.sees(part)):
                if not found:
                    self.at = start
                return None
        name, call_id = self.named(found["{name}"], found.get("{id}"))
        return (name, call_id or None) if name else None

    def _all_of(self, parts: list[str]) -> Step[bool]:
        """Whether these come next, white space aside."""
        for part in parts:
            yield from self.peek()
            if not (yield from self.sees(part)):
                return False
        return True

    def named(self, name: str, call_id: str | None) -> tuple[str, str | None]:
        """A call's name and id, by what stands in its head."""
        return name, call_id


class DeepSeekV3(Marked):
    """The arguments stand in a fence: V3 and R1."""

    section, close = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    head = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n"
    end = "\n```<｜tool▁call▁end｜>"


class DeepSeekV31(Marked):
    """V3.1."""

    section, close = DeepSeekV3.section, DeepSeekV3.close
    head, end = "<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


class KimiK2(Marked):
    """Kimi K2, whose calls are named by their ids: ``functions.f:0``. The model counts them, and its template asks for that."""

    section, close = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
    head, end = "<|tool_call_begin|>{name}<|tool_call_argument_begin|>", "<|tool_call_end|>"

    def named(self, name: str, call_id: str | None) -> tuple[str, str | None]:
        found = _NUMBERED.fullmatch(name)
        return (found[2], name if found[3] else None) if found else ("", None)


class SolarOpen(Marked):
    """Solar Open: a call's id stands before its name."""

    section, close = "<|tool_calls|>", "<|calls|>"
    head, end = "<|tool_call:begin|>{id}<|tool_call:name|>{name}<|tool_call:args|>", "<|tool_call:end|>"
