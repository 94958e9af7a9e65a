"""Blocks copied beside the steps: within the pool, and to and from slots of pinned host memory, on a stream of their own.

A block is in pieces, two or four in each layer; a slot has them one behind another. Between the two lies a small staging area on
the device, so that the bus is left to a copy engine, which moves whole blocks at full speed, and multiprocessors to the steps (a
kernel that read host memory itself would hold them while it waits)::

    pool     | layer 0 k, v | layer 1 k, v | ..   a block's pieces
                  |  one kernel for many blocks (copy.py)
    staging  [room, bytes of a block]             on the device
                  |  a copy for each run of slots
    host     [slots, bytes of a block]            pinned

What happens when is settled by events, and the host never waits: a transfer begins behind all that the steps' stream was given
before it, and ``wait`` holds that stream back only where a step touches blocks of a transfer under way. Transfers follow one
another in the order of the calls, so a slot may be read by the call after the one that fills it. On the CPU (in the interpreter)
all is done at once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from kernels.layout import pinned_slots
from kernels.ops import KVCache
from kernels.triton.copy import CacheTable, copy_blocks


class Event(Protocol):
    def query(self) -> bool:
        """Whether what the stream was given before the event is done."""


class Stream(Protocol):
    """What is asked of a torch.cuda.Stream."""

    def record_event(self) -> Event: ...

    def wait_event(self, event: Any) -> None: ...


class Streams(Protocol):
    """The stream of the steps, and that of the transfers."""

    @property
    def side(self) -> Stream: ...

    def main(self) -> Stream: ...

    def on_side(self) -> AbstractContextManager[object]:
        """Within it work goes to ``side``."""


class CudaStreams:
    """The device's current stream, and one made for transfers."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.side = device, torch.cuda.Stream(device)

    def main(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def on_side(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self.side)


class AtOnce:
    """Streams, stream and event where nothing is ever under way."""

    def __init__(self) -> None:
        self.side = self

    def main(self) -> AtOnce:
        return self

    def on_side(self) -> AbstractContextManager[object]:
        return nullcontext()

    def record_event(self) -> AtOnce:
        return self

    def wait_event(self, event: Event) -> None:
        pass

    def query(self) -> bool:
        return True


@dataclass(frozen=True)
class _UnderWay:
    done: Event
    read: frozenset[int]  # blocks of the pool
    written: frozenset[int]


class Transfers:
    """Copies of the blocks of ``caches``, for one engine (calls come from one thread).

    slots: blocks that the host memory holds. room: blocks that the staging area holds; longer transfers go in several turns.
    ValueError, as in CacheTable, for caches whose blocks are not dense memory. Nothing may be recorded in a graph.
    """

    def __init__(self, caches: Sequence[KVCache], *, slots: int, room: int = 8, streams: Streams | None = None) -> None:
        self._pool = CacheTable.of(caches)
        self._device = self._pool.places.device
        on_card = self._device.type == "cuda"
        self._streams: Streams = streams or (CudaStreams(self._device) if on_card else AtOnce())
        size = sum(self._pool.sizes)
        self._staging = torch.empty((room, size), dtype=torch.uint8, device=self._device)
        self._staged = CacheTable.packed(self._staging, self._pool.sizes)
        self._places = torch.arange(room, device=self._device)
        self._host = [torch.empty((count, size), dtype=torch.uint8, pin_memory=on_card) for count in pinned_slots(slots, size)]
        self._slots, self._begins = slots, list(accumulate((len(piece) for piece in self._host), initial=0))
        self._blocks = min((cache.k.shape[0] for cache in caches), default=0)
        self._under_way: list[_UnderWay] = []  # oldest first

    @property
    def block_bytes(self) -> int:
        """Of a block in all layers: what a slot takes on the host, and a block's place in the staging area on the device."""
        return self._staging.shape[1]

    @property
    def busy(self) -> bool:
        """Whether there may be a transfer under way for which a step would have to wait."""
        return bool(self._under_way)

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Block sources[i] over block targets[i]; no block may be a target twice, nor both source and target."""
        self._check(sources, targets, self._blocks)
        with self._transfer(read=sources, written=targets):
            copy_blocks(self._pool, self._ids(sources), self._ids(targets))

    def swap_out(self, blocks: Sequence[int], slots: Sequence[int]) -> None:
        """Block blocks[i] into slot slots[i]. The blocks may be handed to others at once: ``wait`` sees to it."""
        self._check(blocks, slots, self._slots)
        with self._transfer(read=blocks):
            ids = self._ids(blocks)
            for first, count in self._turns(len(blocks)):
                copy_blocks(self._pool, ids[first : first + count], self._places[:count], into=self._staged)
                for staged, host in self._pieces(slots[first : first + count]):
                    host.copy_(staged, non_blocking=True)

    def swap_in(self, slots: Sequence[int], blocks: Sequence[int]) -> None:
        """Slot slots[i] into block blocks[i]. The slots may be filled anew by the next call."""
        self._check(blocks, slots, self._slots)
        with self._transfer(written=blocks):
            ids = self._ids(blocks)
            for first, count in self._turns(len(blocks)):
                for staged, host in self._pieces(slots[first : first + count]):
                    staged.copy_(host, non_blocking=True)
                copy_blocks(self._staged, self._places[:count], ids[first : first + count], into=self._pool)

    def wait(self, *, read: Collection[int], written: Collection[int]) -> None:
        """To be called before a step that reads and writes these blocks is launched: it will start behind what they need.

        That is every transfer that fills one of them, and every one that still reads a block that the step writes.
        """
        for last in reversed(range(len(self._under_way))):
            one = self._under_way[last]
            if not (one.written.isdisjoint(read) and one.written.isdisjoint(written) and one.read.isdisjoint(written)):
                self._streams.main().wait_event(one.done)
                del self._under_way[: last + 1]  # what came before is done by then, too
                return

    @contextmanager
    def _transfer(self, *, read: Sequence[int] = (), written: Sequence[int] = ()) -> Iterator[None]:
        """Work for the other stream, behind all that the steps' stream has been given: it fills, or still reads, the blocks."""
        while self._under_way and self._under_way[0].done.query():
            del self._under_way[0]
        side = self._streams.side
        side.wait_event(self._streams.main().record_event())
        with self._streams.on_side():
            yield
        self._under_way.append(_UnderWay(side.record_event(), frozenset(read), frozenset(written)))

    def _turns(self, blocks: int) -> Iterator[tuple[int, int]]:
        """(first, how many) of what the staging area takes at a time."""
        room = len(self._staging)
        return ((first, min(room, blocks - first)) for first in range(0, blocks, room))

    def _pieces(self, slots: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Staging area and host memory, in stretches of slots that follow one another in one piece of it."""
        first = 0
        for i in range(1, len(slots) + 1):
            if i == len(slots) or slots[i] != slots[i - 1] + 1 or slots[i] in self._begins:
                piece = bisect_right(self._begins, slots[first]) - 1
                start = slots[first] - self._begins[piece]
                yield self._staging[first:i], self._host[piece][start : start + i - first]
                first = i

    def _ids(self, numbers: Sequence[int]) -> Tensor:
        on_card = self._device.type == "cuda"
        return torch.tensor(numbers, dtype=torch.int64, pin_memory=on_card).to(self._device, non_blocking=True)

    def _check(self, blocks: Sequence[int], others: Sequence[int], end: int) -> None:
        """Numbers outside the pool would be addresses outside it."""
        for numbers, limit in ((blocks, self._blocks), (others, end)):
            if len(numbers) != len(blocks) or any(not 0 <= number < limit for number in numbers):
                raise ValueError(f"{list(numbers)} for {list(blocks)}: as many numbers below {limit} are needed")
