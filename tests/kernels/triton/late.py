"""Two streams that do what they are asked for as late, or as early, as the events between them allow."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Work = Callable[[], object]


class Event:
    def __init__(self) -> None:
        self.done = False

    def query(self) -> bool:
        return self.done


class Wait:
    def __init__(self, event: Event) -> None:
        self.event = event


class Deferred(TorchDispatchMode):
    """Copies within it are left to ``queue``."""

    def __init__(self, queue: deque[Any]) -> None:
        super().__init__()
        self.queue = queue

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.queue.append(lambda: func(*args, **(kwargs or {})))
            return args[0]
        return func(*args, **(kwargs or {}))


class Queue:
    """A stream: what it was given and has not done yet."""

    def __init__(self, owner: Queues) -> None:
        self.owner, self.items = owner, deque[Any]()

    def record_event(self) -> Event:
        event = Event()
        self.items.append(event)
        return event

    def wait_event(self, event: Any) -> None:
        self.owner.waits += 1
        if self.owner.waits != self.owner.dropped:
            self.items.append(Wait(event))

    def advance(self) -> bool:
        """Do the next thing; False where there is none, or it has to wait."""
        if not self.items or (isinstance(self.items[0], Wait) and not self.items[0].event.done):
            return False
        item = self.items.popleft()
        if isinstance(item, Event):
            item.done = True
        elif not isinstance(item, Wait):
            item()
        return True


class Queues:
    """Both streams only write down what they are asked for; ``run`` does it, in an order that the events allow.

    dropped: the wait of this number, counted from 1, is forgotten.
    """

    def __init__(self, dropped: int = 0) -> None:
        self.waits, self.dropped = 0, dropped
        self.side, self._main = Queue(self), Queue(self)

    def main(self) -> Queue:
        return self._main

    @contextmanager
    def on_side(self) -> Iterator[None]:
        with Deferred(self.side.items):
            yield

    def run(self, order: str | random.Random) -> None:
        """order: "main first" (the other stream as late as can be), "side first", or any order."""
        while self._main.items or self.side.items:
            both = [self._main, self.side]
            if isinstance(order, random.Random):
                order.shuffle(both)
            elif order == "side first":
                both.reverse()
            assert both[0].advance() or both[1].advance(), "each waits for the other"


class LateQueues(Queues):
    """What the steps' stream is asked for is done at once, copies only when that waits for them, or never."""

    def main(self) -> Queue:
        return _AtOnce(self)


class _AtOnce(Queue):
    def record_event(self) -> Event:
        event = Event()
        event.done = True
        return event

    def wait_event(self, event: Any) -> None:
        self.owner.waits += 1
        while self.owner.waits != self.owner.dropped and not event.done:
            assert self.owner.side.advance(), "the copy waits for what has not been asked for"
