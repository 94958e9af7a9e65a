"""Bits for units from a budget: each gets one of its widths, so that together they cost least and take no more. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

MOST = 1 << 15  # combinations that are kept: where there are more, one for each of so many equal steps of size


@dataclass(frozen=True)
class Front:
    """The combinations that are worth a thought: whatever takes no more than one of them costs no less. By rising size."""

    sizes: np.ndarray  # int64, rising
    costs: np.ndarray  # float64, falling
    _choices: dict[str, tuple[tuple[int, ...], np.ndarray, np.ndarray]]  # by unit: its widths; the one taken; the one before

    @classmethod
    def of(cls, costs: Mapping[str, Mapping[int, float]], sizes: Mapping[str, Mapping[int, int]]) -> Front:
        """``costs`` and ``sizes`` by unit and width, both of the same units and widths.

        Unit by unit all sums are made and the dominated ones left out (Nemhauser and Ullmann 1969), so it is exact as long as
        there are no more than MOST.
        """
        total, loss = np.zeros(1, np.int64), np.zeros(1)
        choices = {}
        top = sum(max(of.values()) for of in sizes.values())
        for unit, own in costs.items():
            widths = tuple(sorted(own))
            each = np.concatenate([total + sizes[unit][width] for width in widths])
            lost = np.concatenate([loss + own[width] for width in widths])
            kept = _undominated(each, lost, top)
            choices[unit] = (widths, (kept // len(total)).astype(np.int8), (kept % len(total)).astype(np.int32))
            total, loss = each[kept], lost[kept]
        return cls(total, loss, choices)

    def within(self, budget: int) -> int | None:
        """The number of the best combination that takes no more than ``budget``; None where there is none."""
        found = int(np.searchsorted(self.sizes, budget, side="right")) - 1
        return found if found >= 0 else None

    def bits(self, number: int) -> dict[str, int]:
        """Combination ``number``: the width of each unit."""
        found = {}
        for unit, (widths, taken, before) in reversed(self._choices.items()):
            found[unit] = widths[taken[number]]
            number = int(before[number])
        return dict(reversed(found.items()))


def _undominated(sizes: np.ndarray, costs: np.ndarray, top: int) -> np.ndarray:
    """Which to keep, by rising size: each costs less than all that are smaller; at most MOST over sizes up to ``top``."""
    order = np.lexsort((costs, sizes))
    least = np.minimum.accumulate(costs[order])
    kept = order[np.concatenate([[True], least[1:] < least[:-1]])]
    if len(kept) > MOST:
        step = sizes[kept] * MOST // max(top, 1)
        kept = kept[np.concatenate([step[1:] != step[:-1], [True]])]  # the last of each step costs least
    return kept


def allot(costs: Mapping[str, Mapping[int, float]], sizes: Mapping[str, Mapping[int, int]], budget: int) -> dict[str, int] | None:
    """The widths by unit whose costs add up to least among those whose sizes make no more than ``budget``; None: nothing does."""
    front = Front.of(costs, sizes)
    found = front.within(budget)
    return None if found is None else front.bits(found)
