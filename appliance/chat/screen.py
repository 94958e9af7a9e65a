"""What the terminal shows: answers wrapped at words, reasoning dimmed, nothing that could steer the terminal."""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from typing import TextIO

from appliance.chat.talk import Kind

DIM, BOLD, RED, PLAIN = "\x1b[2m", "\x1b[1m", "\x1b[31m", "\x1b[0m"


def harmless(text: str) -> str:
    """Without control characters: a model's text could otherwise move the cursor, rename the window, or worse."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def cells(text: str) -> int:
    """Columns that a text takes."""
    return sum(map(_cells, text))


def _cells(char: str) -> int:
    if unicodedata.combining(char) or unicodedata.category(char) in ("Cf", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


class Wrap:
    """Breaks lines at spaces as text comes in pieces; lines between ``` stay as they are. Holds back the word that may go on."""

    def __init__(self, width: int) -> None:
        self.width = max(20, width)
        self._column = 0
        self._word = ""
        self._line = ""  # its beginning, to find ```
        self._code = False

    def feed(self, text: str) -> str:
        return "".join(map(self._char, text))

    def _char(self, char: str) -> str:
        if char == "\n":
            out = self.end() + char
            self._code ^= self._line.startswith("```")
            self._column, self._line = 0, ""
            return out
        if len(self._line) < 3 and (self._line or not char.isspace()):
            self._line += char
        if self._code:
            return char
        if char.isspace():
            out = self.end()
            if self._column + 1 >= self.width:
                return out  # the line's end stands for it
            self._column += 1 if char != "\t" else 8 - self._column % 8
            return out + char
        wide = _cells(char) == 2
        if wide or cells(self._word) >= self.width - 1:  # may be broken here
            out, self._word = self.end(), char
            return out + (self.end() if wide else "")
        self._word += char
        return ""

    def end(self) -> str:
        """What was held back."""
        word, self._word = self._word, ""
        size = cells(word)
        broken = self._column and self._column + size > self.width
        self._column = size if broken else self._column + size
        return "\n" + word if broken else word


def _wrapped(text: str) -> str:
    """A whole text, as it is shown."""
    wrap = Wrap(shutil.get_terminal_size().columns)
    return wrap.feed(harmless(text)) + wrap.end()


class Screen:
    """A terminal, with colours or without."""

    def __init__(self, out: TextIO = sys.stdout) -> None:
        self._out = out
        self.colour = out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"
        self._kind: Kind | None = None

    def style(self, codes: str, text: str) -> str:
        return f"{codes}{text}{PLAIN}" if self.colour else text

    def prompt(self, text: str) -> str:
        """For readline, which must know what takes no room."""
        return f"\x01{BOLD}\x02{text}\x01{PLAIN}\x02" if self.colour else text

    def begin(self) -> None:
        """An answer is on its way."""
        self._wrap = Wrap(shutil.get_terminal_size().columns)
        self._kind = None
        if self.colour:
            self._write(self.style(DIM, "..."))

    def piece(self, kind: Kind, text: str) -> None:
        """The next piece of an answer."""
        if kind != self._kind:
            self._change(kind)
            text = text.lstrip("\n")
        self._write(self._wrap.feed(harmless(text)))

    def _change(self, kind: Kind) -> None:
        if self._kind is None:
            self._erase()
        else:
            self._write(self._wrap.end() + (PLAIN if self.colour else "") + "\n\n")
            self._wrap = Wrap(self._wrap.width)
        if kind == "reasoning":
            self._write(DIM if self.colour else "(reasoning) ")
        elif self._kind is not None and not self.colour:
            self._write("(answer) ")
        self._kind = kind

    def end(self) -> None:
        """The answer is over, or breaks off."""
        if self._kind is None:
            self._erase()
        else:
            self._write(self._wrap.end() + (PLAIN if self.colour else "") + "\n")
        self._kind = None

    def _erase(self) -> None:
        """The sign that an answer is on its way, and the ^C of who would not wait for it."""
        if self.colour:
            self._write("\r\x1b[K")

    def note(self, text: str) -> None:
        self._write(self.style(DIM, _wrapped(text)) + "\n")

    def error(self, text: str) -> None:
        self._write(self.style(RED, _wrapped(text)) + "\n")

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


class Status:
    """One line on stderr that is written over, where that is a terminal."""

    def __init__(self) -> None:
        self._shown = ""

    def __call__(self, text: str) -> None:
        if sys.stderr.isatty() and text != self._shown:
            sys.stderr.write(f"\r{text}{' ' * (len(self._shown) - len(text))}")
            sys.stderr.flush()
            self._shown = text

    def clear(self) -> None:
        if self._shown:
            sys.stderr.write("\r" + " " * len(self._shown) + "\r")
            sys.stderr.flush()
            self._shown = ""
