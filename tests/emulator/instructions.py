"""Instructions as functions that act on a Block."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.emulator import warp
from tests.emulator.arithmetic import meaning
from tests.emulator.machine import WARP, Array, Block, EmulatorError, Execute
from tests.emulator.numbers import decode, encode, size, storage
from tests.emulator.program import Instruction, Program

WORD = np.dtype("u4")


def build(program: Program) -> list[Execute]:
    """KeyError for an instruction that is not known."""
    return [_one(instruction, program) for instruction in program.code]


def _one(instruction: Instruction, program: Program) -> Execute:
    name = instruction.name
    if name[0] in ("bra", "ret", "exit"):
        return _control(instruction, program)
    if name[0] == "mov" and any(isinstance(operand, tuple) for operand in instruction.operands):
        return _repack(instruction)
    if name[0] == "mov":
        return _move(instruction)
    if name[:2] == ("ld", "param"):
        return _parameter(instruction)
    if name[0] in ("ld", "st"):
        return _memory(instruction)
    if name[0] in SPECIAL:
        return SPECIAL[name[0]](instruction)
    return _compute(instruction)


def _control(instruction: Instruction, program: Program) -> Execute:
    guard, negated = instruction.guard, instruction.negated
    if instruction.name[0] != "bra":
        return lambda block: block.end(block.mask(guard, negated))
    target = program.labels[str(instruction.operands[0])]
    return lambda block: block.branch(block.mask(guard, negated), target)


def _compute(instruction: Instruction) -> Execute:
    inputs, output, compute = meaning(instruction.name)
    to, *operands = (str(operand) for operand in instruction.operands)
    guard, negated = instruction.guard, instruction.negated
    kinds = [storage(kind) for kind in inputs]

    def execute(block: Block) -> None:
        values = [_read(block, operand, kind, raw) for operand, kind, raw in zip(operands, inputs, kinds, strict=True)]
        found = encode(compute(*values), output)
        if output[0] == "s":  # a wider register takes the sign along
            found = found.view(f"i{found.itemsize}")
        block.write(to, found, block.mask(guard, negated))

    return execute


def _read(block: Block, operand: str, kind: str, raw: np.dtype) -> Array:
    if operand.startswith("!"):
        return ~block.read(operand[1:], raw)
    return decode(block.read(operand, raw), kind)


def _move(instruction: Instruction) -> Execute:
    to, source = (str(operand) for operand in instruction.operands)
    kind, guard, negated = storage(instruction.name[-1]), instruction.guard, instruction.negated
    return lambda block: block.write(to, block.read(source, kind), block.mask(guard, negated))


def _repack(instruction: Instruction) -> Execute:
    to, source = instruction.operands
    guard, negated, whole = instruction.guard, instruction.negated, storage(instruction.name[-1])

    def execute(block: Block) -> None:
        mask = block.mask(guard, negated)
        if isinstance(to, tuple):
            value = block.read(str(source), whole)
            bits = 8 * whole.itemsize // len(to)
            for i, name in enumerate(to):
                block.write(name, (value >> np.array(i * bits, whole)).astype(f"u{bits // 8}"), mask)
            return
        part = np.dtype(f"u{whole.itemsize // len(source)}")
        found = np.zeros((), whole)
        for i, name in enumerate(source):
            found = found | block.read(name, part).astype(whole) << np.array(8 * i * part.itemsize, whole)
        block.write(str(to), found, mask)

    return execute


def _parameter(instruction: Instruction) -> Execute:
    to, kind = str(instruction.operands[0]), storage(instruction.name[-1])
    name = str(instruction.operands[1])[1:-1].partition("+")[0].strip()
    return lambda block: block.write(to, np.array(block.values[name] & ((1 << 8 * kind.itemsize) - 1), dtype=kind), None)


def _memory(instruction: Instruction) -> Execute:
    name, guard, negated = instruction.name, instruction.guard, instruction.negated
    space = "shared" if any(part.startswith("shared") for part in name) else "global"
    if space == "global" and "global" not in name:
        raise KeyError(".".join(name))
    kind = name[-1]
    vector = next((int(part[1:]) for part in name[1:-1] if part in ("v2", "v4", "v8")), 1)
    width, signed = size(kind), np.dtype(f"i{size(kind)}") if kind[0] == "s" else storage(kind)
    address, data = instruction.operands[:2] if name[0] == "st" else instruction.operands[1::-1]
    names = data if isinstance(data, tuple) else (data,)
    if len(names) != vector:
        raise KeyError(str(instruction))

    def execute(block: Block) -> None:
        mask = block.mask(guard, negated)
        places = block.address(str(address))
        if vector > 1:  # the whole vector is one access
            live = places if mask is None else places[mask]
            if (live % (width * vector)).any():
                raise EmulatorError(f"addresses are not multiples of {width * vector}: {instruction}")
        if name[0] == "st":
            for i, one in enumerate(names):
                block.store(space, places + i * width, block.read(one, storage(kind)), mask, instruction)
            return
        for i, one in enumerate(names):
            found = block.load(space, places + i * width, width, mask, instruction)
            block.write(one, found.view(signed), mask)

    return execute


def _copy(instruction: Instruction) -> Execute:
    """cp.async: the bytes that are there now arrive when they are waited for; beyond the source's size come zeros."""
    name = instruction.name
    if name[2] == "commit_group":
        return lambda block: block.commit()
    if name[2] in ("wait_group", "wait_all"):
        left = int(str(instruction.operands[0]), 0) if instruction.operands else 0
        return lambda block: block.wait(left)
    to, source, length, *given = (str(operand) for operand in instruction.operands)
    size_of, guard, negated = int(length, 0), instruction.guard, instruction.negated

    def execute(block: Block) -> None:
        mask = block.mask(guard, negated)
        live = np.ones(block.threads, dtype=bool) if mask is None else mask
        places, sources = block.address(to), block.address(source)
        sizes = np.full(block.threads, size_of)
        if given and not given[0].startswith("%rd"):
            sizes = np.broadcast_to(block.read(given[0], WORD), block.threads).astype("i8")
        if (places[live] % size_of).any() or (sources[live & (sizes > 0)] % size_of).any():
            raise EmulatorError(f"addresses are not multiples of {size_of}: {instruction}")
        words = [
            (places + i, block.load("global", sources + i, 4, live & (sizes > i), instruction)) for i in range(0, size_of, 4)
        ]

        def arrive() -> None:
            for at, word in words:
                block.store("shared", at, word, live, instruction)

        block.copy_later(arrive)

    return execute


