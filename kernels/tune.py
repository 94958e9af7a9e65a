"""How a product is launched, by its shape: a pure look-up, so that nothing tunes itself while serving."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

MULTIPROCESSORS = 128  # of a card about which nothing was said
TILE = 128
MAX_SPLIT = 8
AMPERE = 80


@dataclass(frozen=True)
class Launch:
    """Rows and outputs of a program, parts into which the inputs are cut, warps of a program, loads under way."""

    block_m: int
    block_n: int
    split: int
    warps: int
    stages: int


def choose(*, rows: int, outputs: int, inputs: int, multiprocessors: int = MULTIPROCESSORS, capability: int = AMPERE) -> Launch:
    """For a product of ``rows`` with a weight [outputs, inputs] on a card with so many multiprocessors of sm_``capability``.

    Few rows: the weight is read once, whatever is done, so programs are small and many, and inputs are split until the card is
    filled twice. Many rows: larger tiles, no split.
    """
    block_m = next(m for m in (16, 32, 64) if rows <= m or m == 64)
    block_n, warps, stages = TILE, 8 if block_m == 64 else 4, 4 if block_m == 16 else 3
    if capability < AMPERE and block_m > 16:  # no asynchronous copies: what is under way waits in registers
        block_n, warps = 64 if block_m == 64 else TILE, 8
    programs = -(-outputs // block_n) * -(-rows // block_m)
    split, most = 1, min(MAX_SPLIT, max(1, inputs // (2 * TILE)))
    while block_m < 64 and 2 * split <= most and programs * split < 2 * multiprocessors:
        split *= 2
    return Launch(block_m, block_n, split, warps, stages)


def choices(capability: int = AMPERE) -> Iterator[Launch]:
    """Every kernel that ``choose`` can ask for, once: whether there are splits changes the kernel, their number does not."""
    seen = set()
    for rows in (1, 17, 33):
        for outputs in (TILE, 1024 * TILE):
            launch = choose(rows=rows, outputs=outputs, inputs=4096, capability=capability)
            key = (launch.block_m, launch.block_n, launch.split > 1, launch.warps, launch.stages)
            if key not in seen:
                seen.add(key)
                yield launch
