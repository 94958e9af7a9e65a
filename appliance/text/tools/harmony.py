"""The format of gpt-oss: an answer is a row of messages, and each says in its header what it is.

``<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...``: what is on the channel "analysis" is
reasoning, a message to a recipient (``to=functions.NAME``, before the channel or behind it) is a call, all others are content.
The prompt has the first header's beginning. What is no header is content as it came, its markers included; one that is cut off at
the end of the text is markup.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

from appliance.text.delta import AnswerDelta, CallDelta, Thought
from appliance.text.detokenizer import MARK
from appliance.text.tools.parser import ToolParser
from appliance.text.tools.reader import Step, Steps, open_end

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, RETURN, CALL = "<|end|>", "<|return|>", "<|call|>"
MARKERS = (START, CHANNEL, CONSTRAIN, MESSAGE, END, RETURN, CALL)
_MARKER = {mark: re.compile("|".join(re.escape(mark + one) for one in MARKERS)) for mark in ("", MARK)}
_LONGEST = max(map(len, MARKERS)) + len(MARK)
_SPACE, _WORD = re.compile(r"\s*"), re.compile(rf"[^\s<{MARK}]*")
# A header that is not complete, its white space as single spaces, without words that could be somebody's text.
_TO = r"( ?to=[^ <]*)?"
_CUT_OFF = re.compile(
    rf"(<\|start\|>(assistant)?)?{_TO} ?(<\|channel\|> ?(analysis|commentary|final)?)?{_TO}"
    r" ?(<\|constrain\|> ?(json)?)? ?(<\|?[a-z]*\|?)?"
)

Place = Literal["header", "reasoning", "content", "call", "between"]


class Harmony(ToolParser):
    """``place`` is where the next text belongs: in a header, in a message of some kind, or between messages.

    The arguments of a call are all of its message. Two messages of one kind are an empty line apart.
    """

    openers: tuple[str, ...] = (START, CHANNEL, CONSTRAIN, MESSAGE)
    ends: tuple[str, ...] = (END, RETURN, CALL)
    special = MARKERS
    apart = "\n\n"

    def __init__(
        self,
        new_id: Callable[[], str] | None = None,
        known: Sequence[str] = (),
        *,
        before: str = "",
        calls: bool = True,
        marked: bool = False,
    ) -> None:
        """``before``: what the prompt has of the message that the answer goes on with, from START on.

        Not ``calls``: what has a recipient is reasoning or content like others. ``marked``: markers have a MARK before them, and
        without it they are text like any other.
        """
        super().__init__(new_id, known)
        self._mark = MARK if marked else ""
        self.openers = tuple(self._mark + one for one in type(self).openers)
        self.ends = tuple(self._mark + one for one in type(self).ends)
        self.place: Place = "header"
        self._calls = False
        self._callee = ""  # of a call whose arguments have not begun
        self._said: set[Place] = set()  # kinds of messages that had text
        self._first = True  # of this message no text was told
        if MESSAGE in before:  # else the answer goes on with a header
            self._skip(before)
        self._calls = calls

    def _skip(self, before: str) -> None:
        self.push(_MARKER[""].sub(lambda found: self._mark + found[0], before))
        self.cut(len(self.held))
        if self.place == "between":  # that was a message of somebody else
            self._said.clear()

    def finish(self) -> AnswerDelta:
        self._steps.close()
        if self.place == "header":
            if self._cut_off():
                self.cut(len(self.held))
            self.place = "between"
        self._give(len(self.held))
        self._close()
        return self._delta()

    def _run(self) -> Steps:
        marker = self.openers[0]  # which the prompt has
        while True:
            if marker in self.openers:
                self.place = "header"
                if not (yield from self._header()):
                    self.place = "between"
                    self._give(self.at)
            marker = yield from self._body()

    def _header(self) -> Step[bool]:
        """Read a header, up to MESSAGE and with it. False where it does not fit."""
        start, channel_, constrain, message = self.openers
        channel = recipient = ""
        typed = named = False
        if (yield from self.sees(start)):
            yield from self.run_of(_WORD)
        while True:
            yield from self.run_of(_SPACE)
            if (yield from self.sees(message)):
                break
            if (yield from self.sees(channel_)):
                yield from self.run_of(_SPACE)
                channel = yield from self.run_of(_WORD)
                named = True
            elif (yield from self.sees(constrain)):
                named, typed = True, False
            elif (yield from self.sees("to=")):
                recipient = yield from self.run_of(_WORD)
                named = True
            elif not named or typed or not (yield from self.run_of(_WORD)):
                return False
            else:
                typed = True  # the name of a type, as "json"
        self.drop()
        self._callee = recipient.removeprefix("functions.") if self._calls else ""
        self.place = "call" if self._callee else "reasoning" if channel == "analysis" else "content"
        return True

    def _cut_off(self) -> bool:
        """Whether what is held is the beginning of a header and nothing else."""
        plain = " ".join(re.split(r"\s+", self.held.replace(self._mark, "")))
        return self.held.lstrip().startswith(self.openers) and _CUT_OFF.fullmatch(plain) is not None

    def _body(self) -> Step[str]:
        """Pass on the text up to the next marker, which is the result; read if it ends a message."""
        while (found := _MARKER[self._mark].search(self.held)) is None:
            open_ = open_end(self.held, (*self.openers, *self.ends)) if (self._mark or "<") in self.held[-_LONGEST:] else 0
            self._give(len(self.held) - open_)
            yield
        self._give(found.start())
        self._close()
        if found[0] in self.ends:
            self.cut(len(found[0]))
            self.place = "between"
        return found[0]

    def _give(self, n: int) -> None:
        """The next ``n`` characters go where this message's text goes."""
        text = self.cut(n).replace(self._mark, "")
        if self._callee and (text := text.lstrip()):
            self.begin(self._callee)
            self._callee, self._streams = "", True
        if not text:
            return
        if self._streams:
            self._tell(CallDelta(self.count - 1, arguments=text))
        else:
            kind: Place = "reasoning" if self.place == "reasoning" else "content"
            text = self.apart + text if self._first and kind in self._said else text
            self._tell(Thought(text) if kind == "reasoning" else text)
            self._said.add(kind)
            self._first = False

    def _close(self) -> None:
        """The message is complete; a call without arguments has none."""
        if self._callee:
            self.begin(self._callee, "{}")
        self._callee, self._streams, self._first = "", False, True
