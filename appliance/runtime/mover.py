"""Carries out the copies of a step's plan: blocks within the cache, out to host memory, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from appliance.core.step import Chunk
from appliance.core.store import Copy
from appliance.memory.inputs import STAGED_BLOCKS
from appliance.memory.plan import PlanError
from kernels.ops import KVCache

AT_ONCE = 64
"""Blocks that are copied in one go, at most."""
IN_PASSING = 1 << 20
"""Bytes that are in passing meanwhile, at most, or a layer's keys of one block where these are more: no part of any plan."""


class Mover(Protocol):
    @property
    def host_bytes(self) -> int:
        """Of the slots."""

    def move(self, copies: Sequence[Copy]) -> None:
        """Carry out the copies as if one after another."""

    def wait(self, chunks: Sequence[Chunk]) -> None:
        """To be called before a step with these chunks is launched: it starts behind the copies that it needs."""


def batches(copies: Sequence[Copy]) -> Iterator[tuple[str, list[int], list[int]]]:
    """(kind, sources, targets) of copies that may be carried out in any order among themselves, in the order of the copies."""
    kind = ""
    sources: list[int] = []
    targets: list[int] = []
    touched: set[int] = set()  # what a later copy of the same kind must not write; within the pool not read either
    for copy in copies:
        within = copy.kind == "copy"  # elsewhere sources and targets have numbers of their own
        clash = copy.target in touched or (within and copy.source in touched)
        if copy.kind != kind or clash or len(sources) == AT_ONCE:
            if sources:
                yield kind, sources, targets
            kind, sources, targets, touched = copy.kind, [], [], set()
        sources.append(copy.source)
        targets.append(copy.target)
        touched |= {copy.target, copy.source} if within else {copy.target}
    if sources:
        yield kind, sources, targets


class PlainMover:
    """With torch's operators, all at once and on the steps' own stream."""

    def __init__(self, caches: Sequence[KVCache], slots: int) -> None:
        """``slots``: blocks of host memory, which are allocated here."""
        # As rows of words: torch does not select rows of every type, and copies rows of one dimension in one piece.
        self._pool = [tensor.view(tensor.shape[0], -1).view(torch.int64) for cache in caches for tensor in cache.tensors]
        self._host = [torch.zeros((slots, tensor.shape[1]), dtype=torch.int64) for tensor in self._pool]
        self.host_bytes = sum(tensor.nbytes for tensor in self._host)

    def move(self, copies: Sequence[Copy]) -> None:
        for kind, sources, targets in batches(copies):
            into = self._host if kind == "out" else self._pool
            chosen, places = torch.tensor(sources), torch.tensor(targets)
            for source, target in zip(self._host if kind == "in" else self._pool, into, strict=True):
                some = max(1, IN_PASSING // source[0].nbytes)
                for ours, theirs in zip(chosen.split(some), places.split(some), strict=True):
                    rows = source.index_select(0, ours.to(source.device))
                    target.index_copy_(0, theirs.to(target.device), rows.to(target.device))

    def wait(self, chunks: Sequence[Chunk]) -> None:
        pass


class CardMover:
    """With kernels and copy engines, on a stream of their own, beside the steps (kernels/triton/transfer.py)."""

    def __init__(self, caches: Sequence[KVCache], slots: int) -> None:
        from kernels.triton.transfer import Transfers

        self._transfers = Transfers(caches, slots=slots, room=STAGED_BLOCKS)
        self.host_bytes = slots * self._transfers.block_bytes
        self._block_size = caches[0].block_size
        self._busy = False

    def move(self, copies: Sequence[Copy]) -> None:
        transfers = self._transfers
        work = {"out": transfers.swap_out, "in": transfers.swap_in, "copy": transfers.copy}
        for kind, sources, targets in batches(copies):
            work[kind](sources, targets)
            self._busy = True

    def wait(self, chunks: Sequence[Chunk]) -> None:
        if not self._busy:
            return
        size = self._block_size
        read = {block for chunk in chunks for block in chunk.request.blocks}
        written = {b for c in chunks for b in c.request.blocks[c.start // size : -(-(c.start + c.length) // size)]}
        self._transfers.wait(read=read, written=written)
        self._busy = self._transfers.busy


def rehearse(mover: Mover, blocks: int, slots: int) -> None:
    """Copies of every kind, over a cache with nothing in it yet: what they need is compiled before the first request."""
    mover.move([Copy("copy", 0, 1)] * (blocks > 1) + [Copy("out", 0, 0), Copy("in", 0, 0)] * (slots > 0))
    mover.wait([])


def make_mover(ops: str, caches: Sequence[KVCache], slots: int) -> Mover:
    """For operators of that name. PlanError where the host has no memory to pin for the slots."""
    if ops != "triton":
        return PlainMover(caches, slots)
    try:
        return CardMover(caches, slots)
    except torch.OutOfMemoryError:  # of the card
        raise
    except RuntimeError as error:  # also of the host, CUDA says that memory has run out
        if not slots:
            raise
        raise PlanError(
            f"--swap-space: no memory to pin on the host for {slots} blocks: a smaller one, or a higher limit on locked memory "
            f"(ulimit -l) ({str(error).splitlines()[0]})"
        ) from error
