"""The pool of KV blocks: who holds which, what the others still contain, and where the next one should be.

A block is used (somebody refers to it), kept (nobody does, but what it contains has a key and may be wanted again), or blank::

    blank --allocate--> used --release--> blank, or kept where it was registered under a key
                        used <--share---- kept --(least recently used, when room is needed)--> blank

Used blocks of one sequence lie in long runs where they can.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

_BLANK, _USED, _KEPT = b"\1", b"\0", b"\2"
_SIGNS = bytes.maketrans(bytes(range(4)), b"#.+&")
_IS_USED = bytes(state == 0 for state in range(256))


class PoolError(RuntimeError):
    """The books of the pool are wrong: a block released twice, an id that was never given out, a failed check()."""


class BlockPool:
    """``num_blocks`` blocks of ``block_size`` tokens with a reference count each. Ids are 0 .. num_blocks - 1.

    ``evicting`` is called with (block, key) before a kept block becomes blank, while it still contains what the key says.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise PoolError(f"a pool needs at least one block of one token, got {num_blocks} blocks of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.free = num_blocks  # blank and kept ones
        self.shared = 0  # used ones with more than one reference
        self.evicting: Callable[[int, bytes], None] | None = None
        self._map = bytearray(_BLANK) * num_blocks  # bytearray.find over it runs at C speed
        self._counts = [0] * num_blocks
        self._keys: dict[int, bytes] = {}
        self._places: dict[bytes, int] = {}  # the reverse of _keys
        self._kept: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._cursor = 0  # next fit: where the search for a new run starts
        self._longest = num_blocks  # no gap of blank blocks is longer

    @property
    def used(self) -> int:
        return self.num_blocks - self.free

    @property
    def kept(self) -> int:
        return len(self._kept)

    @property
    def references(self) -> Sequence[int]:
        """How many there are to each block: to be looked at."""
        return self._counts

    def allocate(self, n: int, *, after: int | None = None, expect: int = 0) -> list[int] | None:
        """``n`` blocks with one reference each, or None (and nothing changed) when fewer are free.

        ``after`` is the sequence's last block: its neighbours are taken while they are blank. A new run is placed with room
        for ``expect`` blocks: how many, these ``n`` included, the sequence may still come to need.
        """
        if n < 0:
            raise PoolError(f"cannot allocate {n} blocks")
        if n > self.free:
            return None
        while self.free - len(self._kept) < n:
            self._evict()
        blocks = [] if after is None else self._take(after + 1, n)
        while len(blocks) < n:
            want = n - len(blocks)
            blocks += self._take(self._seat(want, expect - len(blocks)), want)
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """One more reference to each block; every one must be used or kept."""
        for block in blocks:
            if block in self._kept:
                del self._kept[block]
                self._map[block] = 0
                self.free -= 1
            else:
                self._used_or_raise(block, "share")
            self._counts[block] += 1
            self.shared += self._counts[block] == 2

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less to each block. Of those that nobody refers to now, the last ones go first when room is needed."""
        for block in reversed(blocks):
            self._used_or_raise(block, "release")
            self._counts[block] -= 1
            if self._counts[block] == 1:
                self.shared -= 1
            elif self._counts[block] == 0:
                self.free += 1
                if block in self._keys:
                    self._map[block] = 2
                    self._kept[block] = None
                else:
                    self._map[block] = 1
                    self._longest = self.num_blocks

    def holders(self, block: int) -> int:
        """How many references there are to a block."""
        return self._counts[block]

    def register(self, block: int, key: bytes) -> bool:
        """A used block now contains what ``key`` stands for. False, and nothing changed, where it or another already has one."""
        self._used_or_raise(block, "register")
        if key in self._places or block in self._keys:
            return False
        self._keys[block], self._places[key] = key, block
        return True

    def find(self, key: bytes) -> int | None:
        """The block, used or kept, that contains what ``key`` stands for."""
        return self._places.get(key)

    def forget(self) -> None:
        """Nothing that any block contains will be wanted again."""
        for block in self._kept:
            self._map[block] = 1
        self._longest = self.num_blocks
        self._kept.clear()
        self._keys.clear()
        self._places.clear()

    def map(self, width: int) -> str:
        """The pool as text: a character a block, or of ``width`` that are evenly sampled.

        "." blank, "+" kept, "#" used, "&" used with more than one reference.
        """
        n, counts = self.num_blocks, self._counts
        blocks = range(n) if n <= width else [i * n // width for i in range(width)]
        sample = bytearray(self._map) if n <= width else bytearray(self._map[block] for block in blocks)
        if self.shared:
            for place, block in enumerate(blocks):
                if counts[block] > 1:
                    sample[place] = 3
        return sample.translate(_SIGNS).decode()

    def check(self) -> None:
        """Raises PoolError unless blank + kept + used = all, no count is negative, and map, counts, keys and total agree."""
        counts, marks, keys = self._counts, self._map, self._keys
        blank, kept, used = marks.count(_BLANK), marks.count(_KEPT), marks.count(_USED)
        if not len(marks) == len(counts) == self.num_blocks:
            raise PoolError(f"{self.num_blocks} blocks, but a map of {len(marks)} and {len(counts)} counts")
        if blank + kept != self.free or blank + kept + used != self.num_blocks:
            raise PoolError(f"{self.free} blocks counted free, {blank + kept} of {self.num_blocks} marked free")
        if min(counts) < 0 or bytes(map(bool, counts)) != marks.translate(_IS_USED):
            for block, count in enumerate(counts):
                if count < 0 or (count == 0) != (marks[block] != 0):
                    state = "free" if marks[block] else "used"
                    raise PoolError(f"block {block} has {count} references and is marked {state}")
        if self.shared != (shared := len(counts) - counts.count(0) - counts.count(1)):
            raise PoolError(f"{self.shared} blocks counted shared, {shared} are")
        if not (keys or self._places or self._kept or kept):
            return  # as without a prefix cache
        if dict(zip(keys.values(), keys)) != self._places or len(keys) != len(self._places):
            raise PoolError("the keys of blocks and the blocks of keys disagree")
        listed = bytes(map(marks.__getitem__, self._kept))
        if not len(listed) == listed.count(_KEPT) == kept or not self._kept.keys() <= keys.keys():
            raise PoolError(f"{kept} blocks are marked kept, {len(listed)} listed, {len(keys)} have keys")
        if _BLANK in bytes(map(marks.__getitem__, keys)):
            raise PoolError("a blank block has a key")

    def _evict(self) -> None:
        """The least recently used of the kept blocks becomes blank."""
        block = next(iter(self._kept))
        key = self._keys[block]
        if self.evicting is not None:
            self.evicting(block, key)
        del self._kept[block], self._keys[block], self._places[key]
        self._map[block] = 1
        self._longest = self.num_blocks

    def _take(self, start: int, most: int) -> list[int]:
        """Take the blank blocks from ``start`` on, up to the first other one, at most ``most``."""
        stop = min(start + most, self.num_blocks)
        blank = self._map[start:stop]
        stop = start + len(blank) - len(blank.lstrip(_BLANK))
        blocks = list(range(start, stop))
        self._map[start:stop] = bytes(len(blocks))
        self._counts[start:stop] = [1] * len(blocks)
        self.free -= len(blocks)
        return blocks

    def _seat(self, want: int, expect: int) -> int:
        """Where to start a new run: at the cursor if all that may be needed fits there, else amid about the longest gap."""
        room = min(max(want, expect), self.free - len(self._kept), self._longest)
        needle = _BLANK * room
        for start in (self._cursor, 0):
            if self._map.startswith(needle, start):
                self._cursor = start + room
                return start
        while (start := self._map.find(needle)) < 0:
            self._longest = room - 1
            room = room * 3 // 4
            needle = needle[:room]
        rest = self._map[start:]
        gap = len(rest) - len(rest.lstrip(_BLANK))
        return start + max(0, gap - want) // 2  # the middle: the sequence that ends before the gap keeps room to grow

    def _used_or_raise(self, block: int, verb: str) -> None:
        if not 0 <= block < self.num_blocks:
            raise PoolError(f"cannot {verb} block {block}: the pool has blocks 0 .. {self.num_blocks - 1}")
        if self._counts[block] <= 0:
            raise PoolError(f"cannot {verb} block {block}: it is free")
