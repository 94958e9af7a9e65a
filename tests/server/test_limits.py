"""Limits of keys and of the queue, over HTTP, by a clock that the tests move."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.config import EngineConfig, ServerConfig
from appliance.server import usage
from appliance.server.limits import DAY_S, Account, Bucket, Limits, RateLimited, _time
from appliance.text.tokenizer import Tokenizer
from tests.server.conftest import Served, serve_in_thread
from tests.server.fake import FakeClient
from tests.server.test_keys import bearer, digest
from tests.server.test_lifecycle import LONG, eventually

MINE, THEIRS = "sk-mine", "sk-theirs"


class Clock:
    """A monotonic clock that only moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def start(tokenizer: Tokenizer, model_dir: Path, tmp_path: Path) -> Callable[..., AbstractContextManager[tuple[Served, Clock]]]:
    @contextmanager
    def start(limits: str = "", *, delay_s: float = 0.0, **options: Any) -> Iterator[tuple[Served, Clock]]:
        file = tmp_path / "keys.toml"
        mine = ", ".join(filter(None, (f'sha256 = "{digest(MINE)}"', limits)))
        file.write_text(f'mine = {{ {mine} }}\ntheirs = {{ sha256 = "{digest(THEIRS)}" }}\n')
        config = ServerConfig(served_model_name=("tiny",), api_key_file=str(file), **options)
        engine = EngineConfig(model=str(model_dir))
        with serve_in_thread(lambda: FakeClient(delay_s=delay_s), tokenizer, engine, config) as served:
            clock = Clock()
            for key in served.state.keys._kept:
                served.state.keys.accounts[key.name] = Account(key.limits, clock)
            yield served, clock

    return start


def ask(served: Served, key: str = MINE, prompt: Any = (5, 6, 7), **body: Any) -> httpx.Response:
    with served.http as http:
        return http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 2, **body}, headers=bearer(key))


def limited(response: httpx.Response, words: str, retry_after: int) -> None:
    error = response.json()["error"]
    assert response.status_code == 429 and words in error["message"], response.text
    assert (error["type"], error["code"], error["param"]) == ("rate_limit_error", "rate_limit_exceeded", None)
    assert int(response.headers["retry-after"]) == retry_after and response.headers["x-request-id"]


def test_requests_per_minute(start: Any) -> None:
    with start("requests_per_minute = 6") as (served, clock):
        for left in (5, 4, 3, 2, 1, 0):
            response = ask(served)
            assert response.status_code == 200 and response.headers["x-ratelimit-remaining-requests"] == str(left)
        assert response.headers["x-ratelimit-limit-requests"] == "6" and response.headers["x-ratelimit-reset-requests"] == "1m0s"
        limited(ask(served), "this key's limit is 6 requests per minute; try again in 10s", 10)
        assert ask(served, THEIRS).status_code == 200  # no business of theirs
        assert "x-ratelimit-limit-requests" not in ask(served, THEIRS).headers
        with served.http as http:  # reading computes nothing
            assert http.get("/v1/models", headers=bearer(MINE)).status_code == 200
        clock.now += 9.5
        limited(ask(served), "try again in 500ms", 1)
        clock.now += 0.5  # refusals cost nothing
        assert ask(served).status_code == 200 and ask(served).status_code == 429
        clock.now += 1e6
        assert [ask(served).status_code for _ in range(7)] == [200] * 6 + [429]


def test_tokens_per_minute(start: Any) -> None:
    with start("tokens_per_minute = 60") as (served, clock):
        response = ask(served, prompt=[5] * 20, max_tokens=7, n=2, temperature=1)  # 34
        assert response.status_code == 200 and response.headers["x-ratelimit-remaining-tokens"] == "26"
        assert response.headers["x-ratelimit-reset-tokens"] == "34s" and response.headers["x-ratelimit-limit-tokens"] == "60"
        limited(ask(served, prompt=[5] * 30), "this key's limit is 60 tokens per minute; try again in 4s", 4)
        limited(
            ask(served, prompt=[5] * 30, stream=True), "try again in 4s", 4
        )  # before a stream begins, with a status of its own
        submitted = len(served.client.submitted)
        response = ask(served, prompt=[5] * 20, max_tokens=40, stream=True)  # what it will need is not known yet: 34 are owed now
        assert response.status_code == 200 and len(served.client.submitted) == submitted + 1
        limited(ask(served, prompt=[5]), "try again in 35s", 35)
        clock.now += 35
        assert ask(served, prompt=[5], max_tokens=1).status_code == 200
        clock.now += 60
        response = ask(served, prompt=[5] * 61)
        limited(response, "the request has 61 tokens, and this key's limit is 60 tokens per minute", 60)
        assert response.headers["x-should-retry"] == "false"  # no waiting helps


