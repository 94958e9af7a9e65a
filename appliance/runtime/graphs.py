"""Decode steps as recorded graphs: one for each of a few batch sizes, replayed instead of launching kernels one by one.

A step of n sequences with a token each takes the smallest size >= n. Its inputs are copied, all in one piece, to where the graph
reads them. Rows beyond n are padding: one token each of a sequence that lies in a spare block, which nobody owns; their results
are dropped.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from appliance.runtime.batch import StepArrays
from kernels.ops import Forward, PagedBatch


class Recorder(Protocol):
    """What a device does to run the same work again. Tests have one for the CPU."""

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """(what repeats ``work``, the tensor that each repetition overwrites with its result)."""

    def staging(self, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """``size`` bytes on the host, from which copies to the device do not block, and as many on the device."""


class CudaRecorder:
    """CUDA graphs that share one pool of memory: no two of them run at the same time."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is made at first use (kernels, workspaces) must not become part of the graph
            for _ in range(2):
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = work()
        return graph.replay, result

    def staging(self, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True), torch.empty(size, dtype=torch.uint8, device=device)


def capture_sizes(most: int) -> tuple[int, ...]:
    """Batch sizes up to ``most`` sequences: 1, 2, 4, steps of 8 to 128, then of 16; little of a large batch is padding."""
    sizes = [1, 2, 4, *range(8, 129, 8), *range(144, most + 16, 16)]
    return tuple(sorted({min(size, most) for size in sizes}))


class Inputs:
    """A graph's inputs, in one stretch of memory on the host and its twin on the device."""

    def __init__(self, size: int, width: int, spare: int, block_size: int, recorder: Recorder, device: torch.device) -> None:
        self.size, self.width, self.spare, self.spare_slot = size, width, spare, spare * block_size
        self._wide = 3 * size * 8  # bytes of what has 64 bits
        self._host, self._device = recorder.staging(self._wide + (size + 1 + size + size * width) * 4, device)
        names = ("ids", "positions", "slots", "starts", "ends", "tables")
        self._arrays = {name: part.numpy() for name, part in zip(names, self._parts(self._host), strict=True)}
        self._arrays["starts"][:] = np.arange(size + 1)
        self._arrays["ids"][:] = 0
        self._arrays["tables"][:] = spare
        self._rows = size  # the first ones, which may hold something else than padding
        self.ids, positions, slots, starts, ends, tables = self._parts(self._device)
        # max_seq bounds what any step may bring: a graph has one shape.
        self.batch = PagedBatch(positions, slots, starts, ends, tables, max_query=1, max_seq=width * block_size)
        self.fill(None)

    def _parts(self, memory: Tensor) -> tuple[Tensor, ...]:
        size = self.size
        ids, positions, slots = memory[: self._wide].view(torch.int64).view(3, size).unbind()
        starts, ends, tables = memory[self._wide :].view(torch.int32).split([size + 1, size, size * self.width])
        return ids, positions, slots, starts, ends, tables.view(size, self.width)

    def fill(self, step: StepArrays | None) -> None:
        """Put a step (None: padding alone) into the host's copy, and send it.

        The copy sent before must have arrived: it has, once the tokens of its step are known.
        """
        to, n = self._arrays, 0
        if step is not None:
            n, used = len(step.ids), step.tables.shape[1]
            to["ids"][:n], to["positions"][:n], to["slots"][:n] = step.ids, step.positions, step.slots
            to["ends"][:n], to["tables"][:n, :used] = step.ends, step.tables
        if n < self._rows:
            stale = slice(n, self._rows)
            to["positions"][stale], to["slots"][stale], to["ends"][stale] = 0, self.spare_slot, 1
            to["tables"][stale, 0] = self.spare
        self._rows = n
        self._device.copy_(self._host, non_blocking=True)


class DecodeGraphs:
    """Runs steps of single tokens by replaying ``forward``. Everything is recorded when this is made, largest size first."""

    def __init__(
        self,
        forward: Forward,
        *,
        sizes: Sequence[int],
        table_width: int,
        spare_block: int,
        block_size: int,
        recorder: Recorder,
        device: torch.device,
    ) -> None:
        self.sizes = tuple(sorted(sizes))
        self._graphs: dict[int, tuple[Inputs, Callable[[], None], Tensor]] = {}
        for size in reversed(self.sizes):
            inputs = Inputs(size, table_width, spare_block, block_size, recorder, device)
            replay, hidden = recorder.record(lambda inputs=inputs: forward(inputs.ids, inputs.batch))  # type: ignore[misc]
            self._graphs[size] = (inputs, replay, hidden)

    def takes(self, step: StepArrays) -> bool:
        return step.max_query == 1 and len(step.ids) <= self.sizes[-1]

    def run(self, step: StepArrays) -> Tensor:
        """Hidden states [T, hidden] of a step that ``takes`` says yes to; the next run overwrites them."""
        n = len(step.ids)
        inputs, replay, hidden = self._graphs[self.sizes[bisect_left(self.sizes, n)]]
        inputs.fill(step)
        replay()
        return hidden[:n]
