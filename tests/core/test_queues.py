"""Who is there, and that nothing that happens looks at all who wait."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from appliance.core.messages import EngineInfo, Submit
from appliance.core.params import SamplingParams
from appliance.core.request import Request
from appliance.runtime.engine import Engine
from tests.core.fake_model import make_request, make_scheduler

PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)
INFO = EngineInfo("m", "", "", "", "", "cpu", 64, 1000, (0,), 0.0, {})


def instructions(call: Callable[[], object]) -> int:
    """How many of Python's instructions a call takes: the same in every run, unlike seconds."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    gc.disable()  # what other tests left behind may run some when it is collected
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
        gc.enable()
    return count


class Compared(Request):
    """A request that says so when a list is searched for it."""

    comparisons = 0

    def __eq__(self, other: object) -> bool:
        Compared.comparisons += 1
        return self is other

    __hash__ = Request.__hash__


def costs(count: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What happens beside ``count`` requests that wait for a place, and as many for something else."""
    monkeypatch.setattr("appliance.core.door.Request", Compared)
    scheduler, runner = make_scheduler(blocks=8, seqs=2, caching=True, host=8)
    engine = Engine(runner, scheduler, INFO)  # type: ignore[arg-type]
    found = {}

    def submit(name: str) -> None:
        engine.submit(Submit(name, tuple(range(1, 9)), PARAMS, 0.0))

    for i in range(count):
        submit(f"w{i}")
        held = make_request(f"h{i}", range(8), 4)
        held.held = True
        scheduler.add(held)
    runner.step()
    Compared.comparisons = 0
    found["submit"] = instructions(lambda: submit("last"))
    found["schedule"] = instructions(lambda: found.update(plan=scheduler.schedule()))  # type: ignore[call-overload]
    plan = found.pop("plan")
    sampled = runner.run(plan)  # type: ignore[arg-type]
    found["commit"] = instructions(lambda: scheduler.commit(plan, sampled))  # type: ignore[arg-type]
    found["stats"] = instructions(engine.stats)
    found["abort"] = instructions(lambda: engine.abort(f"w{count // 2}"))
    found["abort who is held"] = instructions(lambda: engine.abort(f"h{count // 2}"))
    found["abort nobody"] = instructions(lambda: engine.abort("nobody"))
    found["let go"] = instructions(lambda: scheduler.hold(scheduler.find(f"h{count // 3}")[0], False))
    found["admit"] = instructions(lambda: [runner.step() for _ in range(12)])
    found["comparisons"] = Compared.comparisons
    scheduler.check()
    return found


def test_nothing_takes_longer_where_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the search for a place in a list, but for a few comparisons: in C, of one attribute."""
    few, many = costs(100, monkeypatch), costs(1000, monkeypatch)
    assert many == few and few["abort"] > 0 == few["comparisons"]