def test_an_aborted_request_pays_for_what_was_computed(start: Any) -> None:
    with start("tokens_per_minute = 1000", delay_s=0.01) as (served, _):
        with served.http as http:
            request = http.build_request("POST", "/v1/completions", json={**LONG, "stream": True}, headers=bearer(MINE))
            response = http.send(request, stream=True)
            lines = response.iter_lines()
            for _ in range(9):
                next(lines)
            response.close()
        eventually(lambda: not served.state.jobs)
        used = 1000 - served.state.keys.accounts["mine"]._bucket("tokens_per_minute").level
        assert 4 + 5 <= used == 4 + served.client.tokens < 200  # the prompt, and what came


def test_tokens_per_day(start: Any) -> None:
    with start("tokens_per_day = 50") as (served, clock):
        clock.now += 3600
        assert ask(served, prompt=[5] * 20, max_tokens=20).status_code == 200
        response = ask(served, prompt=[5] * 11)
        limited(response, "this key has used 40 of its 50 tokens per day; try again in 23h0m0s", 23 * 3600)
        assert response.headers["x-should-retry"] == "false"  # clients that retry by themselves had better not
        assert ask(served, prompt=[5] * 9, max_tokens=3).status_code == 200
        limited(ask(served, prompt=[5]), "used 52 of its 50", 23 * 3600)
        clock.now += 23 * 3600
        assert ask(served, prompt=[5] * 40).status_code == 200
        limited(ask(served, prompt=[5] * 9), "used 44 of its 50", 24 * 3600)  # it owed 2, and has an end, too


