"""Conversations that a chat template takes for ever to write: refused, or dropped when nobody waits. Others go on meanwhile."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from appliance.config import EngineConfig, ServerConfig
from appliance.server import parsers, prompts
from appliance.server.parsers import Parsers
from appliance.server.schemas import ChatRequest
from appliance.text import timelimit
from appliance.text.tokenizer import Tokenizer
from quant.errors import InputError
from tests.server.conftest import Served, serve_in_thread
from tests.server.fake import FakeClient
from tests.server.test_lifecycle import eventually

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
SOME = "{% if messages[0].content == 'long' %}" + ENDLESS + "{% endif %}{{ messages[0].content }}"
CHAT = "/v1/chat/completions"
LONG, SHORT = ({"messages": [{"role": "user", "content": one}], "max_tokens": 1} for one in ("long", "hello"))


@pytest.fixture
def served(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(prompts, "BRIEF_S", 0.02)
    tokenizer = Tokenizer.load(model_dir, SOME)
    with serve_in_thread(FakeClient, tokenizer, EngineConfig(model=str(model_dir)), ServerConfig()) as one:
        yield one


def sent(served: Served) -> socket.socket:
    """A client that waits."""
    client, body = socket.create_connection(("127.0.0.1", httpx.URL(served.url).port or 0)), json.dumps(LONG)
    client.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
    return client


def test_what_takes_too_long_is_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "RENDER_S", 0.05)
    for path, body in ((CHAT, LONG), ("/tokenize", {"messages": LONG["messages"]})):
        answer = served.post(path, **body)
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["param"] == "messages"
        assert error["message"] == (
            "the chat template cannot write this conversation: it takes more than 0.05 s of processor time; "
            "send fewer or shorter messages"
        )
    assert served.post(CHAT, **SHORT).status_code == 200


def test_what_nobody_waits_for_ends(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is short does not wait for what is long: of that only one is at work, and the threads for all are free."""
    monkeypatch.setattr(prompts, "RENDER_S", 1e9)
    clients = [sent(served) for _ in range(9)]
    eventually(lambda: [limit._seconds for limit in list(timelimit._watch._running)] == [1e9])
    assert served.post(CHAT, **SHORT).status_code == 200
    for one in clients:
        one.close()
    eventually(lambda: not timelimit._watch._running)


def test_a_server_ends_with_what_it_writes(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The requests of those who still wait are cancelled then; the event loop ends when the threads for all have."""
    monkeypatch.setattr(prompts, "BRIEF_S", 1e9)
    tokenizer, body = Tokenizer.load(model_dir, SOME), ChatRequest.model_validate(LONG)

    async def main() -> None:
        asking = asyncio.create_task(prompts.render(tokenizer, body, None))
        while not timelimit._watch._running:
            await asyncio.sleep(0.001)
        asking.cancel()

    asyncio.run(main())
    assert not timelimit._watch._running


@pytest.mark.parametrize(
    ("given", "name"), [(None, "the model's chat template"), (ENDLESS, "--chat-template"), ("f", "--chat-template f")]
)
def test_a_template_without_end_is_refused_at_start(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, name: str
) -> None:
    monkeypatch.setattr(parsers, "RENDER_S", 0.02)
    tokenizer = Tokenizer.load(model_dir, ENDLESS)
    for parser in ("auto", "hermes"):
        with pytest.raises(InputError, match=f"^{name}: it takes more than 0.02 s of processor time to write"):
            Parsers.of(tokenizer, ServerConfig(chat_template=given, tool_call_parser=parser))
