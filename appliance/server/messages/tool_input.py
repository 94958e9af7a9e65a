"""The arguments of a call, as a stream may tell them: what comes is always the beginning of valid JSON, and in the end an object.

Models write what they like, and clients read a call's input while it comes; what has been sent cannot be taken back. So each
member of the object is sent once it is complete, as Anthropic does. What turns out to be no JSON is sent as a member
``INVALID_JSON`` with the model's own text, the form in which Anthropic has its clients tell a model of this: no tool takes it.
"""

from __future__ import annotations

import json
import re

from pydantic_core import PydanticSerializationError, from_json, to_json

_MARKS = re.compile(r'["\\{}\[\],]')
_SPACE = " \t\r\n"


class ToolInput:
    """One call's arguments. ``push`` the text as it comes, then ``finish``; the sum of what they return is a JSON object."""

    def __init__(self) -> None:
        self._text: list[str] = []  # all of it
        self._member: list[str] = []  # of the member that has begun
        self._depth = 0  # brackets that are open
        self._quoted = self._escaped = False  # within a string; its next character is escaped
        self._members = 0
        self._closed = self._broken = False

    def push(self, text: str) -> str:
        self._text.append(text)
        given, begun, at = "", 0, int(self._escaped and text != "")
        self._escaped = self._escaped and not text
        while not self._closed and (mark := _MARKS.search(text, at)) is not None:
            at = mark.end()
            if self._depth == 1 and not self._quoted and mark[0] in ",]}":
                self._member.append(text[begun : at - 1])
                given += self._complete(mark[0])
                begun = at
            self._see(mark[0])
            if mark[0] == "\\" and self._quoted:
                at += 1
                self._escaped = at > len(text)
            elif mark[0] == "{" and self._depth == 1 and not self._quoted:
                begun = at
        self._member.append(text[begun:])
        return given

    def finish(self, *, cut: bool) -> str:
        """What is missing for an object. ``cut``: the text was cut off, so that a member which has no end is left out."""
        if self._broken or not (cut or self._closed) or (self._closed and "".join(self._member).strip(_SPACE)):
            wrong = to_json({"INVALID_JSON": "".join(self._text)}).decode()
            return (", " if self._members else "{") + wrong[1:]
        return "}" if self._members else "{}"

    def _see(self, mark: str) -> None:
        if mark == '"':
            self._quoted = not self._quoted
        elif not self._quoted:
            self._depth += (mark in "{[") - (mark in "}]")

    def _complete(self, end: str) -> str:
        """The member whose ``end`` has come: with a brace it is that of the object too."""
        text, self._member = "".join(self._member), []
        if self._broken:
            return ""
        self._closed = end == "}"
        if self._closed and not self._members and not text.strip(_SPACE):
            return ""
        member = _valid("{" + text + "}")
        if member is None or end == "]":
            self._broken = True
            return ""
        self._members += 1
        return ("{" if self._members == 1 else ", ") + member[1:-1]


def _valid(text: str) -> str | None:
    """An object of one member, spelled as JSON wants it: line breaks within strings are let pass. None where it is none."""
    try:
        try:
            value = from_json(text)
        except ValueError:
            value = json.loads(text, strict=False)
        spelled = to_json(value).decode()
        from_json(spelled, allow_inf_nan=False)
    except (ValueError, RecursionError, PydanticSerializationError):
        return None
    return spelled if isinstance(value, dict) and len(value) == 1 else None