def test_days_go_on_when_the_server_starts_again(
    tokenizer: Tokenizer, model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, kept = tmp_path / "keys.toml", tmp_path / "keys.toml.used"
    file.write_text(f'mine = {{ sha256 = "{digest(MINE)}", tokens_per_day = 50 }}\ntheirs = {{ sha256 = "{digest(THEIRS)}" }}\n')
    config = ServerConfig(served_model_name=("tiny",), api_key_file=str(file))
    wall = time.time()

    def serve(later_s: float) -> AbstractContextManager[Served]:
        monkeypatch.setattr(usage, "time", SimpleNamespace(time=lambda: wall + later_s))
        return serve_in_thread(FakeClient, tokenizer, EngineConfig(model=str(model_dir)), config)

    with serve(0) as served:
        assert ask(served, prompt=[5] * 30).status_code == ask(served, THEIRS).status_code == 200
        served.state.keys.usage.write(served.state.keys.accounts)
    assert json.loads(kept.read_text()).keys() == {"mine"} and kept.stat().st_mode & 0o777 == 0o600
    with serve(3600) as served:
        response = ask(served, prompt=[5] * 20)
        assert "used 32 of its 50 tokens per day" in response.json()["error"]["message"]
        assert 23 * 3600 - 300 < int(response.headers["retry-after"]) <= 23 * 3600
        assert ask(served, prompt=[5] * 15, max_tokens=9).status_code == 200  # it owes 6
        served.state.keys.usage.write(served.state.keys.accounts)
    with serve(-7200) as served:  # the machine's clock was set back: as if no time had passed
        assert 24 * 3600 - 300 < int(ask(served).headers["retry-after"]) <= 24 * 3600
    with serve(25 * 3600) as served:
        assert "used 6 of its 50" in ask(served, prompt=[5] * 45).json()["error"]["message"]
        assert ask(served, prompt=[5] * 40).status_code == 200
    endless = '{"mine": {"since": -Infinity, "tokens": 3}}'
    for rubbish in ("{", "[]", '{"mine": 3}', '{"mine": {"since": 0}}', '{"mine": {"since": "x", "tokens": 1e999}}', endless):
        kept.write_text(rubbish)
        caplog.clear()
        with serve(0) as served:
            assert ask(served, prompt=[5] * 40).status_code == 200 and "keys.toml.used" in caplog.text
    kept.unlink()
    kept.mkdir()
    caplog.clear()
    with serve(0) as served:
        assert ask(served, prompt=[5] * 40).status_code == 200
        for _ in range(2):
            served.state.keys.usage.write(served.state.keys.accounts)
    assert caplog.text.count("what keys use of their days is forgotten when the server ends") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keys.toml", "keys.toml.used"]


def test_usage_that_has_no_place_is_told_and_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not even a file that is to be taken away again can be looked for there."""
    (tmp_path / "file").touch()
    account, kept = Account(Limits(tokens_per_day=9)), usage.Usage(tmp_path / "file" / "used")
    account.tokens(3)
    assert kept.read() == {}
    kept.write({"mine": account})
    assert "what keys use of their days is forgotten when the server ends" in caplog.text


async def test_usage_is_written_while_the_server_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "EVERY_S", 0.01)
    accounts, kept = {"mine": Account(Limits(tokens_per_day=9))}, usage.Usage(tmp_path / "used")
    keeping = asyncio.create_task(kept.keep(accounts))
    for tokens in (3, 7):
        accounts["mine"].tokens(tokens - accounts["mine"].day()[1])
        while kept.read().get("mine", (0, 0))[1] != tokens:
            await asyncio.sleep(0.01)
    keeping.cancel()


async def test_what_a_thread_writes_late_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was asked to before the server's last writing, and comes after it."""
    late: list[Any] = []

    async def to_thread(*call: Any) -> None:
        late.append(call)
        await asyncio.sleep(60)

    monkeypatch.setattr(usage, "EVERY_S", 0.0)
    monkeypatch.setattr(usage.asyncio, "to_thread", to_thread)
    account, kept = Account(Limits(tokens_per_day=9)), usage.Usage(tmp_path / "used")
    account.tokens(3)
    keeping = asyncio.create_task(kept.keep({"mine": account}))
    while not late:
        await asyncio.sleep(0)
    account.tokens(4)
    kept.write({"mine": account})
    late[0][0](*late[0][1:])
    assert kept.read()["mine"][1] == 7
    keeping.cancel()


def test_concurrency(start: Any) -> None:
    with start("concurrency = 2", delay_s=0.02) as (served, _), served.http as http:
        with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}, headers=bearer(MINE)) as one:
            lines = one.iter_lines()
            next(lines)
            with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}, headers=bearer(MINE)) as two:
                others = two.iter_lines()
                next(others)
                limited(ask(served), "this key has 2 requests at work, and its limit is 2", 1)
                assert ask(served, THEIRS).status_code == 200
            eventually(lambda: len(served.state.jobs) == 1)
            assert ask(served).status_code == 200  # the second client has gone
        eventually(lambda: served.state.keys.accounts["mine"].running == 0)
        served.client.fail_at = 0
        assert ask(served).status_code == 500  # neither do errors keep a place
        assert ask(served, max_tokens=-1).status_code == 400
        assert served.state.keys.accounts["mine"].running == 0


