"""Instructions as functions that act on Blocks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.emulator import together
from tests.emulator.arithmetic import meaning
from tests.emulator.machine import ACCESSES, Array, Blocks, EmulatorError, Execute, number
from tests.emulator.numbers import INTEGERS, decode, encode, size, storage
from tests.emulator.program import Instruction, Program

WORD = np.dtype("u4")


def build(program: Program) -> list[Execute]:
    """KeyError for an instruction that is not known."""
    return [_one(instruction, program) for instruction in program.code]


def _reader(operand: str, kind: str, program: Program) -> Callable[[Blocks], Array]:
    """What an operand is, decoded; of a number in the program, once for all."""
    raw = storage(kind)
    if kind == "pred":
        return lambda block: block.predicate(operand)
    if operand not in program.sizes and operand not in program.shared and operand[0] != "%":
        value = decode(number(operand, raw), kind)
        return lambda block: value
    if INTEGERS.get(kind) is raw:
        return lambda block: block.read(operand, raw)
    return lambda block: decode(block.read(operand, raw), kind)


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
    return _compute(instruction, program)


def _control(instruction: Instruction, program: Program) -> Execute:
    guard, negated = instruction.guard, instruction.negated
    if instruction.name[0] != "bra":
        return lambda block: block.end(block.mask(guard, negated))
    target = program.labels[str(instruction.operands[0])]
    return lambda block: block.branch(block.mask(guard, negated), target)


def _compute(instruction: Instruction, program: Program) -> Execute:
    to, *operands = (str(operand) for operand in instruction.operands)
    table = int(operands.pop(), 0) if instruction.name[0] == "lop3" else 0
    inputs, output, compute = meaning(instruction.name, len(operands), table)
    guard, negated = instruction.guard, instruction.negated
    readers = [_reader(operand, kind, program) for operand, kind in zip(operands, inputs, strict=True)]
    integer = INTEGERS.get(output)

    def execute(block: Blocks) -> None:
        found = compute(*[read(block) for read in readers])
        if found.dtype is not integer:
            found = encode(found, output)
            if output[0] == "s":  # a wider register takes the sign along
                found = found.view(integer)
        block.write(to, found, block.mask(guard, negated))

    return execute


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
    each = min(vector, 16 // width)  # of what moves at once
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
            values = [block.read(one, storage(kind)) for one in names]
            for first in range(0, vector, each):
                value = np.stack(np.broadcast_arrays(*values[first : first + each]), axis=-1).view(ACCESSES[each * width])[..., 0]
                block.store(space, places + first * width, value, mask, instruction)
            return
        for first in range(0, vector, each):
            found = block.load(space, places + first * width, each * width, mask, instruction)
            for one, value in zip(names[first:], found.view(signed).reshape(-1, each).T.copy()):
                block.write(one, value, mask)

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
        if (places[live] & size_of - 1).any() or (sources[live & (sizes > 0)] & size_of - 1).any():
            raise EmulatorError(f"addresses are not multiples of {size_of}: {instruction}")
        each = size_of if (live <= ((sizes >= size_of) | (sizes == 0))).all() else 4  # of what is copied at once
        for i in range(0, size_of, each):
            words = block.load("global", sources + i, each, live & (sizes > i), instruction)
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
