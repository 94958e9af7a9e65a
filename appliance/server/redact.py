"""What no line of a log shall have: keys."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from weakref import WeakSet

if TYPE_CHECKING:
    from appliance.server.keys import Keyring

keyrings: WeakSet[Keyring] = WeakSet()  # of the servers in this process
_SHAPES = re.compile(r"\b(?:sk-|hf_)[\w-]{16,}|(?<=Bearer )[^\s\"'\\]+", re.IGNORECASE)
_WORD, _PIECE = re.compile(r"\S{6,}"), re.compile(r"[/?&=:@\"'`,;<>(){}\[\]\\]|[^/?&=:@\"'`,;<>(){}\[\]\\]+")
SHORTEST, PIECES, TOGETHER = (
    6,
    128,
    20,
)  # characters of a key that is looked for; pieces of a word that are tried, so many in a row


def is_key(word: str) -> bool:
    """Whether it is a key of a server in this process."""
    return any(ring.holds(word) for ring in keyrings)


def line(text: str, most: int = 200) -> str:
    """What a client wrote, for a line of a log: no keys, no line breaks of its own."""
    return "".join(c if c.isprintable() else "?" for c in hide(text[: 2 * most])[:most])


def hide(text: str) -> str:
    """Without our keys, and what looks like one of others: clients put them where they do not belong, as in paths."""
    text = _SHAPES.sub("***", text)
    if len(keyrings):
        for word in set(_WORD.findall(text)):
            for part in _parts(word):
                if len(part) >= SHORTEST and is_key(part):
                    text = text.replace(part, "***")
    return text


def _parts(word: str) -> set[str]:
    """The word, and what stands in it between two separators: a key may have such characters, too."""
    pieces = _PIECE.findall(word)[:PIECES]
    ends = range(1, TOGETHER + 1)
    return {word, *("".join(pieces[i : i + end]) for i in range(len(pieces)) for end in ends if i + end <= len(pieces))}
