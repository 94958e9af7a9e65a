"""Where the inputs of a step lie in the one stretch of memory in which they travel to a card: pure arithmetic, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

STAGED_BLOCKS = 8
"""Blocks that are on their way between a card and its host at a time: they have a place on the card."""
ALIGN = 64  # bytes: a kernel is compiled anew for a pointer of another alignment, so all have the same one


def offsets(sizes: Sequence[int]) -> list[int]:
    """Where parts of so many bytes begin, one behind the other, and at last where all of them end."""
    return list(accumulate((-(-size // ALIGN) * ALIGN for size in sizes), initial=0))


def input_bytes(
    tokens: int, sequences: int, width: int, *, states: bool = False, wanted: bool = False, adapters: bool = False
) -> int:
    """At most these bytes have a step's inputs: appliance/runtime/batch.py's StepArrays and Draws.

    ``width``: blocks of the longest sequence; ``states``: whether sequences have them, and so a seat; ``wanted``: whether it is
    said which rows are, as of models whose last layers store nothing; ``adapters``: the same of rows with adapters. The card has
    them once, the host twice.
    """
    step = [8 * tokens] * 3 + [4 * (sequences + 1), 4 * sequences, 4 * sequences * width, 8 * sequences]
    step += [8 * tokens, 4 * (sequences + 1)] * wanted + [8 * tokens] * adapters
    return offsets([*step, *[4 * sequences] * states, *[8 * sequences] * 5])[-1]
