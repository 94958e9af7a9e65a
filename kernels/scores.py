"""How a router's products become scores, by which experts are chosen and have their shares. No torch."""

from __future__ import annotations

from typing import NamedTuple

MOST_GROUPS = 64  # that native kernels know (native/types.h)


class Scores(NamedTuple):
    """A softmax over all experts, or what else there is."""

    sigmoid: bool = False  # of each product by itself
    groups: int = 1  # experts stand in so many groups, one behind another
    chosen_groups: int = 1  # of which a token goes to so many: those whose largest scores have the largest sums
    best: int = 2  # of so many of a group's scores, 1 or 2
    least: float = 0.0  # sigmoids, and corrected scores, that are made to add up to 1 are divided by no less than this
    scale: float = 1.0  # shares are multiplied with this at last


SOFTMAX = Scores()
