"""A device that works by itself, on the CPU: what it sends to the host is seen by those only who wait for it."""

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
