"""Between host and card, without either waiting for the other: pinned memory, copies in one piece, marks in the card's queue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from appliance.memory.inputs import offsets

TYPES = {np.dtype(kind): getattr(torch, kind) for kind in ("int64", "int32", "float64", "float32")}


class Lane(Protocol):
    """What a device that works by itself offers. Tests have one for the CPU."""

    def pinned(self, size: int) -> Tensor:
        """``size`` bytes on the host; copies from and to them, said to be non-blocking, are."""

    def send(self, host: Tensor, device: Tensor) -> None:
        """Copy from pinned memory to the device. The host does not wait: until it is done, ``host`` must stay as it is."""

    def mark(self) -> Callable[[], None]:
        """What waits until all that the device has been told so far is done."""


class CudaLane:
    """The current CUDA stream."""

    def pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def send(self, host: Tensor, device: Tensor) -> None:
        device.copy_(host, non_blocking=True)

    def mark(self) -> Callable[[], None]:
        event = torch.cuda.Event()
        event.record()
        return event.synchronize


class Staging:
    """Sends a step's inputs, always to the same place on the device, from two places on the host in turn.

    So the inputs of a step may be written while those of the step before are on their way, but not before the results of the one
    before that are known.
    """

    def __init__(self, size: int, lane: Lane, device: torch.device) -> None:
        self._lane, self._hosts = lane, [lane.pinned(size) for _ in range(2)]
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self._turn = 0

    def send(self, arrays: Sequence[np.ndarray]) -> list[Tensor]:
        """The arrays (of TYPES, contiguous) on the device; the next call overwrites them.

        Arrays of the same shapes, after arrays of the same shapes, lie in the same place each time.
        """
        starts = offsets([array.nbytes for array in arrays])
        host, self._turn = self._hosts[self._turn], 1 - self._turn
        memory, sent = host.numpy(), []
        for start, array in zip(starts, arrays, strict=False):
            stop = start + array.nbytes
            memory[start:stop] = array.reshape(-1).view(np.uint8)
            sent.append(self._device[start:stop].view(TYPES[array.dtype]).view(array.shape))
        self._lane.send(host[: starts[-1]], self._device[: starts[-1]])
        return sent


def send_at_once(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays on a device that has no lane: on the CPU they stay where they are."""
    return [torch.from_numpy(array).to(device) for array in arrays]
