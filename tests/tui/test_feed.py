from __future__ import annotations

from typing import Any

import pytest

from appliance.tui.feed import HISTORY, LOG_LINES, Feed, FeedError, LogLine, Rates
from appliance.tui.view import parse
from tests.tui.fake_server import FakeServer


class Counters:
    """Bodies of /stats with chosen counters, and a clock that goes with them."""

    url, model = "http://localhost:1", None

    def __init__(self) -> None:
        self.body = FakeServer().body()
        self.body["hardware"] = {}
        self.now = 0.0

    def stats(self) -> dict[str, Any]:
        return self.body

    def log(self, after: int) -> dict[str, Any]:
        return {"lines": [{"message": str(n)} for n in range(after, after + 7)], "next": after + 7}

    def cancel(self, request_id: str) -> str:
        return "no"

    def feed(self) -> Feed:
        return Feed(self, clock=lambda: self.now)

    def set(self, now: float, **engine: float) -> None:
        self.now = now
        self.body = {**self.body, "engine": {**self.body["engine"], **engine}}


@pytest.fixture
def counters() -> Counters:
    return Counters()


def test_rates_are_differences_over_the_engines_own_time(counters: Counters) -> None:
    feed = counters.feed()
    counters.set(100, time=50.0, prompt_tokens=10, generation_tokens=10, running=1)
    feed.poll()
    assert not feed.history, "one look has no rate"
    counters.set(102, time=51.0, prompt_tokens=30, generation_tokens=15, running=1)
    feed.poll()
    assert feed.history[-1] == Rates(prompt=20.0, generation=5.0)
    counters.set(103, time=53.0, prompt_tokens=30, generation_tokens=16, running=1)
    feed.poll()
    assert feed.history[-1] == Rates(prompt=0.0, generation=0.5)
    assert feed.peak == Rates(prompt=20.0, generation=5.0)


def test_a_long_step_keeps_its_rate_and_an_idle_engine_has_none(counters: Counters) -> None:
    feed = counters.feed()
    for now, tokens in ((0, 0), (1, 7), (2, 7)):
        counters.set(now, time=float(min(now, 1)), generation_tokens=tokens, running=1)
        feed.poll()
    assert [r.generation for r in feed.history] == [7.0, 7.0]
    counters.set(3, running=0)
    feed.poll()
    assert feed.history[-1] == Rates()


def test_idle_time_does_not_thin_the_first_rate(counters: Counters) -> None:
    feed = counters.feed()
    counters.set(0, time=0.0, generation_tokens=0, running=0, waiting=0)
    feed.poll()
    counters.set(599)
    feed.poll()
    counters.set(600, time=600.0, generation_tokens=50, running=1)
    feed.poll()
    assert feed.history[-1].generation == 50.0, "50 tokens since the last look, a second ago"


def test_a_server_that_started_again_gives_no_negative_rate(counters: Counters) -> None:
    feed = counters.feed()
    counters.set(0, time=9.0, generation_tokens=100)
    feed.poll()
    counters.set(1, time=10.0, generation_tokens=3)
    feed.poll()
    assert feed.history[-1] == Rates()


def test_keeps_the_last_view_while_the_server_is_away() -> None:
    server = FakeServer()
    feed = Feed(server)
    feed.poll()
    seen = feed.view
    server.away = FeedError("no answer from there: refused")
    feed.poll()
    since = feed.away_since
    feed.poll()
    assert feed.view is seen and feed.error == "no answer from there: refused"
    assert since is not None and feed.away_since == since, "the first failure counts"
    server.away = None
    feed.poll()
    assert feed.error is None and feed.away_since is None and feed.view is not seen


def test_history_is_bounded() -> None:
    feed = Feed(FakeServer(arrivals=0))
    for _ in range(HISTORY + 20):
        feed.poll()
    assert len(feed.history) == HISTORY


