"""What a multiprocessor of each architecture holds at a time, and how much of it a kernel fills."""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32  # threads
PARTITIONS = 4  # of a multiprocessor, each with a quarter of its registers
REGISTERS = 65536
REGISTER_UNIT = 256  # registers are given to warps in such pieces


@dataclass(frozen=True)
class Card:
    """Limits of an architecture, and a card that has it.

    Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
    """

    name: str
    multiprocessors: int  # of that card
    warps: int
    blocks: int
    shared: int  # bytes
    shared_of_block: int  # bytes that one block may have
    shared_unit: int  # bytes
    reserved: int  # bytes of shared memory that the system takes for each block


_K = 1024
CARDS = {
    75: Card("RTX 2080 Ti", 68, 32, 16, 64 * _K, 64 * _K, 256, 0),
    80: Card("A100", 108, 64, 32, 164 * _K, 163 * _K, 128, _K),
    86: Card("RTX 3090", 82, 48, 16, 100 * _K, 99 * _K, 128, _K),
    89: Card("RTX 4090", 128, 48, 24, 100 * _K, 99 * _K, 128, _K),
    90: Card("H200", 132, 64, 32, 228 * _K, 227 * _K, 128, _K),
    120: Card("RTX 5090", 170, 48, 24, 100 * _K, 99 * _K, 128, _K),
}


@dataclass(frozen=True)
class Occupancy:
    """Blocks and warps that a multiprocessor runs at a time, of the warps that it could, and what forbids another block."""

    blocks: int
    warps: int
    share: float
    limit: str  # registers, shared memory, warps or blocks


def occupancy(target: int, *, registers: int, shared: int, warps: int) -> Occupancy:
    """Of a kernel with so many registers a thread, bytes of shared memory and warps a block. No blocks: it cannot be launched.

    As cuda_occupancy.h of the CUDA toolkit computes it: a warp's registers are rounded up, and must lie in one partition.
    """
    card = CARDS[target]
    of_warp = _rounded(registers * WARP, REGISTER_UNIT)
    of_block = _rounded(shared + card.reserved, card.shared_unit)
    room = {
        "registers": REGISTERS // PARTITIONS // of_warp * PARTITIONS // warps,
        "shared memory": card.shared // max(of_block, 1) if shared <= card.shared_of_block else 0,
        "warps": card.warps // warps,
        "blocks": card.blocks,
    }
    limit = min(room, key=room.__getitem__)
    return Occupancy(room[limit], room[limit] * warps, room[limit] * warps / card.warps, limit)


def _rounded(n: int, unit: int) -> int:
    return -(-n // unit) * unit
