"""How a product is launched, by its shape: a pure look-up, so that nothing tunes itself while serving.

Cards that scripts/tune was run on have a table (kernels/configs); other cards, shapes and numbers of rows take the rule here::

    rows      1 .. 64     small tiles (tiled.py); few rows are split over the inputs until the card is filled twice
             65 .. 256    large tiles (many.py), in an order in which a tile of the weight is read once
            257 ..        the weight is expanded for torch's product (slab.py), which is faster than any tile where a card
                          multiplies fast; GeForce cards stay with tiles, which keep up with them and need no workspace
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from kernels.configs import Launch, table, tables
from kernels.layout import TRITON_SPLIT_OUTPUTS, TRITON_SPLIT_ROWS, triton_expert_blocks

__all__ = ["AMPERE", "MULTIPROCESSORS", "Launch", "choices", "choose", "choose_experts"]

MULTIPROCESSORS = 128  # of a card about which nothing was said
TILE = 128
MAX_SPLIT = 8
AMPERE, HOPPER, CONSUMER = 80, 90, 120
DATACENTRE = (80, 90, 100, 103)  # products with sums in float32 are as fast as others there
GEFORCE = (86, 89, 120)  # and here half as fast
SMALL_ROWS, FUSED_ROWS = 64, 256
GROUP = 8  # tiles of rows


def choose(
    *,
    rows: int,
    outputs: int,
    inputs: int,
    kind: str = "",
    multiprocessors: int = MULTIPROCESSORS,
    capability: int = AMPERE,
    name: str = "",
    half: bool = False,
) -> Launch:
    """For a product of ``rows`` with a weight [outputs, inputs] of a ``kind`` ("w4 fp16", see kernels.configs) on a card.

    The card: its number of multiprocessors, sm_``capability``, and the ``name`` by which the driver knows it. half: sums in
    float16 are asked for (kernels/triton/half.py), where they are faster.
    """
    measured = table(name) if name else None
    found = measured.find(kind, outputs, inputs, rows) if measured else None
    if found is not None:
        return found if half or not found.half else replace(found, half=False)
    if rows > SMALL_ROWS:
        found = _many(rows, outputs, multiprocessors, capability)
        return replace(found, half=half and found.group > 0 and capability in GEFORCE)
    return _few(rows, outputs, inputs, kind, multiprocessors, capability)


def _few(rows: int, outputs: int, inputs: int, kind: str, multiprocessors: int, capability: int) -> Launch:
    """The weight is read once, whatever is done, so programs are small and many.

    Tiles of 64 rows multiply more than they read: they fill the card once, with as many parts as the memory plan has room for.
    """
    block_m = next(m for m in (16, 32, 64) if rows <= m or m == 64)
    block_n, warps = TILE, 8 if block_m == 64 and not tall(capability) else 4
    # Tiles of 8 bits are twice as large: with three under way two programs fit a card of 100 KB, and more is under way in all.
    stages = 4 if block_m == 16 and not kind.startswith("w8") else 3
    if capability < AMPERE and block_m > 16:  # no asynchronous copies: what is under way waits in registers
        block_n, warps = 64 if block_m == 64 else TILE, 8
    programs, enough = -(-outputs // block_n) * -(-rows // block_m), multiprocessors if block_m == 64 else 2 * multiprocessors
    return Launch(block_m, block_n, parts(rows, outputs, inputs, programs, enough), warps, stages)


def choose_experts(
    *,
    rows: int,
    experts: int,
    active: int,
    outputs: int,
    inputs: int,
    kind: str,
    gated: bool,
    multiprocessors: int = MULTIPROCESSORS,
    capability: int = AMPERE,
) -> Launch:
    """For ``rows`` tokens that go to ``active`` of so many weights [outputs, inputs] each (kernels/triton/experts.py).

    It changes with powers of two of the rows alone. Tiles have about as many rows as come to an expert in the mean, and the same
    for both products; they are narrower, and not gated ones split, where else the card would not be filled twice.
    """
    rows = 1 << (rows - 1).bit_length()
    pairs = rows * active
    block_m = 8 if rows <= 8 else 16 if pairs <= 8 * experts else 32 if pairs <= 32 * experts else 64
    block_n, warps = TILE, 8 if block_m == 64 and not tall(capability) else 4
    stages = 4 if block_m <= 16 and kind.startswith("w4") else 3
    if capability < AMPERE and block_m > 16:  # as in _few: what is under way waits in registers
        block_m, block_n, warps = 32, 64, 8
    blocks, split = triton_expert_blocks(rows, experts, active, block_m), 1
    if block_m <= 16 and blocks * -(-outputs // TILE) < 2 * multiprocessors:
        block_n, warps = 64, 2
    most = min(MAX_SPLIT, max(1, inputs // (2 * TILE)), TRITON_SPLIT_ROWS // pairs)
    while not gated and 2 * split <= most and blocks * -(-outputs // block_n) * split < 2 * multiprocessors:
        split *= 2
    return Launch(block_m, block_n, split, warps, stages)


def parts(rows: int, outputs: int, inputs: int, programs: int, enough: int) -> int:
    """A power of two, into which the inputs are cut until there are ``enough`` programs, as far as the memory plan has room."""
    split, most = 1, min(MAX_SPLIT, max(1, inputs // (2 * TILE)), TRITON_SPLIT_ROWS // rows)
    while outputs < TRITON_SPLIT_OUTPUTS and 2 * split <= most and programs * split < enough:
        split *= 2
    return split


def _many(rows: int, outputs: int, multiprocessors: int, capability: int) -> Launch:
    """The larger tiles where they fill the card once; yet larger ones would leave a multiprocessor one program at a time."""
    if expands(rows, capability):
        return Launch(TILE, TILE, 1, 8, 1, slab=True)
    if -(-rows // 64) * -(-outputs // TILE) >= multiprocessors:
        return Launch(64, TILE, 1, 4 if tall(capability) else 8, 3, GROUP)
    return Launch(64, 64, 1, 4, 3, GROUP)


def tall(capability: int) -> bool:
    """Whether four warps multiply 64 rows by one instruction, with half the instructions of eight warps for a weight."""
    return HOPPER <= capability < CONSUMER


def expands(rows: int, capability: int) -> bool:
    """Whether a weight is expanded for so many rows."""
    if capability < AMPERE:  # Triton's own products are slow there: they do not reach the tensor cores
        return rows > SMALL_ROWS
    return rows > FUSED_ROWS and capability in DATACENTRE


def choices(capability: int = AMPERE, kind: str = "") -> Iterator[Launch]:
    """Every kernel that ``choose`` can ask for on such a card, tables too, each once: the number of splits changes none.

    For weights of a ``kind``; tables' launches are given for any.
    """
    by_rule = [
        choose(rows=rows, outputs=outputs, inputs=4096, kind=kind, capability=capability, half=half)
        for half in (False, True)
        for rows in (1, 17, 33, 65, 129, 257)
        for outputs in (TILE, MULTIPROCESSORS * 64, 1024 * TILE)
    ]
    measured = [
        launch for one in tables() if one.capability == capability for sizes in one.launches.values() for _, launch in sizes
    ]
    measured += [replace(launch, half=False) for launch in measured if launch.half]
    yield from dict.fromkeys(replace(launch, split=min(launch.split, 2)) for launch in (*by_rule, *measured))
