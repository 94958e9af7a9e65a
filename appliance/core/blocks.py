"""The pool of KV blocks: who holds which, and where the next one should be so that a sequence lies in long runs."""

from __future__ import annotations

from collections.abc import Sequence

_FREE, _USED = b"\1", b"\0"


class PoolError(RuntimeError):
    """The books of the pool are wrong: a block released twice, an id that was never given out, a failed check()."""


class BlockPool:
    """``num_blocks`` blocks of ``block_size`` tokens with a reference count each. Ids are 0 .. num_blocks - 1."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise PoolError(f"a pool needs at least one block of one token, got {num_blocks} blocks of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.free = num_blocks
        self._map = bytearray(_FREE) * num_blocks  # bytearray.find over it runs at C speed
        self._counts = [0] * num_blocks
        self._cursor = 0  # next fit: where the search for a new run starts

    @property
    def used(self) -> int:
        return self.num_blocks - self.free

    def allocate(self, n: int, *, after: int | None = None, expect: int = 0) -> list[int] | None:
        """``n`` blocks with one reference each, or None (and nothing changed) when fewer are free.

        ``after`` is the sequence's last block: its neighbours are taken while they are free. A new run is placed with room
        for ``expect`` blocks: how many, these ``n`` included, the sequence may still come to need.
        """
        if n < 0:
            raise PoolError(f"cannot allocate {n} blocks")
        if n > self.free:
            return None
        blocks = [] if after is None else self._take(after + 1, n)
        while len(blocks) < n:
            want = n - len(blocks)
            blocks += self._take(self._seat(want, expect - len(blocks)), want)
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """One more reference to each block; every one must be in use."""
        for block in blocks:
            self._used_or_raise(block, "share")
            self._counts[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less to each block; a block nobody refers to is free again."""
        for block in blocks:
            self._used_or_raise(block, "release")
            self._counts[block] -= 1
            if self._counts[block] == 0:
                self._map[block] = 1
                self.free += 1

    def map(self, width: int) -> str:
        """The pool as text, "." free and "#" used: a character a block, or ``width`` evenly sampled blocks of a larger pool."""
        n = self.num_blocks
        sample = bytes(self._map) if n <= width else bytes(self._map[i * n // width] for i in range(width))
        return sample.replace(_FREE, b".").replace(_USED, b"#").decode()

    def check(self) -> None:
        """Raises PoolError unless free + used = all, no count is negative, and map, counts and total agree."""
        marked = self._map.count(_FREE)
        if not len(self._map) == len(self._counts) == self.num_blocks:
            raise PoolError(f"{self.num_blocks} blocks, but a map of {len(self._map)} and {len(self._counts)} counts")
        if marked != self.free or marked + self._map.count(_USED) != self.num_blocks:
            raise PoolError(f"{self.free} blocks counted free, {marked} of {self.num_blocks} marked free")
        for block, count in enumerate(self._counts):
            if count < 0 or (count == 0) != (self._map[block] == 1):
                raise PoolError(f"block {block} has {count} references and is marked {'free' if self._map[block] else 'used'}")

    def _take(self, start: int, most: int) -> list[int]:
        """Take the free blocks from ``start`` on, up to the first used one, at most ``most``."""
        stop = min(start + most, self.num_blocks)
        first_used = self._map.find(_USED, start, stop)
        stop = stop if first_used < 0 else first_used
        blocks = list(range(start, stop))
        self._map[start:stop] = bytes(len(blocks))
        self._counts[start:stop] = [1] * len(blocks)
        self.free -= len(blocks)
        return blocks

    def _seat(self, want: int, expect: int) -> int:
        """Where to start a new run: at the cursor if all that may be needed fits there, else amid about the longest gap."""
        room = min(max(want, expect), self.free)
        needle = _FREE * room
        for start in (self._cursor, 0):
            if self._map.startswith(needle, start):
                self._cursor = start + room
                return start
        while (start := self._map.find(needle)) < 0:
            room = room * 3 // 4
            needle = needle[:room]
        end = self._map.find(_USED, start)
        gap = (end if end >= 0 else self.num_blocks) - start
        return start + max(0, gap - want) // 2  # the middle: the sequence that ends before the gap keeps room to grow

    def _used_or_raise(self, block: int, verb: str) -> None:
        if not 0 <= block < self.num_blocks:
            raise PoolError(f"cannot {verb} block {block}: the pool has blocks 0 .. {self.num_blocks - 1}")
        if self._counts[block] <= 0:
            raise PoolError(f"cannot {verb} block {block}: it is free")
