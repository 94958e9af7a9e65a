"""Two streams that do what they are asked for as late, or as early, as the events between them allow."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


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
    """Both streams only write down what they are asked for.

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

    def wrong(self) -> set[int]:
        """Places in the steps' queue of those that fail in some order which the events allow: of all orders there are.

        What the steps' stream does are reads, which return whether they saw what they should. They change nothing, so that what
        they see depends only on how far the other stream is. AssertionError where the two can come to wait for each other.
        """
        main, side = list(self._main.items), list(self.side.items)
        reads = [i for i, item in enumerate(main) if callable(item)]
        right = []  # by how much of the other stream is done: which reads would succeed
        for item in [*side, None]:
            right.append({i: main[i]() for i in reads})
            if callable(item):
                item()
        recorded = {id(item): (n, i) for n, queue in enumerate((main, side)) for i, item in enumerate(queue)}

        def can(item: Any, done: tuple[int, int]) -> bool:
            if not isinstance(item, Wait):
                return True
            queue, place = recorded[id(item.event)]
            return done[queue] > place

        seen, left, found = {(0, 0)}, [(0, 0)], set()
        while left:
            i, j = done = left.pop()
            if i < len(main) and i in right[j] and not right[j][i]:
                found.add(i)
            after = [(i + 1, j)] if i < len(main) and can(main[i], done) else []
            after += [(i, j + 1)] if j < len(side) and can(side[j], done) else []
            assert after or done == (len(main), len(side)), "each waits for the other"
            left += [state for state in after if state not in seen]
            seen.update(after)
        return found


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
