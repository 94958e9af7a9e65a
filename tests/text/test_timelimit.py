"""Ends of work that takes too long: when it is told, what it may do about it, and that nothing else hears of it."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import pytest

from appliance.text import timelimit
from appliance.text.timelimit import TimeLimit


def spin(*_: Any) -> NoReturn:
    while True:
        pass


def spun(seconds: float) -> Callable[[], str]:
    """Work that takes so much time of its thread's processor."""

    def work() -> str:
        until = time.thread_time() + seconds
        while time.thread_time() < until:
            pass
        return "done"

    return work


def test_what_takes_too_long_is_ended() -> None:
    begun = time.thread_time()
    with pytest.raises(TimeoutError, match=r"it takes more than 0.02 s of processor time"):
        TimeLimit(0.02).run(spin)
    assert time.thread_time() - begun >= 0.02
    assert TimeLimit(1000.0).run(spun(0.03)) == "done"


def test_nothing_is_left_for_the_interpreter_to_look_for() -> None:
    """Else whoever traces instructions afterwards (a debugger, a profiler) would stand still for ever."""
    script = (
        "import sys\nfrom appliance.text.timelimit import TimeLimit\n"
        "def spin():\n    while True: pass\n"
        "try: TimeLimit(0.01).run(spin)\nexcept TimeoutError: pass\n"
        "def trace(frame, event, argument):\n    frame.f_trace_opcodes = True\n    return trace\n"
        "sys.settrace(trace)\nsorted([2, 1], key=lambda x: x)\nsys.settrace(None)\nprint('on')\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ran.stdout == "on\n", ran.stderr


def test_waiting_is_no_work() -> None:
    """Another thread works meanwhile, for ten times as long."""
    other = threading.Thread(target=spun(0.1))
    other.start()
    assert TimeLimit(0.01).run(lambda: other.join() or "done") == "done"


def test_an_error_is_the_works_own() -> None:
    def wrong() -> None:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        TimeLimit(1.0).run(wrong)


def test_the_shorter_of_two_ends_first() -> None:
    """And one that begins later may end before."""
    long, ends = TimeLimit(1000.0), list[str]()
    begun = threading.Event()

    def first() -> None:
        try:
            long.run(lambda: begun.set() or spin())
        except TimeoutError:
            ends.append("long")

    thread = threading.Thread(target=first)
    thread.start()
    begun.wait()
    with pytest.raises(TimeoutError):
        TimeLimit(0.01).run(spin)
    ends.append("short")
    long.stop()
    thread.join()
    assert ends == ["short", "long"]


def test_what_is_stopped_before_is_not_begun() -> None:
    limit, calls = TimeLimit(1000.0), list[int]()
    limit.stop()
    with pytest.raises(TimeoutError):
        limit.run(lambda: calls.append(1))
    assert not calls
    limit = TimeLimit(1000.0)
    assert limit.run(lambda: "done") == "done"
    limit.stop()  # nobody hears of it
    spun(0.01)()


def test_what_swallows_its_end_is_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timelimit, "AGAIN_S", 0.02)
    swallowed = list[type]()

    def work() -> None:
        for _ in range(2):
            try:
                spin()
            except BaseException as error:
                swallowed.append(type(error))
        spin()

    with pytest.raises(TimeoutError):
        TimeLimit(0.01).run(work)
    assert swallowed == [timelimit._End] * 2


def test_an_end_that_comes_late_does_not_come() -> None:
    """It was raised while the work ended: nothing of it is left behind the work."""

    def raised(limit: TimeLimit) -> None:
        """With no instruction in between at which it could come: told, and then settled."""
        limit._told = True
        ends = (timelimit._End, *[timelimit.ctypes.py_object()])
        list(map(timelimit._raise_in, [threading.get_ident()] * 2, ends))

    limit = TimeLimit(1000.0)
    limit.run(lambda: raised(limit))
    spun(0.001)()
    rng, found = random.Random(3), list[str]()
    for _ in range(300):  # ends of the work and of its time, about at once
        try:
            found.append(TimeLimit(0.0005).run(spun(rng.uniform(0.0002, 0.0012))))
        except TimeoutError:
            found.append("late")
        spun(0.0001)()  # which would be interrupted
    assert len(found) == 300


def test_many_threads_at_once() -> None:
    ended = list[bool]()

    def one(k: int) -> None:
        try:
            ended.append(TimeLimit(0.01 if k % 2 else 1000.0).run(spin if k % 2 else spun(0.01)) == "done" and not k % 2)
        except TimeoutError:
            ended.append(k % 2 == 1)

    threads = [threading.Thread(target=one, args=(k,)) for k in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ended == [True] * 12
    assert not timelimit._watch._running
