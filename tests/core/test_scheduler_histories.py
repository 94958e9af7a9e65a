"""Histories of everything that may happen to a scheduler: 10,000 by seed, and some that hypothesis makes up and cuts short."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from appliance.core import store
from tests.core.fake_model import PlainKey
from tests.core.histories import History, random_history

COUNT = 10_000
PARTS = 10  # none of which takes long


@pytest.fixture(autouse=True)
def plain_keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keys that say what their blocks must contain."""
    monkeypatch.setattr(store, "sha256", PlainKey)
    return


class SchedulerMachine(RuleBasedStateMachine):
    """A history whose choices are drawn by hypothesis, which makes a failing one as short as it can."""

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        self.history = History(self.chooser(data))

    def chooser(self, data: st.DataObject):  # type: ignore[no-untyped-def]
        return lambda n: data.draw(st.integers(0, n - 1))

    @rule(data=st.data())
    def act(self, data: st.DataObject) -> None:
        self.history.choose = self.chooser(data)
        self.history.act()

    def teardown(self) -> None:
        if hasattr(self, "history"):
            self.history.choose = lambda n: 0
            self.history.finish()


TestSchedulerMachine = pytest.mark.timeout(600)(SchedulerMachine.TestCase)  # a failure takes minutes to be made short
TestSchedulerMachine.settings = settings(
    max_examples=150, stateful_step_count=15, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_random_histories(part: int) -> None:
    for seed in range(part, COUNT, PARTS):
        try:
            random_history(seed)
        except Exception as error:
            error.add_note(f"seed {seed}: python -m tests.core.histories --first {seed} --count 1")
            raise
