"""The short way from the engine's news to the socket tells what the long one tells, and only of what is ordinary."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import httpx
import pytest

from appliance.core.messages import Event
from appliance.server import http, respond
from appliance.server.shortcut import Shortcut
from appliance.text.output import Delta
from tests.server.conftest import Served
from tests.server.test_stream_writes import TEXT, answer, connect, request, texts

SAY = [{"role": "user", "content": "the quick brown fox jumps"}]
LOOK = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
USAGE = {"include_usage": True, "continuous_usage_stats": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "completions": ("/v1/completions", {"prompt": TEXT}),
    "a stop string": ("/v1/completions", {"prompt": TEXT, "stop": ["lazy d"]}),
    "a stop string that is kept": ("/v1/completions", {"prompt": TEXT, "stop": ["lazy d"], "include_stop_str_in_output": True}),
    "echo": ("/v1/completions", {"prompt": TEXT, "echo": True}),
    "no tokens": ("/v1/completions", {"prompt": TEXT, "echo": True, "max_tokens": 0}),
    "usage": ("/v1/completions", {"prompt": TEXT, "stream_options": USAGE}),
    "ids": ("/v1/completions", {"prompt": TEXT, "return_token_ids": True}),
    "log-probabilities": ("/v1/completions", {"prompt": TEXT, "logprobs": 3}),
    "several": ("/v1/completions", {"prompt": TEXT, "n": 3}),
    "chat": ("/v1/chat/completions", {"messages": SAY}),
    "chat, usage": ("/v1/chat/completions", {"messages": SAY, "stream_options": USAGE}),
    "chat, ids": ("/v1/chat/completions", {"messages": SAY, "return_token_ids": True}),
    "chat, log-probabilities": ("/v1/chat/completions", {"messages": SAY, "logprobs": True, "top_logprobs": 2}),
}
SHORT = {"completions", "a stop string", "a stop string that is kept", "echo", "usage", "ids", "chat", "chat, usage", "chat, ids"}


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Delta]]:
    """What went the short way."""
    deltas: list[Delta] = []
    send = Shortcut.send
    monkeypatch.setattr(Shortcut, "send", lambda self, delta: (deltas.append(delta), send(self, delta))[1])
    yield deltas


def stream(served: Served, path: str, body: dict[str, Any]) -> str:
    body = {"model": "tiny", "max_tokens": 60, "ignore_eos": True, "stream": True, **body}
    found = httpx.post(served.url + path, json=body, headers={"X-Request-Id": "same"}, timeout=30)
    return re.sub(r'"created":\d+', '"created":0', found.text)


@pytest.mark.parametrize("case", CASES)
def test_both_ways_send_the_same_bytes(served: Served, sent: list[Delta], monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    short = stream(served, *CASES[case])
    assert (len(sent) > 5) == (case in SHORT)
    monkeypatch.setattr(Shortcut, "takes", lambda self, event: False)
    taken = len(sent)
    assert stream(served, *CASES[case]) == short
    assert len(sent) == taken
    assert short.endswith("data: [DONE]\n\n")


def test_an_error_in_the_midst_is_told_behind_what_was_sent(served: Served, sent: list[Delta]) -> None:
    served.client.fail_at = 20
    try:
        found = stream(served, *CASES["completions"])
    finally:
        served.client.fail_at = None
    *chunks, error, _ = found.strip().split("\n\n")
    assert len(chunks) > 10 and len(sent) > 10
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_error"


def test_a_fault_of_one_answer_is_its_own(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is raised on the short way must not reach whoever hands out the news of all requests."""
    raised = []

    def fail(self: Shortcut, delta: Delta) -> None:
        raised.append(delta)
        raise ValueError("broken")

    expected = stream(served, *CASES["several"])
    monkeypatch.setattr(Shortcut, "send", fail)
    assert '"code":"internal_error"' in stream(served, *CASES["completions"])
    assert len(raised) == 1  # then it has ended, in the engine too
    assert stream(served, *CASES["several"]) == expected
    assert not served.client.running


def test_a_client_that_reads_late_gets_all_in_order(served: Served, sent: list[Delta], monkeypatch: pytest.MonkeyPatch) -> None:
    """It changes between both ways while its answer goes on."""
    short, waited = http._write, []

    def noted(cycle: Any, data: bytes) -> bool:
        cycle.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        cycle.transport.set_write_buffer_limits(high=512)
        if not (written := short(cycle, data)):
            waited.append(data)
        return written

    monkeypatch.setattr(http, "_write", noted)
    plain = served.post("/v1/completions", model="tiny", prompt=TEXT, max_tokens=300, ignore_eos=True).json()
    with connect(served) as sock:
        sock.sendall(request(tokens=300))
        _, body = answer(sock, pause_s=0.3)
    assert "".join(texts(body)) == plain["choices"][0]["text"]
    assert waited and sent


def test_an_answer_that_may_end_with_its_call_goes_the_long_way(served: Served, sent: list[Delta]) -> None:
    more = {"tools": LOOK, "parallel_tool_calls": False}
    stream(served, "/v1/chat/completions", {"messages": SAY, **more})
    assert not sent


def test_what_is_out_of_the_ordinary_is_not_taken() -> None:
    way = Shortcut(lambda delta: None)
    assert not way.takes(Event("r", 0, (1,)))  # the answer has not begun
    way.write = lambda data: True
    assert way.takes(Event("r", 0, (1,)))
    assert not way.takes(Event("r", 0, (1,), finish_reason="length"))
    way.write = lambda data: False
    assert not way.takes(Event("r", 0, (1,)))


def test_silence_counts_from_the_latest_token(served: Served, sent: list[Delta], monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that goes the short way is no silent one, but where a busy machine makes it one."""
    monkeypatch.setattr(respond, "OPENAI", replace(respond.OPENAI, quiet_s=0.5))
    send, times = Shortcut.send, [time.monotonic()]
    monkeypatch.setattr(Shortcut, "send", lambda self, delta: (times.append(time.monotonic()), send(self, delta))[1])
    served.client.delay_s = 0.05
    try:
        found = stream(served, "/v1/completions", {"prompt": TEXT, "max_tokens": 24, "ignore_eos": True})
    finally:
        served.client.delay_s = 0.0
    times.append(time.monotonic())
    assert times[-1] - times[0] > 1.0 and len(sent) >= 8
    assert found.count(": ping") <= sum(after - before > 0.4 for before, after in pairwise(times))
