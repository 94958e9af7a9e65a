"""Where states of sequences are kept, for models whose layers have some: each after so many whole blocks of some text.

A state is what all tokens so far have left, and there is no way back to an earlier one. So blocks that are found of a text's
beginning are of use up to a place alone whose states were kept when somebody stood there. Such a place is known by the key of the
block that ends there, which stands for all tokens up to it.
"""

from __future__ import annotations

from collections import OrderedDict

from appliance.core.blocks import PoolError

WORTH = 128
"""So many tokens, at least, states must spare to who finds them, or they are not kept: a prompt is cut there and takes one step
more, and others lose a place."""


class Kept:
    """Places ``first .. first + count - 1``. Full ones have a key each; what was used least recently gives way to what comes."""

    def __init__(self, first: int, count: int) -> None:
        self.range, self.worth = range(first, first + count), WORTH
        self._free = list(reversed(self.range))  # the next one last
        self._places: OrderedDict[bytes, int] = OrderedDict()  # least recently used first

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def stops(self, computed: int, *ends: int) -> tuple[int, ...]:
        """Which of these places in a text, in order, are worth keeping beside one another and what is ``computed``: in tokens."""
        found = [computed]
        for end in ends:
            if end - found[-1] >= self.worth:
                found.append(end)
        return tuple(found[1:])

    def use(self, key: bytes) -> int:
        """The place of states that are kept."""
        self._places.move_to_end(key)
        return self._places[key]

    def keep(self, key: bytes) -> int:
        """A place for states that are not kept yet."""
        if key in self._places:
            raise PoolError("states are kept twice")
        place = self._free.pop() if self._free else self._places.popitem(last=False)[1]
        self._places[key] = place
        return place

    def forget(self) -> None:
        """Nothing that is kept will be wanted again."""
        self._free = list(reversed(self.range))
        self._places.clear()

    def items(self) -> list[tuple[bytes, int]]:
        """(key, place) of all that is kept."""
        return list(self._places.items())

    def check(self) -> None:
        """Raises PoolError unless every place is free or has one key."""
        if sorted([*self._free, *self._places.values()]) != [*self.range]:
            raise PoolError(f"states are kept at {sorted(self._places.values())}, and {sorted(self._free)} are free")
