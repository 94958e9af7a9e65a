"""A device that works by itself, on the CPU: what it sends to the host is seen by those only who wait for it.

With a SlowLane, what the host sends may still be on its way until a mark behind it has been waited for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

POISON = 0x5A


class FakeLane:
    def __init__(self) -> None:
        self.buffers: list[Tensor] = []
        self.written: list[int] = []  # the last mark before which each buffer was
        self.marks = self.waits = 0

    def pinned(self, size: int) -> Tensor:
        self.buffers.append(torch.full((size,), POISON, dtype=torch.uint8))
        self.written.append(0)
        return self.buffers[-1]

    def send(self, host: Tensor, device: Tensor) -> None:
        device.copy_(host)

    def mark(self) -> Callable[[], None]:
        """Hides what has arrived until it is waited for; what is overwritten before that is lost."""
        self.marks += 1
        mark, arrived = self.marks, {}
        for place, buffer in enumerate(self.buffers):
            if bool((buffer != POISON).any()):
                arrived[place], self.written[place] = buffer.clone(), mark
                buffer.fill_(POISON)

        def wait() -> None:
            self.waits += 1
            for place, content in arrived.items():
                if self.written[place] == mark:
                    self.buffers[place].copy_(content)

        return wait


class SlowLane(FakeLane):
    """Fails where something is sent from host memory from which something else may still be on its way."""

    def __init__(self) -> None:
        super().__init__()
        self.leaving: list[tuple[int, int, int]] = []  # first byte, one past the last, and the last mark before it was sent

    def send(self, host: Tensor, device: Tensor) -> None:
        first, stop = host.data_ptr(), host.data_ptr() + host.nbytes
        assert not any(first < end and begin < stop for begin, end, _ in self.leaving), "overwritten on its way to the device"
        self.leaving.append((first, stop, self.marks))
        super().send(host, device)

    def mark(self) -> Callable[[], None]:
        arrived = super().mark()
        mark = self.marks

        def wait() -> None:
            self.leaving = [one for one in self.leaving if one[2] >= mark]
            arrived()

        return wait