def _ldmatrix(instruction: Instruction) -> Execute:
    to, address = instruction.operands
    names = to if isinstance(to, tuple) else (to,)
    transposed = "trans" in instruction.name

    def execute(block: Block) -> None:
        _whole(block, instruction)
        places = block.address(str(address))
        places = np.where(np.arange(block.threads) % WARP < 8 * len(names), places, 0)
        lines = np.stack([block.load("shared", places + 2 * i, 2, None, instruction) for i in range(8)], axis=-1)
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

    def execute(block: Block) -> None:
        _whole(block, instruction)
        left, right = ([_warps(block, name) for name in names] for names in (a, b))
        if result == "f16":  # two numbers a register
            start = [part for name in c for part in np.moveaxis(warp.spread(_warps(block, name), "f16"), -1, 0)]
        else:
            start = [_warps(block, name).view(sums) for name in c]
        found = warp.mma(shape, kind, left, right, start)
        if result == "f16":
            found = [encode(np.stack(pair), "f16x2") for pair in zip(found[::2], found[1::2], strict=True)]
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
    total, sums = np.dtype("i8" if parts[-3] == "s32" else "f4"), np.dtype("i4" if parts[-3] == "s32" else "f4")

    def matrices(block: Block, descriptors: str, outer: int, flipped: int) -> Array:
        """[warpgroups, outer, depth]."""
        found = []
        for descriptor in np.broadcast_to(block.read(descriptors, np.dtype("u8")), block.threads)[:: 4 * WARP]:
            places = warp.descriptor_places(int(descriptor), outer, depth, width, bool(flipped))
            raw = block.shared[width][places // width]
            found.append(decode(raw, kind) if width == 2 else warp.spread(raw.astype("u4"), kind)[..., 0])
        return np.stack(found).astype(total)

    def execute(block: Block) -> None:
        _whole(block, instruction)
        groups = block.threads // (4 * WARP)
        if by_registers:
            left = warp.fragment([_warps(block, name) for name in a], kind, depth, total).reshape(groups, 64, depth)
        else:
            left = matrices(block, str(a), 64, flip_a)
        found = (left @ matrices(block, str(b), outputs, flip_b).transpose(0, 2, 1)).reshape(4 * groups, 16, outputs)
        kept = _read(block, str(keep), "pred", storage("pred"))
        if parts[-3] == "f16":  # two numbers a register
            for i, name in enumerate(to):
                row, column = warp.GROUP + 8 * (i % 2), 8 * (i // 2) + 2 * warp.WITHIN
                pair = np.stack([found[:, row, column], found[:, row, column + 1]])
                known = np.broadcast_to(kept, block.threads).reshape(-1, WARP)
                pair = pair + np.where(known, np.moveaxis(warp.spread(_warps(block, name), "f16"), -1, 0), 0)
                block.write(name, encode(pair, "f16x2").reshape(-1), None)
            return
        for i, name in enumerate(to):
            row, column = warp.GROUP + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * warp.WITHIN + i % 2
            before = np.where(np.broadcast_to(kept, block.threads).reshape(-1, WARP), _warps(block, name).view(sums), 0)
            block.write(name, (found[:, row, column] + before).astype(sums).reshape(-1), None)

    return execute


def _stmatrix(instruction: Instruction) -> Execute:
    address, source = instruction.operands
    names = source if isinstance(source, tuple) else (source,)
    transposed = "trans" in instruction.name

    def execute(block: Block) -> None:
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

    def execute(block: Block) -> None:
        _whole(block, instruction)
        found, within = warp.shuffle(mode, _warps(block, value), _warps(block, by), _warps(block, clamp))
        block.write(to.strip(), found.reshape(-1), None)
        if inside:
            block.write(inside.strip(), within.reshape(-1), None)

    return execute


def _reduce(instruction: Instruction) -> Execute:
    to, value, _ = (str(operand) for operand in instruction.operands)
    what, kind = instruction.name[2], instruction.name[-1]

    def execute(block: Block) -> None:
        _whole(block, instruction)
        found = warp.reduce(what, decode(_warps(block, value), kind))
        block.write(to, encode(found, kind).reshape(-1), None)

    return execute


def _vote(instruction: Instruction) -> Execute:
    to, chosen, _ = (str(operand) for operand in instruction.operands)
    mode = instruction.name[2]

    def execute(block: Block) -> None:
        _whole(block, instruction)
        votes = np.broadcast_to(_read(block, chosen, "pred", storage("pred")), block.threads).reshape(-1, WARP)
        if mode == "ballot":
            found = (votes.astype("u8") << np.arange(WARP, dtype="u8")).sum(1, keepdims=True).astype("u4")
        else:
            found = (votes.any if mode == "any" else votes.all)(axis=1, keepdims=True)
        block.write(to, np.broadcast_to(found, votes.shape).reshape(-1).copy(), None)

    return execute


def _warps(block: Block, operand: str) -> Array:
    return np.broadcast_to(block.read(operand, WORD), block.threads).reshape(-1, WARP)


def _whole(block: Block, instruction: Instruction) -> None:
    """Whole warps only: what threads get that a part of them has left is undefined on a card."""
    if block.active is not None and len({bool(x) for x in block.active}) > 1:
        by_warp = block.active.reshape(-1, WARP)
        if (by_warp.any(1) != by_warp.all(1)).any():
            raise EmulatorError(f"not by whole warps: {instruction}")
        raise EmulatorError(f"warps that have parted: {instruction} is not written for that")


def _nothing(instruction: Instruction) -> Execute:
    """Barriers, as threads are in step anyway; hints to caches."""
    if instruction.name[0] == "createpolicy":
        to = str(instruction.operands[0])
        return lambda block: block.write(to, np.zeros((), "u8"), None)
    return lambda block: None


SPECIAL: dict[str, Callable[[Instruction], Execute]] = {
    "cp": _copy,
    "ldmatrix": _ldmatrix,
    "stmatrix": _stmatrix,
    "wgmma": _wgmma,
    "mma": _mma,
    "shfl": _shuffle,
    "redux": _reduce,
    "vote": _vote,
    "bar": _nothing,
    "barrier": _nothing,
    "fence": _nothing,
    "createpolicy": _nothing,
    "prefetch": _nothing,
}
