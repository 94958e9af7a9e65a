"""Decode steps as recorded graphs: one for each of a few batch sizes, replayed instead of launching kernels one by one.

A step of n sequences with a token each takes the smallest size >= n. Rows beyond n are padding: one token each of a sequence that
lies in a spare block (and has a spare seat), which nobody owns; their results are dropped. Every size reads its inputs from where
they are always sent.
"""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from appliance.runtime.batch import StepArrays
from kernels.ops import Forward


class Recorder(Protocol):
    """What a device does to run the same work again. Tests have one for the CPU."""

    def begin(self) -> None:
        """What is recorded from now on shares nothing with what was before, which is gone."""

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """(what repeats ``work``, the tensor that each repetition overwrites with its result)."""


class CudaRecorder:
    """CUDA graphs that share one pool of memory: no two of them run at the same time."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        work()  # what is made at first use (kernels, workspaces) must not become part of the graph
        graph = torch.cuda.CUDAGraph()
        with no_collections(), torch.cuda.graph(graph, pool=self.pool):
            result = work()
        graph.replay()  # the driver brings a graph to the card with its first launch, and the memory that takes is to be measured
        return graph.replay, result


@contextmanager
def no_collections() -> Iterator[None]:
    """Within it Python looks for no garbage: what an earlier engine has left (pinned memory, events, recorded steps) would be
    given back amid a recording, by calls that may end it.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


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
        send: Callable[[Sequence[np.ndarray]], list[Tensor]],
        spare_seat: int | None = None,
    ) -> None:
        """``spare_seat``: None where sequences have no states. ``send`` takes a step's arrays to the device, those of the same
        shapes always to the same place."""
        self.sizes = tuple(sorted(sizes))
        self._shape = (table_width, spare_block, block_size, spare_seat)
        self._graphs: dict[int, tuple[Callable[[], None], Tensor]] = {}
        for size in reversed(self.sizes):
            step = StepArrays.empty().padded(size, *self._shape)
            tensors = send(step.arrays)
            # A graph has one shape: max_seq bounds what any step may bring.
            batch = step.batch(tensors, max_seq=table_width * block_size)
            self._graphs[size] = recorder.record(lambda ids=tensors[0], batch=batch: forward(ids, batch))  # type: ignore[misc]

    def prepare(self, step: StepArrays) -> StepArrays | None:
        """The step as it has to be sent before ``replay``; None where there is no graph for it."""
        if step.max_query > 1 or step.adapters or len(step.ids) > self.sizes[-1]:
            return None
        return step.padded(self.sizes[bisect_left(self.sizes, len(step.ids))], *self._shape)

    def replay(self, step: StepArrays) -> Tensor:
        """Hidden states [T, hidden] of a prepared step; the next run overwrites them."""
        run, hidden = self._graphs[len(step.ids)]
        run()
        return hidden
