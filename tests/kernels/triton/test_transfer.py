"""Blocks that go to the host and come back, and the order in which two streams wait for one another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.kernels.triton.conftest import DEVICE
from tests.kernels.triton.test_copy import KINDS, layers, same, snapshot, tensors

from kernels.triton import transfer  # isort: skip  (after the conftest has chosen the interpreter)
from kernels.triton.copy import CacheTable  # isort: skip


class FakeEvent:
    """Never done by itself."""

    def __init__(self, name: str) -> None:
        self.name, self.done = name, False

    def query(self) -> bool:
        return self.done


class FakeStream:
    """Writes down what it is asked for."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.events = name, log, [FakeEvent("")]

    def record_event(self) -> FakeEvent:
        self.events.append(FakeEvent(f"{self.name} {len(self.events)}"))
        self.log.append(self.events[-1].name)
        return self.events[-1]

    def wait_event(self, event: transfer.Event) -> None:
        assert isinstance(event, FakeEvent)
        self.log.append(f"{self.name} waits for {event.name}")


class FakeStreams:
    def __init__(self) -> None:
        self.log: list[str] = []
        self.side: FakeStream = FakeStream("side", self.log)
        self._main = FakeStream("main", self.log)

    def main(self) -> FakeStream:
        return self._main

    @contextmanager
    def on_side(self) -> Iterator[None]:
        self.log.append("begin")
        yield
        self.log.append("end")

    def take(self) -> list[str]:
        """What was asked for since the last time."""
        found = self.log[:]
        self.log.clear()
        return found


def settle() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("kind", KINDS)
def test_out_and_back(kind: str) -> None:
    """Into slots in any order, more than fit the staging area at once, and back into other blocks."""
    caches = layers(9, kind=kind)
    expected = snapshot(caches)
    moves = transfer.Transfers(caches, slots=6, room=2)
    assert moves.block_bytes == sum(t[0].numel() for t in expected)
    moves.swap_out([1, 8, 3, 4, 0], [4, 5, 0, 2, 1])
    moves.wait(read=[], written=range(9))
    for tensor in tensors(caches):
        tensor[3:] = 0
    settle()
    untouched = snapshot(caches)
    moves.swap_in([5, 4, 2], [7, 5, 6])
    moves.swap_in([0], [8])
    moves.wait(read=range(9), written=[])
    settle()
    for now, old in zip(untouched, expected, strict=True):
        now[[7, 5, 6, 8]] = old[[8, 1, 4, 3]]
    assert same(caches, untouched)


def test_copies_within_the_pool() -> None:
    caches = layers(6)
    expected = snapshot(caches)
    moves = transfer.Transfers(caches, slots=0)
    moves.copy([0, 5], [3, 1])
    moves.copy([], [])
    moves.wait(read=[3, 1], written=[])
    settle()
    for tensor in expected:
        tensor[[3, 1]] = tensor[[0, 5]]
    assert same(caches, expected)


def test_order_of_waits() -> None:
    """Transfers wait for steps launched before them; a step waits only for transfers of its blocks, and for the last of those."""
    streams = FakeStreams()
    moves = transfer.Transfers(layers(9), slots=4, streams=streams)
    assert streams.take() == []
    moves.swap_out([1, 2], [0, 1])
    assert streams.take() == ["main 1", "side waits for main 1", "begin", "end", "side 1"]
    moves.swap_in([0, 1], [5, 6])
    moves.copy([3], [4])
    moves.swap_out([7], [2])
    assert streams.take()[::5] == ["main 2", "main 3", "main 4"]

    moves.wait(read=[0, 1, 2, 3, 7], written=[8])  # blocks that transfers only read may be read
    assert streams.take() == []
    moves.wait(read=[0, 6], written=[0])
    assert streams.take() == ["main waits for side 2"]
    moves.wait(read=[5, 6], written=[1, 2])  # waited for already, as was what came before
    assert streams.take() == []
    moves.wait(read=[], written=[3])  # still being read
    assert streams.take() == ["main waits for side 3"]
    moves.wait(read=[4], written=[4, 7])
    assert streams.take() == ["main waits for side 4"]

    moves.swap_out([1], [3])
    streams.side.events[-1].done = True
    moves.swap_in([3], [2])
    streams.take()
    moves.wait(read=[], written=[1])  # done, as the call after it has seen
    assert streams.take() == []
    moves.wait(read=[2], written=[])
    assert streams.take() == ["main waits for side 6"]


def test_staging_waits_for_nobody_but_its_own_stream() -> None:
    """All turns of a long transfer are one piece of work on the other stream."""
    streams = FakeStreams()
    moves = transfer.Transfers(layers(9), slots=9, room=1, streams=streams)
    moves.swap_out(range(9), range(9))
    assert streams.take() == ["main 1", "side waits for main 1", "begin", "end", "side 1"]


def test_numbers_outside() -> None:
    moves = transfer.Transfers(layers(3), slots=2)
    for blocks, slots in (([3], [0]), ([-1], [0]), ([0], [2]), ([0], [-1]), ([0, 1], [0])):
        for work in (lambda b=blocks, s=slots: moves.swap_out(b, s), lambda b=blocks, s=slots: moves.swap_in(s, b)):
            with pytest.raises(ValueError, match="are needed"):
                work()
    with pytest.raises(ValueError, match="below 3"):
        moves.copy([0], [3])


def test_tables_of_packed_memory() -> None:
    memory = torch.zeros(3, 24, dtype=torch.uint8, device=DEVICE)
    table = CacheTable.packed(memory, [16, 6, 2])
    start = memory.data_ptr()
    assert table.places.tolist() == [[start, 24, 16], [start + 16, 24, 6], [start + 22, 24, 2]] and table.word == 2
    for wrong in (memory.view(torch.int8), memory[:, :23], memory[:, ::2]):
        with pytest.raises(ValueError, match="does not have blocks of 24"):
            CacheTable.packed(wrong, [16, 6, 2])
