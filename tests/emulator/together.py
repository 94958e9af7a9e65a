"""Instructions in which threads work together, as functions that act on Blocks: matrices, shuffles, reductions, votes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tests.emulator import warp
from tests.emulator.machine import WARP, Array, Blocks, EmulatorError, Execute
from tests.emulator.numbers import decode, encode
from tests.emulator.program import Instruction

WORD = np.dtype("u4")


def _ldmatrix(instruction: Instruction) -> Execute:
    to, address = instruction.operands
    names = to if isinstance(to, tuple) else (to,)
    transposed = "trans" in instruction.name

    def execute(block: Blocks) -> None:
        _whole(block, instruction)
        places = block.address(str(address))
        places = np.where(np.arange(block.threads) % WARP < 8 * len(names), places, 0)
        lines = block.load("shared", places, 16, None, instruction).view("u2")
        for name, value in zip(names, warp.ldmatrix(lines.reshape(-1, WARP, 8), len(names), transposed), strict=True):
            block.write(name, value.reshape(-1), None)

    return execute


def _mma(instruction: Instruction) -> Execute:
    parts = instruction.name
    shape = next(part for part in parts if part.startswith("m") and "n8k" in part)
    kind, result = parts[-2], parts[-1]
    if parts[-4] != result or kind != parts[-3] or not shape.startswith("m16n8"):
        raise KeyError(".".join(parts))
    to, a, b, c = ((one,) if isinstance(one, str) else one for one in instruction.operands)
    if result not in ("f32", "s32", "f16"):
        raise KeyError(".".join(parts))
    sums = np.dtype("i4" if result == "s32" else "f4")

    def execute(block: Blocks) -> None:
        _whole(block, instruction)
        left, right = ([_warps(block, name) for name in names] for names in (a, b))
        if result == "f16":  # two numbers a register
            start = [part for name in c for part in np.moveaxis(warp.spread(_warps(block, name), "f16"), -1, 0)]
        else:
            start = [_warps(block, name).view(sums) for name in c]
        found = warp.mma(shape, kind, left, right, start)
        if result == "f16":
            found = [encode(np.stack(pair, axis=-1), "f16x2") for pair in zip(found[::2], found[1::2], strict=True)]
        for name, value in zip(to, found, strict=True):
            block.write(name, value.reshape(-1), None)

    return execute


def _wgmma(instruction: Instruction) -> Execute:
    """Four warps at once, on what lies in shared memory. Results are there at once: a wait that is missing is not seen."""
    parts = instruction.name
    if parts[1] != "mma_async":
        return lambda block: None
    to, a, b, keep, *rest = instruction.operands
    shape, kind = next(part for part in parts if part.startswith("m64n")), parts[-1]
    outputs, depth = int(shape[4:].partition("k")[0]), int(shape.partition("k")[2])
    flips = [int(str(word)) for word in rest[2:]]  # behind the signs
    by_registers, width = isinstance(a, tuple), 2 if kind in ("f16", "bf16") else 1
    flip_a, flip_b = ([0, *flips] if by_registers else flips) or (0, 0)
    if (rest[:2] not in ([], ["1", "1"])) or parts[-3] not in ("f32", "s32", "f16"):
        raise KeyError(str(instruction))
    total = np.dtype("i8" if parts[-3] == "s32" else "f4")

    def matrices(block: Blocks, descriptors: str, outer: int, flipped: int) -> Array:
        """[warpgroups, outer, depth]."""
        found, told = [], np.broadcast_to(block.read(descriptors, np.dtype("u8")), block.threads)
        for descriptor, base in zip(told[:: 4 * WARP], block.base[:: 4 * WARP], strict=True):
            places = base + warp.descriptor_places(int(descriptor), outer, depth, width, bool(flipped))
            raw = block.shared[width][places // width]
            found.append(decode(raw, kind) if width == 2 else warp.spread(raw.astype("u4"), kind)[..., 0])
        return np.stack(found).astype(total)

    def execute(block: Blocks) -> None:
        _whole(block, instruction)
        groups = block.threads // (4 * WARP)
        if by_registers:
            left = warp.fragment([_warps(block, name) for name in a], kind, depth, total).reshape(groups, 64, depth)
        else:
            left = matrices(block, str(a), 64, flip_a)
        found = (left @ matrices(block, str(b), outputs, flip_b).transpose(0, 2, 1)).reshape(4 * groups, 16, outputs)
        kept = np.broadcast_to(block.predicate(str(keep)), block.threads).reshape(-1, WARP)
        _add(block, found, to, kept, parts[-3])

    return execute


def _add(block: Blocks, found: Array, to: Sequence[str], kept: Array, result: str) -> None:
    """Products [warps, 16, outputs] to the sums in registers, which begin at 0 where they are not ``kept``."""
    for i, name in enumerate(to):
        if result == "f16":  # two numbers a register
            row, column = warp.GROUP + 8 * (i % 2), 8 * (i // 2) + 2 * warp.WITHIN
            before = warp.spread(_warps(block, name), "f16")
            pair = np.stack([found[:, row, column], found[:, row, column + 1]], axis=-1)
            block.write(name, encode(pair + np.where(kept[..., None], before, 0), "f16x2").reshape(-1), None)
            continue
        sums = np.dtype("f4" if result == "f32" else "i4")
        row, column = warp.GROUP + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * warp.WITHIN + i % 2
        before = np.where(kept, _warps(block, name).view(sums), 0)
        block.write(name, (found[:, row, column] + before).astype(sums).reshape(-1), None)


def _stmatrix(instruction: Instruction) -> Execute:
    address, source = instruction.operands
    names = source if isinstance(source, tuple) else (source,)
    transposed = "trans" in instruction.name

    def execute(block: Blocks) -> None:
        _whole(block, instruction)
        places = block.address(str(address)).reshape(-1, WARP)
        for i, name in enumerate(names):
            values = warp.spread_bits(_warps(block, name))
            for j in range(2):
                row, column = (2 * warp.WITHIN + j, warp.GROUP) if transposed else (warp.GROUP, 2 * warp.WITHIN + j)
                at = places[:, 8 * i + row] + 2 * column
                block.store("shared", at.reshape(-1), values[..., j].reshape(-1), None, instruction)

    return execute


def _shuffle(instruction: Instruction) -> Execute:
    target, value, by, clamp, _ = (str(operand) for operand in instruction.operands)
    to, _, inside = target.partition("|")
    mode = instruction.name[2]

    def execute(block: Blocks) -> None:
        _whole(block, instruction)
        found, within = warp.shuffle(mode, _warps(block, value), _warps(block, by), _warps(block, clamp))
        block.write(to.strip(), found.reshape(-1), None)
        if inside:
            block.write(inside.strip(), within.reshape(-1), None)

    return execute


def _reduce(instruction: Instruction) -> Execute:
    to, value, _ = (str(operand) for operand in instruction.operands)
    what, kind = instruction.name[2], instruction.name[-1]

    def execute(block: Blocks) -> None:
        _whole(block, instruction)
        found = warp.reduce(what, decode(_warps(block, value), kind))
        block.write(to, encode(found, kind).reshape(-1), None)

    return execute


def _vote(instruction: Instruction) -> Execute:
    to, chosen, _ = (str(operand) for operand in instruction.operands)
    mode = instruction.name[2]

    def execute(block: Blocks) -> None:
        _whole(block, instruction)
        votes = np.broadcast_to(block.predicate(chosen), block.threads).reshape(-1, WARP)
        if mode == "ballot":
            found = (votes.astype("u8") << np.arange(WARP, dtype="u8")).sum(1, keepdims=True).astype("u4")
        else:
            found = (votes.any if mode == "any" else votes.all)(axis=1, keepdims=True)
        block.write(to, np.broadcast_to(found, votes.shape).reshape(-1).copy(), None)

    return execute


def _warps(block: Blocks, operand: str) -> Array:
    value = block.read(operand, WORD)
    return (value if value.ndim else np.broadcast_to(value, block.threads)).reshape(-1, WARP)


def _whole(block: Blocks, instruction: Instruction) -> None:
    """Whole warps only: what threads get that a part of them has left is undefined on a card."""
    if block.active is not None and not block.active.all() and block.active.any():
        by_warp = block.active.reshape(-1, WARP)
        if (by_warp.any(1) != by_warp.all(1)).any():
            raise EmulatorError(f"not by whole warps: {instruction}")
        raise EmulatorError(f"warps that have parted: {instruction} is not written for that")


SPECIAL: dict[str, Callable[[Instruction], Execute]] = {
    "ldmatrix": _ldmatrix,
    "stmatrix": _stmatrix,
    "mma": _mma,
    "wgmma": _wgmma,
    "shfl": _shuffle,
    "redux": _reduce,
    "vote": _vote,
}
