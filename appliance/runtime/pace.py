"""When news of the engine is told, so that telling does not take from the engine what it needs itself."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
import sys
import threading
import time

from appliance.memory.devices import allowed_processors, cpu_threads

SHARE = 0.1  # of the time, at most, the event loop works where the engine's threads have all processors
LATE_S = 0.03  # and so long, at most, does news wait for it
NICE = 10  # of the event loop's thread there: its weight beside an engine's thread is a tenth, as its share is
SLICE_NS = 100_000  # the shortest that Linux gives
SET_SCHEDULER = {"x86_64": 314, "aarch64": 274}  # the number of the call sched_setattr, for which libc has no function


class Pace:
    """Holds an event loop to a share of the time for what the engine brings: news waits, and is told together with what follows.

    An engine that steps every few milliseconds brings many tokens, and telling each at once takes longer than telling several;
    that time would be the engine's own where its threads have all processors. News that waits is not even read: two threads
    that wake for every step take the engine's processors twice. Steps that take long are told at once.
    """

    def __init__(self, share: float = 1.0) -> None:
        self.share = share
        self._rest = 0.0
        self._spent: float | None = None  # in the loop's thread's own time, when it last began to tell

    @property
    def crowded(self) -> bool:
        """Whether the engine has all processors."""
        return self.share < 1.0

    def tell(self) -> None:
        """The loop begins to tell, in the calling thread."""
        if self.crowded:
            spent = time.thread_time()
            if self._spent is not None:
                self._rest = min((spent - self._spent) / self.share, LATE_S)
            self._spent = spent

    def rest(self) -> float:
        """Seconds after news went to the loop before more is read: what it worked since the telling before is then its share."""
        return self._rest


def pace_beside(device: str, threads: int | None) -> Pace:
    """For an engine on ``device`` with ``threads`` of its own (--threads): held back only where it computes on all processors."""
    return Pace(SHARE if device == "cpu" and cpu_threads(threads) >= allowed_processors() else 1.0)


def step_aside() -> None:
    """The calling thread, and those that it starts from now on, have a tenth of the weight of an engine's thread.

    One of the engine's that is kept from its processor in the midst of a step keeps all the others waiting for it.
    """
    if sys.platform == "linux":  # where threads have priorities of their own
        with contextlib.suppress(OSError):
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, max(NICE, os.getpriority(os.PRIO_PROCESS, thread)))


def come_first() -> None:
    """The calling thread, and those that it starts from now on, get a processor from others as soon as they are ready.

    Linux (6.12 and later; the ones before take no notice) lets a thread that wakes go before one that may stay on for longer, and
    an engine's threads wake for each product. It changes nothing of the share that each of them has.
    """
    number = SET_SCHEDULER.get(platform.machine())
    if sys.platform == "linux" and number and os.sched_getscheduler(0) == os.SCHED_OTHER:
        fields = (48, os.SCHED_OTHER, 0, os.getpriority(os.PRIO_PROCESS, 0), 0, SLICE_NS, 0, 0)  # sched_attr of sched_setattr(2)
        ctypes.CDLL(None).syscall(number, 0, struct.pack("=IIQiIQQQ", *fields), 0)  # without it all is right, if a bit slower
