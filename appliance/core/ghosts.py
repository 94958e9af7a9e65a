"""What left the pool lately, and which of it host memory should take: all of it, or what comes back.

A host memory that takes whatever the pool evicts finds nothing where more passes through it than it holds before anything is
wanted again. One that takes only what the pool evicts for the second time keeps what is wanted again and again, but never has a
block when it is wanted first. Which of the two would find more here is seen from keys alone: two imaginary memories of the same
size, first in, first out, whose clocks count what they would have taken. (To remember what left is the ghost list of 2Q and ARC;
to let two rules compete by what both would have found, set dueling.)

What is remembered lies in rows of WAYS places, as in a processor's cache: a key's checksum says in which row, and there it takes
the place of what left longest ago. So it takes a fixed number of bytes, and one key in 60,000 is mistaken for another.
"""

from __future__ import annotations

from array import array
from zlib import crc32

REACH = 8
"""Blocks that are remembered, for each one that host memory holds ..."""
MOST = 65536
"""... but not more. Host memory of that many blocks holds all for long enough anyway."""
WAYS = 16
PLACE = 4 + 8 + 8  # bytes: a checksum, and two clocks


def rows(size: int) -> int:
    """Rows for a host memory of ``size`` blocks: of all that is remembered, with the last one filled up."""
    return -(-min(REACH * size, MOST) // WAYS)


def ghost_bytes(size: int) -> int:
    """That Ghosts take for a host memory of ``size`` blocks, from the beginning on."""
    return rows(size) * WAYS * PLACE


class Ghosts:
    """For a host memory of ``size`` blocks."""

    def __init__(self, size: int) -> None:
        self.size, self._rows = size, rows(size)
        self._everything = self._returning = 0  # blocks that the two imaginary memories have taken
        self._balance = 0  # how many more the first one would have had; at most ``size`` either way, so that it follows changes
        self.forget()

    def __len__(self) -> int:
        return len(self._marks) - self._marks.count(0)

    def leaves(self, key: bytes) -> bool:
        """A block leaves the pool. Whether it should take another one's place in host memory."""
        mark = crc32(key) or 1
        begin = mark % self._rows * WAYS
        row = self._marks[begin : begin + WAYS]
        first = second = False
        if known := mark in row:
            place = begin + row.index(mark)
            returning, again = divmod(self._left_returning[place], 2)
            first = self._everything - self._left_everything[place] <= self.size
            second = bool(again) and self._returning - returning <= self.size
        else:
            ages = self._left_everything[begin : begin + WAYS]
            place = begin + ages.index(min(ages))
        self._balance = max(-self.size, min(self._balance + first - second, self.size))
        self._everything += not first
        self._returning += known and not second
        self._marks[place] = mark
        self._left_everything[place] = self._everything
        self._left_returning[place] = 2 * self._returning + known
        return known or self._balance > 0

    def forget(self) -> None:
        """The keys mean nothing any more."""
        places = self._rows * WAYS
        self._marks = array("I", [0]) * places  # a block's checksum; 0: nobody
        self._left_everything = array("q", [0]) * places  # when it left last, on the one clock
        self._left_returning = array("q", [0]) * places  # and twice that on the other; one more if it had left before
