"""Blocks of threads that execute a Program in lockstep: registers are arrays with an element for each thread.

Blocks that do not take the same way at a branch are executed one after the other from there on. Threads of one block may part
too: those that are furthest behind go on until the others are reached. Shared memory begins as garbage, asynchronous copies
arrive when they are waited for and not before, and an access outside the kernel's tensors, or one that is not aligned, is an
error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import cache
from typing import NamedTuple

import numpy as np

from tests.emulator.program import Instruction, Program

Array = np.ndarray
Execute = Callable[["Blocks"], None]
UNSIGNED = {0: np.dtype(bool), 1: np.dtype("u1"), 2: np.dtype("u2"), 4: np.dtype("u4"), 8: np.dtype("u8")}
ACCESSES = UNSIGNED | {16: np.dtype("c16")}  # what moves at once between registers and memory
SHARED_GARBAGE = 0xFF  # NaN in every float type
WARP = 32
FIRST = 4096  # no address below it is anybody's


class _Everything:
    """All memory of this process beyond FIRST, as numpy sees other libraries' arrays."""

    def __init__(self, size: int) -> None:
        shape = ((1 << 47) // size - FIRST,)
        self.__array_interface__ = {"data": (FIRST, False), "shape": shape, "typestr": ACCESSES[size].str, "version": 3}


HOST = {size: np.asarray(_Everything(size)) for size in (1, 2, 4, 8, 16)}


class EmulatorError(RuntimeError):
    """A kernel did what a card would not have let it do, or what is not understood here."""


class Ranges:
    """Memory that a kernel may touch."""

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        ordered = sorted(ranges)
        self.starts = np.array([start for start, _ in ordered], dtype=np.int64)
        self.stops = np.array([stop for _, stop in ordered], dtype=np.int64)

    def check(self, addresses: Array, size: int, instruction: Instruction) -> None:
        place = np.searchsorted(self.starts, addresses, side="right") - 1
        inside = (place >= 0) & (addresses + size <= self.stops[place])
        if not inside.all():
            raise EmulatorError(f"{int((~inside).sum())} threads leave the kernel's tensors: {instruction}")
        if (addresses & size - 1).any():
            raise EmulatorError(f"addresses are not multiples of {size}: {instruction}")


class Copy(NamedTuple):
    """Words on their way to shared memory, a thread each."""

    addresses: Array
    words: Array
    live: Array
    instruction: Instruction

    def of(self, threads: Array) -> Copy:
        return Copy(self.addresses[threads], self.words[threads], self.live[threads], self.instruction)


class Blocks:
    """The threads of some blocks of a grid, all at the same point of the program."""

    def __init__(
        self,
        program: Program,
        code: Sequence[Execute],
        values: Mapping[str, int],
        *,
        threads: int,
        places: Sequence[tuple[int, int, int]],
        grid: tuple[int, int, int],
        shared: int,
        ranges: Ranges,
    ) -> None:
        """``threads`` of each block; its place (x, y, z) in the grid; bytes of memory that its threads share."""
        self.program, self.code, self.values, self.ranges = program, code, values, ranges
        self.each, self.span = threads, -(-shared // 16) * 16 + 16
        self.registers: dict[str, Array] = {}
        self._own(np.full(len(places) * self.span, SHARED_GARBAGE, dtype=np.uint8))
        lane = np.tile(np.arange(threads, dtype=np.uint32), len(places))
        self.special = {"%tid.x": lane, "%laneid": lane % WARP, "%ntid.x": np.uint32(threads), "%warpid": lane // WARP}
        for axis, at, size in zip("xyz", np.array(places, dtype=np.uint32).T, grid, strict=True):
            self.special[f"%ctaid.{axis}"], self.special[f"%nctaid.{axis}"] = np.repeat(at, threads), np.uint32(size)
        self.active: Array | None = None  # None: all threads
        self.pc = 0
        self.others: list[Blocks] = []  # that went another way, and are still to be run
        self._places: Array | None = None  # of threads that have parted
        self._copies: list[Copy] = []
        self._groups: list[list[Copy]] = []

    def _own(self, memory: Array) -> None:
        """Shared memory, block behind block, and all threads at work."""
        self.memory, count = memory, len(memory) // self.span
        self.threads = count * self.each
        self.shared = {size: memory.view(ACCESSES[size]) for size in (1, 2, 4, 8, 16)}
        self.base = np.repeat(np.arange(count) * self.span, self.each)  # where its block's memory begins, for each thread
        self._alive = np.ones(self.threads, dtype=bool)
        self._busy = True  # some thread is

    def run(self) -> None:
        """To the end of all threads."""
        left = [self]
        with np.errstate(all="ignore"):
            while left:
                some = left.pop()
                while some._busy:
                    some._turn()
                    left += some.others
                    some.others.clear()

    def _of(self, chosen: Array) -> Blocks:
        """Some of the blocks, by themselves."""
        found, threads = copy(self), np.repeat(chosen, self.each)
        found._own(self.memory.reshape(-1, self.span)[chosen].reshape(-1))
        found.registers = {name: value[threads] for name, value in self.registers.items()}
        found.special = {name: value[threads] if value.ndim else value for name, value in self.special.items()}
        found._copies = [one.of(threads) for one in self._copies]
        found._groups = [[one.of(threads) for one in group] for group in self._groups]
        found.others = []
        return found

    def _separate(self, mask: Array, turn: Callable[[Blocks, Array | None], None]) -> bool:
        """Whether blocks part here from others: then ``turn`` was called with each, and its threads that turn (None: all)."""
        by_block = mask.reshape(-1, self.each)
        every, some = by_block.all(axis=1), by_block.any(axis=1)
        mixed = np.flatnonzero(some & ~every)
        ways = [every, ~some, *(np.arange(len(every)) == block for block in mixed)]
        ways = [way for way in ways if way.any()]
        if len(ways) == 1:
            return False
        for way in ways:
            blocks = self._of(way)
            chosen = mask[np.repeat(way, self.each)]
            if chosen.any():
                turn(blocks, None if chosen.all() else chosen)
            self.others.append(blocks)
        self._busy = False  # here; they go on there
        return True

    def _turn(self) -> None:
        if self._places is None:
            at = self.pc
            self.pc = at + 1
            self.code[at](self)
            return
        at = int(self._places[self._alive].min())
        self.active = self._alive & (self._places == at)
        self.pc = at + 1
        self._places[self.active] = at + 1
        self.code[at](self)
        alive = self._places[self._alive]
        if self._alive.all() and (alive == alive[0]).all():
            self.pc, self._places, self.active = int(alive[0]), None, None

    def mask(self, guard: str, negated: bool) -> Array | None:
        """Threads that execute an instruction; None: all."""
        if not guard:
            return self.active
        chosen = ~self.registers[guard] if negated else self.registers[guard]
        if self.active is not None:
            chosen = chosen & self.active
        return None if chosen.all() else chosen

    def branch(self, mask: Array | None, target: int) -> None:
        if self._places is None:
            if mask is None or not mask.any():
                self.pc = target if mask is None else self.pc
                return
            if self._separate(mask, lambda blocks, chosen: blocks.branch(chosen, target)):
                return
            self._places = np.full(self.threads, self.pc)
        self._places[slice(None) if mask is None else mask] = target

    def end(self, mask: Array | None) -> None:
        if self._places is None and mask is not None and self._separate(mask, Blocks.end):
            return
        if self._places is None:
            self._places = np.full(self.threads, self.pc)
        self._alive[slice(None) if mask is None else mask] = False
        self._busy = bool(self._alive.any())

    def read(self, operand: str, kind: np.dtype) -> Array:
        """An operand, of which as many bytes count as ``kind`` has; one value for all threads is a scalar."""
        register = self.registers.get(operand)
        if register is None:
            return self._constant(operand, kind)
        if register.dtype is kind:
            return register
        if register.dtype.itemsize == kind.itemsize:
            return register.view(kind)
        return register.astype(UNSIGNED[kind.itemsize]).view(kind)

    def predicate(self, operand: str) -> Array:
        """One, or the opposite of one."""
        found = self.read(operand.lstrip("!"), UNSIGNED[0])
        return ~found if operand.startswith("!") else found

    def _constant(self, operand: str, kind: np.dtype) -> Array:
        known = self.program.constants.get((operand, kind.char))
        if known is not None:
            return known
        if operand in self.special:
            return self.special[operand].astype(UNSIGNED[kind.itemsize]).view(kind)
        if operand in self.program.sizes:  # never written: garbage
            size = self.program.sizes[operand]
            self.registers[operand] = np.full(self.threads, 0 if size == 0 else (1 << 8 * size) - 1, dtype=UNSIGNED[size])
            return self.read(operand, kind)
        shared = operand in self.program.shared
        found = self.program.constants[operand, kind.char] = np.zeros((), dtype=kind) if shared else number(operand, kind)
        return found

    def write(self, name: str, value: Array, mask: Array | None) -> None:
        """Into a register: narrower numbers are widened as their kind says."""
        if name == "_":
            return
        storage = UNSIGNED[self.program.sizes[name]]
        if value.dtype is storage:
            pass
        elif value.dtype.itemsize == storage.itemsize:
            value = value.view(storage)
        elif value.dtype.kind == "i":
            value = value.astype(f"i{storage.itemsize}").view(storage)
        else:
            value = value.view(UNSIGNED[value.dtype.itemsize]).astype(storage)
        if mask is None:
            self.registers[name] = value if value.ndim else np.full(self.threads, value, storage)
        else:
            before = self.registers.get(name)
            before = np.full(self.threads, np.iinfo(storage).max if storage.kind == "u" else False) if before is None else before
            self.registers[name] = np.where(mask, value, before).astype(storage)

    def address(self, operand: str) -> Array:
        base, offset = _address(operand)
        found = self.read(base, UNSIGNED[8 if self.program.sizes.get(base, 4) == 8 else 4]).astype(np.int64) + offset
        return found if found.ndim else np.broadcast_to(found, self.threads)

    def load(self, space: str, addresses: Array, size: int, mask: Array | None, instruction: Instruction) -> Array:
        """``size`` bytes for each thread, 0 for those that do not take part."""
        if mask is not None:
            found = np.zeros(self.threads, dtype=ACCESSES[size])
            found[mask] = self._load(space, addresses[mask], self.base[mask], size, instruction)
            return found
        return self._load(space, addresses, self.base, size, instruction)

    def _load(self, space: str, addresses: Array, base: Array, size: int, instruction: Instruction) -> Array:
        if space == "global":
            self.ranges.check(addresses, size, instruction)
            return HOST[size][(addresses - FIRST) // size]
        self._inside(addresses, size, instruction)
        return self.shared[size][(addresses + base) // size]

    def store(self, space: str, addresses: Array, value: Array, mask: Array | None, instruction: Instruction) -> None:
        size, base = value.dtype.itemsize, self.base
        value = value.view(ACCESSES[size])
        value = value if value.ndim else np.broadcast_to(value, self.threads)
        if mask is not None:
            addresses, value, base = addresses[mask], value[mask], base[mask]
        if space == "global":
            self.ranges.check(addresses, size, instruction)
            HOST[size][(addresses - FIRST) // size] = value
        else:
            self._inside(addresses, size, instruction)
            self.shared[size][(addresses + base) // size] = value

    def _inside(self, addresses: Array, size: int, instruction: Instruction) -> None:
        if addresses.size and (addresses.min() < 0 or addresses.max() + size > self.span or (addresses & size - 1).any()):
            raise EmulatorError(f"outside of shared memory, or not aligned: {instruction}")

    def copy_later(self, addresses: Array, words: Array, live: Array, instruction: Instruction) -> None:
        """A word [threads] to each thread's address in shared memory, of threads that are ``live``."""
        self._copies.append(Copy(addresses, words, live, instruction))

    def commit(self) -> None:
        self._groups.append(self._copies)
        self._copies = []

    def wait(self, left: int) -> None:
        """Until at most so many groups of copies are under way."""
        while len(self._groups) > left:
            for one in self._groups.pop(0):
                self.store("shared", one.addresses, one.words, None if one.live.all() else one.live, one.instruction)


@cache
def _address(operand: str) -> tuple[str, int]:
    base, _, offset = operand[1:-1].partition("+")
    return base, int(offset, 0)


def number(operand: str, kind: np.dtype) -> Array:
    """One that stands in the program."""
    bits = int(operand[2:], 16) if operand[:2] in ("0f", "0d") else None
    if bits is not None:
        return np.array(bits, dtype=UNSIGNED[4 if operand[1] == "f" else 8]).view(kind)
    if kind.kind == "f":
        return np.array(float(operand), dtype=kind)
    if kind == UNSIGNED[0]:
        return np.array(int(operand) != 0)
    return np.array(int(operand.rstrip("U"), 0) & ((1 << 8 * kind.itemsize) - 1), dtype=UNSIGNED[kind.itemsize]).view(kind)