@pytest.mark.parametrize("whose", ["server", "key"])
def test_long_prompts_and_answers(start: Any, whose: str) -> None:
    """Of the key and of the server the smaller number holds, for chat as for completions."""
    small, large = (4, 6), (9, 90)
    key, server = (small, large) if whose == "key" else (large, small)
    limits = f"max_prompt_tokens = {key[0]}, max_output_tokens = {key[1]}"
    with start(limits, max_prompt_tokens=server[0], max_output_tokens=server[1]) as (served, _):
        for asked, given in ((2, 2), (6, 6), (7, 6), (200, 6)):
            choice = ask(served, prompt=[5] * 4, max_tokens=asked, ignore_eos=True).json()
            assert choice["usage"]["completion_tokens"] == given and choice["choices"][0]["finish_reason"] == "length"
        refused = ask(served, prompt=[5] * 5)
        error = refused.json()["error"]
        assert refused.status_code == 400 and (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
        assert f"the prompt has 5 tokens, and this {whose} takes at most 4 in one" in error["message"]
        error = ask(served, min_tokens=7, max_tokens=9).json()["error"]
        assert error["param"] == "min_tokens" and f"this {whose} gives at most 6" in error["message"]
        assert ask(served, THEIRS, prompt=[5] * 5).status_code == (400 if whose == "server" else 200)
        with served.http as http:
            body = {"messages": [{"role": "user", "content": "a"}], "ignore_eos": True}
            told = http.post("/v1/chat/completions", json=body, headers=bearer(MINE)).json()["error"]
            assert "takes at most 4" in told["message"] and (told["param"], told["code"]) == (
                "messages",
                "context_length_exceeded",
            )
            told = http.post("/v1/responses", json={"input": "abcde"}, headers=bearer(MINE)).json()["error"]
            assert "takes at most 4" in told["message"] and (told["param"], told["code"]) == ("input", "context_length_exceeded")
            body = {"model": "tiny", "max_tokens": 2, "messages": body["messages"]}
            told = http.post("/v1/messages", json=body, headers=bearer(MINE)).json()["error"]
            assert re.fullmatch(r"prompt is too long: \d+ tokens > 4 maximum", told["message"]), "as clients look for it"


def test_openai_client_waits_and_asks_again(start: Any) -> None:
    with start("requests_per_minute = 60") as (served, clock):
        client = served.openai.with_options(api_key=MINE)
        served.run(served.state.keys.accounts["mine"]._bucket("requests_per_minute").take, 60)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="tiny", prompt="a", max_tokens=1)
        assert caught.value.code == "rate_limit_exceeded"
        answers: list[tuple[int, float]] = []

        def heard(response: httpx.Response) -> None:
            answers.append((response.status_code, time.monotonic()))
            clock.now += 60

        http = httpx.Client(trust_env=False, event_hooks={"response": [heard]})
        client.with_options(max_retries=1, http_client=http).completions.create(model="tiny", prompt="a", max_tokens=1)
        (_, refused), (_, answered) = answers
        assert [status for status, _ in answers] == [429, 200] and 0.9 < answered - refused < 10  # Retry-After was 1


