from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from appliance.tui.feed import HISTORY, Feed, FeedError, Rates, base_url, fetch, parse
from quant.errors import InputError
from tests.tui.fake_server import FakeServer


class Counters:
    """Bodies of /stats with chosen counters, and a clock that goes with them."""

    def __init__(self) -> None:
        self.body = FakeServer().body()
        self.now = 0.0

    def feed(self) -> Feed:
        return Feed("localhost:1", source=lambda url: self.body, clock=lambda: self.now)

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
    feed = Feed("localhost:1", source=server)
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
    feed = Feed("localhost:1", source=FakeServer(arrivals=0))
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


URLS = [("localhost:80/", "http://localhost:80"), ("https://a.b", "https://a.b"), ("http://[::1]:8000", "http://[::1]:8000")]


@pytest.mark.parametrize(("given", "url"), URLS)
def test_base_url(given: str, url: str) -> None:
    assert base_url(given) == url


@pytest.mark.parametrize("given", ["ftp://a", "http://", "http://a:0", "http://a:x", ""])
def test_base_url_refuses(given: str) -> None:
    with pytest.raises(InputError, match=r"is not the address of a server: it looks like http://127.0.0.1:8000"):
        base_url(given)


@contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (404, b"{}", "answers 404 Not Found: is this an appliance server"),
        (200, b"<html>", "does not answer in JSON"),
        (200, b"\xff", "does not answer in JSON"),
        (200, b"[]", "is not a JSON object"),
    ],
)
def test_fetch_says_what_is_wrong(status: int, body: bytes, message: str) -> None:
    with answering(status, body) as url, pytest.raises(FeedError, match=message):
        fetch(url)


def test_fetch_over_http_never_asks_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with answering(200, b'{"state": "ok"}') as url:
        assert fetch(url) == {"state": "ok"}
    with pytest.raises(FeedError, match=f"no answer from {url}: Connection refused"):
        fetch(url)


def test_a_server_with_keys_is_asked_with_one() -> None:
    seen: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers.get("Authorization"))
            good = seen[-1] == "Bearer secret"
            self.send_response(200 if good else 401)
            self.end_headers()
            self.wfile.write(b'{"version": "1"}' if good else b"{}")

        def log_message(self, *given: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        assert fetch(url, "secret") == {"version": "1"}
        with pytest.raises(FeedError, match="asks for a key: give one of its own as --api-key"):
            fetch(url)
        server.shutdown()
    assert seen == ["Bearer secret", None]
