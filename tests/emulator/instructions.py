"""Instructions as functions that act on Blocks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.emulator import together
from tests.emulator.arithmetic import meaning
from tests.emulator.machine import Array, Blocks, EmulatorError, Execute
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
    inputs, output, compute = meaning(instruction.name, len(instruction.operands) - 1)
    to, *operands = (str(operand) for operand in instruction.operands)
    guard, negated = instruction.guard, instruction.negated
    kinds = [storage(kind) for kind in inputs]

    def execute(block: Blocks) -> None:
        values = [_read(block, operand, kind, raw) for operand, kind, raw in zip(operands, inputs, kinds, strict=True)]
        found = encode(compute(*values), output)
        if output[0] == "s":  # a wider register takes the sign along
            found = found.view(f"i{found.itemsize}")
        block.write(to, found, block.mask(guard, negated))

    return execute


def _read(block: Blocks, operand: str, kind: str, raw: np.dtype) -> Array:
    return block.predicate(operand) if kind == "pred" else decode(block.read(operand, raw), kind)


def _move(instruction: Instruction) -> Execute:
    to, source = (str(operand) for operand in instruction.operands)
    kind, guard, negated = storage(instruction.name[-1]), instruction.guard, instruction.negated
    return lambda block: block.write(to, block.read(source, kind), block.mask(guard, negated))


def _repack(instruction: Instruction) -> Execute:
    to, source = instruction.operands
    guard, negated, whole = instruction.guard, instruction.negated, storage(instruction.name[-1])

    def execute(block: Blocks) -> None:
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

    def execute(block: Blocks) -> None:
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

    def execute(block: Blocks) -> None:
        mask = block.mask(guard, negated)
        live = np.ones(block.threads, dtype=bool) if mask is None else mask
        places, sources = block.address(to), block.address(source)
        sizes = np.full(block.threads, size_of)
        if given and not given[0].startswith("%rd"):
            sizes = np.broadcast_to(block.read(given[0], WORD), block.threads).astype("i8")
        if (places[live] % size_of).any() or (sources[live & (sizes > 0)] % size_of).any():
            raise EmulatorError(f"addresses are not multiples of {size_of}: {instruction}")
        for i in range(0, size_of, 4):
            words = block.load("global", sources + i, 4, live & (sizes > i), instruction)
            block.copy_later(places + i, words, live, instruction)

    return execute


def _nothing(instruction: Instruction) -> Execute:
    """Barriers, as threads are in step anyway; hints to caches."""
    if instruction.name[0] == "createpolicy":
        to = str(instruction.operands[0])
        return lambda block: block.write(to, np.zeros((), "u8"), None)
    return lambda block: None


SPECIAL: dict[str, Callable[[Instruction], Execute]] = {
    "cp": _copy,
    **together.SPECIAL,
    "bar": _nothing,
    "barrier": _nothing,
    "fence": _nothing,
    "createpolicy": _nothing,
    "prefetch": _nothing,
}