def test_a_wall_clock_that_jumps_changes_nothing(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with start("requests_per_minute = 6, tokens_per_day = 50") as (served, _):
        served.state.keys.accounts.clear()  # the real clock
        real = time.time
        for jump in (0.0, -1e9, 1e9, 0.0, -3600.0, 3600.0):
            monkeypatch.setattr(time, "time", lambda jump=jump: real() + jump)
            assert ask(served).status_code == 200
        assert ask(served).status_code == 429
        monkeypatch.undo()


def test_limits_that_change_while_the_server_runs(start: Any, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    with start("requests_per_minute = 2, concurrency = 1") as (served, _):
        assert [ask(served).status_code for _ in range(3)] == [200, 200, 429]
        file.write_text(file.read_text().replace("concurrency = 1", "concurrency = 9"))
        assert ask(served).status_code == 429  # no fresh minute by another limit
        file.write_text(file.read_text().replace("minute = 2", "minute = 5"))
        assert [ask(served).status_code for _ in range(6)] == [200] * 5 + [429]


def test_the_queue_has_an_end(start: Any) -> None:
    with start(max_num_queued_reqs=2) as (served, _):
        gate = served.client._wait

        async def never() -> None:
            served.client._dead.clear()
            await served.client._dead.wait()

        served.client._wait = never
        body, place = json.dumps(LONG).encode(), ("127.0.0.1", httpx.URL(served.url).port or 0)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {MINE}\r\nContent-Length: {len(body)}\r\n\r\n"
        with ExitStack() as waiting:
            for number in (1, 2):
                waiting.enter_context(socket.create_connection(place)).sendall(head.encode() + body)
                eventually(lambda number=number: len(served.state.jobs) == number)
        eventually(lambda: not served.state.jobs)  # they gave up: their places are free again
        threads = [_ask_in_thread(served) for _ in range(2)]
        eventually(lambda: len(served.state.jobs) == 2)
        for stream in (False, True):
            response = ask(served, THEIRS, stream=stream)
            error = response.json()["error"]
            assert response.status_code == 503 and (error["code"], error["type"]) == ("server_overloaded", "server_error")
            assert (
                "2 requests wait already, and --max-num-queued-reqs is 2" in error["message"] and response.headers["retry-after"]
            )
        with served.http as http:
            assert http.get("/health").status_code == 200  # busy is not ill
            assert (
                'http_errors_total{code="server_overloaded",status="503"} 2.0' in http.get("/metrics", headers=bearer(MINE)).text
            )
        served.client._wait = gate
        served.run(served.client._dead.set)
        for thread in threads:
            thread.join(10)


def _ask_in_thread(served: Served) -> Any:
    import threading

    thread = threading.Thread(target=lambda: ask(served), daemon=True)
    thread.start()
    return thread


def test_those_that_answer_do_not_wait(start: Any) -> None:
    with start(max_num_queued_reqs=1, delay_s=0.02) as (served, _), served.http as http:
        with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}, headers=bearer(MINE)) as response:
            lines = response.iter_lines()
            next(lines)
            assert [ask(served).status_code for _ in range(3)] == [200] * 3


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 150)), max_size=40), st.integers(1, 100))
def test_a_bucket_gives_out_no_more_than_flows_in(steps: list[tuple[float, int]], size: int) -> None:
    clock = Clock()
    bucket = Bucket(size, clock)
    begun, taken = clock.now, 0
    for wait, units in steps:
        clock.now += wait
        if units > size:
            bucket.take(units)  # known late
            taken += units
        elif (delay := bucket.wait_s(units)) == 0:
            bucket.take(units)
            taken += units
        else:
            clock.now += delay
            assert bucket.wait_s(units) < 1e-6  # the time that is told is enough, and a little less is not
    assert bucket.level <= size
    late = sum(units for _, units in steps if units > size)
    assert taken - late <= size + (clock.now - begun) * size / 60 + 1e-6


def test_an_account_refuses_without_charge() -> None:
    clock = Clock()
    account = Account(Limits(1, 10, 100, 1), clock)
    with account.request():
        with pytest.raises(RateLimited, match="at work"), account.request():
            raise AssertionError("it was let in")
        account.prompt(10)
        with pytest.raises(RateLimited, match="tokens per minute"):
            account.prompt(1)
    assert account.running == 0 and account._used == 10
    with pytest.raises(RateLimited, match="1 requests per minute"), account.request():
        raise AssertionError("it was let in")
    clock.now += 60
    with account.request():
        account.prompt(10)


@given(st.lists(st.tuples(st.floats(0, 3 * DAY_S), st.integers(1, 100), st.integers(0, 1000)), max_size=40))
def test_a_day_that_owes_is_paid_for_by_the_next(steps: list[tuple[float, int, int]]) -> None:
    """However long answers are, what was let in stays below the quota of all days begun, but for the last answer."""
    clock = Clock()
    account, begun, used = Account(Limits(tokens_per_day=100), clock), clock.now, 0
    for wait, prompt, answer in steps:
        clock.now += wait
        try:
            account.prompt(prompt)
        except RateLimited as refused:
            clock.now += refused.retry_after - 1.0
            with pytest.raises(RateLimited):
                account.prompt(prompt)
            clock.now += 1.0 + 1e-3
            account.prompt(prompt)  # what was told is enough, and a little less is not
        assert used + prompt <= 100 * (1 + (clock.now - begun) // DAY_S)
        account.tokens(answer)
        used += prompt + answer


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (0.0804, "80ms"),
        (59.99999, "1m0s"),
        (1, "1s"),
        (1.41, "1.5s"),
        (59.99, "60s"),
        (360, "6m0s"),
        (3661.5, "1h1m2s"),
    ],
)
def test_times_as_openai_writes_them(seconds: float, text: str) -> None:
    assert _time(seconds) == text
