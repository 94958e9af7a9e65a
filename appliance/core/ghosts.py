"""What left the pool lately, and which of it host memory should take: all of it, or what comes back.

A host memory that takes whatever the pool evicts finds nothing where more passes through it than it holds before anything is
wanted again. One that takes only what the pool evicts for the second time keeps what is wanted again and again, but never has a
block when it is wanted first. Which of the two would find more here is seen from keys alone: two imaginary memories of the same
size, first in, first out, whose clocks count what they would have taken. (To remember what left is the ghost list of 2Q and ARC;
to let two rules compete by what both would have found, set dueling.)
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

REACH = 8
"""Blocks that are remembered, for each one that host memory holds ..."""
MOST = 65536
"""... but not more: an entry takes about 250 bytes. Host memory of that many blocks holds all for long enough anyway."""


class Ghost(NamedTuple):
    """When a block left the pool last, on both clocks."""

    everything: int
    returning: int
    again: bool  # it had left before


class Ghosts:
    """For a host memory of ``size`` blocks."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._left: OrderedDict[bytes, Ghost] = OrderedDict()  # the last one to leave last
        self._everything = self._returning = 0  # blocks that the two imaginary memories have taken
        self._balance = 0  # how many more the first one would have had; at most ``size`` either way, so that it follows changes

    def __len__(self) -> int:
        return len(self._left)

    def leaves(self, key: bytes) -> bool:
        """A block leaves the pool. Whether it should take another one's place in host memory."""
        ghost = self._left.pop(key, None)
        first = ghost is not None and self._everything - ghost.everything <= self.size
        second = ghost is not None and ghost.again and self._returning - ghost.returning <= self.size
        self._balance = max(-self.size, min(self._balance + first - second, self.size))
        self._everything += not first
        self._returning += ghost is not None and not second
        self._left[key] = Ghost(self._everything, self._returning, ghost is not None)
        if len(self._left) > min(REACH * self.size, MOST):
            self._left.popitem(last=False)
        return ghost is not None or self._balance > 0

    def forget(self) -> None:
        """The keys mean nothing any more."""
        self._left.clear()
