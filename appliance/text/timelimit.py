"""An end to Python that somebody else wrote (a template), when it has taken too long or nobody waits for it any more.

One thread watches all of them. It sleeps until the first of them can have used its time up, and where there is none for good. A
single operation in C (a sort, say) is not interrupted: what runs is ended behind it.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

AGAIN_S = 1.0  # of processor time until what went on is told to end once more: __del__, say, swallows what is raised in it
_raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
_raise_in.argtypes = ctypes.c_ulong, ctypes.py_object


class _End(BaseException):
    """No Exception: those are caught on the way."""


class TimeLimit:
    """Of one piece of work."""

    def __init__(self, seconds: float) -> None:
        """``seconds`` of the working thread's own processor time: a machine that is busy otherwise takes none of it."""
        self._seconds, self._stopped = seconds, False
        self._thread = self._clock = 0
        self._until = math.inf  # by the thread's clock
        self._told = False

    def run(self, work: Callable[[], T]) -> T:
        """``work()``, in this thread. Raises TimeoutError where it took too long, or was stopped."""
        self._thread = threading.get_ident()
        self._clock = time.pthread_getcpuclockid(self._thread)
        try:
            try:
                _watch.begin(self)
                return work()
            finally:
                _watch.end(self)
        except _End:
            _watch.end(self)  # it may have come within the first one; the next would take AGAIN_S
            raise TimeoutError(f"it takes more than {self._seconds:g} s of processor time") from None

    def stop(self) -> None:
        """End it now, from another thread; before its begin, too. Nothing where it has ended."""
        _watch.stop(self)

    # The rest is the watch's, which holds its lock.

    def arm(self) -> float:
        """Seconds in which it cannot use its time up."""
        if self._stopped:
            raise _End
        self._until = time.clock_gettime(self._clock) + self._seconds
        return self._seconds

    def halt(self) -> None:
        self._stopped, self._until = True, -math.inf

    def look(self) -> float:
        """Seconds after which to look again; where its time is up, it ends."""
        now = time.clock_gettime(self._clock)
        if now >= self._until:
            self._told, self._until = True, now + AGAIN_S
            _raise_in(self._thread, _End)
        return self._until - now

    def settle(self) -> None:
        """In its own thread: what was raised and has not come yet does not come any more.

        It is not taken back (by NULL): then the interpreter would look for it for ever, and under sys.settrace do nothing else.
        """
        if self._told:
            with contextlib.suppress(_End):
                _raise_in(self._thread, _End)  # in place of the one that may be on its way
                while True:
                    pass


class _Watch:
    """``end`` may be interrupted by what it guards from. So the lock is taken by one instruction, which a Condition's is not."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)
        self._running: set[TimeLimit] = set()
        self._wakes = math.inf  # when the thread looks next, by the monotonic clock
        self._thread: threading.Thread | None = None

    def begin(self, limit: TimeLimit) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="time limits", daemon=True)
                self._thread.start()
            pause = limit.arm()
            self._running.add(limit)
            if time.monotonic() + pause < self._wakes:
                self._news.notify()

    def end(self, limit: TimeLimit) -> None:
        with self._lock:
            self._running.discard(limit)
            limit.settle()

    def stop(self, limit: TimeLimit) -> None:
        with self._lock:
            limit.halt()
            if limit in self._running:
                self._news.notify()

    def _work(self) -> None:
        with self._lock:
            while True:
                pause = min((limit.look() for limit in self._running), default=math.inf)
                self._wakes = time.monotonic() + pause
                self._news.wait(None if pause == math.inf else pause)


_watch = _Watch()