def test_parse_leaves_aside_what_it_does_not_know_and_names_what_is_missing() -> None:
    body = FakeServer().body()
    body["new"], body["engine"]["new"], body["info"]["new"] = 1, 2, 3
    assert parse(body).stats.blocks_total == 1536
    with pytest.raises(FeedError, match="not understood: KeyError: 'state'"):
        parse({name: value for name, value in body.items() if name != "state"})
    with pytest.raises(FeedError, match="not understood: TypeError"):
        parse({**body, "engine": None})


def row(name: str, out: int, **more: Any) -> dict[str, Any]:
    known = {"request_id": name, "index": 0, "state": "running", "prompt_tokens": 10, "output_tokens": out, "blocks": 2}
    return {**known, "computed_tokens": 9 + out, "age_s": 3.0, "preemptions": 0, **more}


def test_speed_is_that_between_two_looks_evened_out(counters: Counters) -> None:
    feed = counters.feed()
    speeds = []
    for now, out in ((0, 11), (1, 21), (2, 31), (3, 51)):
        counters.set(now, time=float(now), running=1, requests_now=[row("a", out, ttft_s=1.0)])
        feed.poll()
        assert feed.view is not None
        speeds.append(feed.view.rows[0].speed)
    assert speeds == [5.0, 7.5, 8.75, 14.375], "at first the mean since the first token: 10 more in 2 s"
    assert list(feed.trails["a", 0]) == speeds
    counters.set(4, time=3.0)
    feed.poll()
    assert feed.view is not None and feed.view.rows[0].speed == 14.375, "in the middle of a step"
    counters.set(5, time=5.0, requests_now=[row("b", 0)])
    feed.poll()
    assert feed.view is not None and feed.view.rows[0].speed is None and set(feed.trails) == {("b", 0)}


def test_time_to_first_token_is_the_mean_of_those_that_came(counters: Counters) -> None:
    feed = counters.feed()
    for now, (count, total) in enumerate(((5, 1.0), (9, 3.0), (9, 3.0), (1, 0.5))):
        counters.now = now
        counters.body = {**counters.body, "latency": {"ttft": {"count": count, "sum_s": total}}}
        feed.poll()
    assert [one.ttft for one in feed.history] == [0.5, None, None], "none came; and then the server was started again"


def test_another_model_of_the_server_begins_with_a_clean_slate(counters: Counters) -> None:
    feed = counters.feed()
    counters.body["models"] = [{"name": "a"}, {"name": "b"}]
    for model, tokens in (("a", 500), ("a", 600), ("b", 7000)):
        counters.body["model"] = model
        counters.now += 1
        counters.set(counters.now, time=counters.now, generation_tokens=tokens)
        feed.poll()
    assert not feed.history and feed.view is not None and feed.view.model == "b"
    feed.next_model()
    assert feed.source.model == "a", "after the last one the first"


def test_the_log_is_asked_for_once_and_bounded(counters: Counters) -> None:
    feed = counters.feed()
    for _ in range(3):
        feed.poll_log()
    assert [line.message for line in feed.log] == [str(n) for n in range(21)] and feed.log_total == 21
    assert feed.log[0] == LogLine("", "", "", "0")
    for _ in range(LOG_LINES // 7):
        feed.poll_log()
    assert len(feed.log) == LOG_LINES
    counters.log = lambda after: {"lines": 3, "next": 1}  # type: ignore[method-assign]
    feed.poll_log()
    assert feed.log_error is not None and "/logs is not understood" in feed.log_error


@pytest.mark.parametrize("wrong", [None, "many", [], 1e300, float("nan")])
def test_what_is_no_number_is_told_and_not_shown(counters: Counters, wrong: Any) -> None:
    feed = counters.feed()
    counters.set(1, blocks_used=wrong)
    feed.poll()
    assert feed.view is None and feed.error is not None and "not understood: TypeError: blocks_used is" in feed.error
    counters.set(1, blocks_used=1, requests_now=[row("a", 1, ttft_s="soon")])
    feed.poll()
    assert feed.error is not None and "ttft_s is 'soon'" in feed.error
