"""What no line of a log shall have: keys."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import chain
from typing import TYPE_CHECKING
from weakref import WeakSet

if TYPE_CHECKING:
    from appliance.server.keys import Keyring

keyrings: WeakSet[Keyring] = WeakSet()  # of the servers in this process
_SHAPES = re.compile(r"\b(?:sk-|hf_)[\w-]{16,}|(?<=Bearer )[^\s\"'\\]+", re.IGNORECASE)
_WORD, _PIECE = re.compile(r"\S{6,}"), re.compile(r"[/?&=:@\"'`,;<>(){}\[\]\\]|[^/?&=:@\"'`,;<>(){}\[\]\\]+")
# Characters of a key that is looked for; pieces of a word that are tried, so many in a row.
SHORTEST, PIECES, TOGETHER = 6, 128, 20


def is_key(word: str) -> bool:
    """Whether it is a key of a server in this process."""
    return word in _keys([word])


def has_key(word: str) -> bool:
    """Whether one is anywhere in it."""
    return bool(_keys([word, *_cuts(word)]))


def _keys(parts: Iterable[str]) -> set[str]:
    """Those of them that are keys."""
    digests = {digest for ring in keyrings for digest in ring.digests}
    return {part for part in parts if sha256(part.encode(errors="replace")).digest() in digests}


def line(text: str, most: int = 200) -> str:
    """What a client wrote, for a line of a log: no keys, no line breaks of its own."""
    return "".join(c if c.isprintable() else "?" for c in hide(text[: 2 * most])[:most])


def hide(text: str) -> str:
    """Without our keys, and what looks like one of others: clients put them where they do not belong, as in paths."""
    text = _SHAPES.sub("***", text)
    if len(keyrings):
        parts = chain.from_iterable((*_parts(word), *_cuts(word)) for word in set(_WORD.findall(text)))
        for key in sorted(_keys(part for part in parts if len(part) >= SHORTEST), key=len, reverse=True):
            text = text.replace(key, "***")  # the longest first: one may be part of another
    return text


def _cuts(word: str) -> Iterator[str]:
    """All in it that is as long as a key: clients put one behind something else, too."""
    lengths = {n for ring in keyrings for n in ring.lengths if n >= SHORTEST}
    return (word[i : i + n] for n in lengths for i in range(len(word) - n + 1))


def _parts(word: str) -> set[str]:
    """The word, and what stands in it between two separators: a key may have such characters, too. For keys whose length nobody
    knows yet."""
    pieces = _PIECE.findall(word)[:PIECES]
    ends = range(1, TOGETHER + 1)
    return {word, *("".join(pieces[i : i + end]) for i in range(len(pieces)) for end in ends if i + end <= len(pieces))}
