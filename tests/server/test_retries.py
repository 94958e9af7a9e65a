"""What OpenAI's client does by itself when it is told to come again, and what it makes of keys; over an engine that pretends."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from appliance.config import EngineConfig, ServerConfig
from appliance.server import errors
from appliance.text.tokenizer import Tokenizer
from tests.server.conftest import Served, serve_in_thread
from tests.server.fake import FakeClient, info

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


def hashed(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.fixture
def keyed(tokenizer: Tokenizer, model_dir: Path, tmp_path: Path) -> Iterator[Served]:
    """One key may have one request at work, another one a request a minute."""
    keys = tmp_path / "keys.toml"
    keys.write_text(
        f'one = {{ sha256 = "{hashed("one-at-a-time")}", concurrency = 1 }}\n'
        f'few = {{ sha256 = "{hashed("one-a-minute")}", requests_per_minute = 1 }}\n'
        f'old = {{ sha256 = "{hashed("expired")}", expires = 2020-01-01 }}\n'
    )
    server = ServerConfig(served_model_name=("tiny",), api_key_file=str(keys))
    with serve_in_thread(lambda: FakeClient(delay_s=0.03), tokenizer, EngineConfig(model=str(model_dir)), server) as one:
        yield one


def client_of(served: Served, key: str, retries: int, heard: Callable[[int], object] = id) -> OpenAI:
    """``heard`` is called with the status of every answer, before the client acts on it."""
    http = httpx.Client(trust_env=False, event_hooks={"response": [lambda response: heard(response.status_code)]})
    return OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=retries, timeout=20, http_client=http)


def test_it_comes_again_when_its_key_is_busy(keyed: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """429 with Retry-After: 1; both get their answers, the second one later."""
    answers: list[int] = []
    client = client_of(keyed, "one-at-a-time", 3, answers.append)

    async def until_one_was_refused() -> None:
        while 429 not in answers:
            await asyncio.sleep(0.01)

    monkeypatch.setattr(keyed.client, "_wait", until_one_was_refused)

    def ask(text: str) -> str:
        return client.completions.create(model="tiny", prompt=text, max_tokens=len(text)).choices[0].text

    with ThreadPoolExecutor(2) as pool:
        begun = time.monotonic()
        assert [*pool.map(ask, ("hello", "world"))] == ["hell", "worl"]  # the prompt's first token is no text
    assert 429 in answers and answers.count(200) == 2 and time.monotonic() - begun > 0.9


def test_it_does_not_come_again_where_that_is_hopeless(keyed: Served) -> None:
    answers: list[int] = []
    client = client_of(keyed, "one-a-minute", 3, answers.append)
    assert client.completions.create(model="tiny", prompt="a", max_tokens=1).id
    client.api_key = "one-a-minute"
    begun = time.monotonic()
    with pytest.raises(openai.RateLimitError) as caught:
        client.with_options(max_retries=0).completions.create(model="tiny", prompt="a", max_tokens=1)
    assert caught.value.code == "rate_limit_exceeded" and caught.value.type == "rate_limit_error"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60 and time.monotonic() - begun < 30
    assert answers == [200, 429]


@pytest.mark.parametrize("key", ["wrong", "expired", "none"])
def test_keys(keyed: Served, key: str) -> None:
    answers: list[int] = []
    with pytest.raises(openai.AuthenticationError) as caught:
        client_of(keyed, key, 3, answers.append).chat.completions.create(model="tiny", messages=HELLO)
    assert caught.value.code == "invalid_api_key" and answers == [401]  # never a second time


def test_it_comes_again_while_the_model_is_loading(
    tokenizer: Tokenizer,
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(errors.RETRY_AFTER_S, 503, 1)
    answers: list[int] = []
    engine = EngineConfig(model=str(model_dir))
    with serve_in_thread(lambda: FakeClient(state="loading"), tokenizer, engine, ServerConfig()) as one:

        def heard(status: int) -> None:
            answers.append(status)
            one.client.state, one.client.info = "ready", info()

        answer = client_of(one, "none", 2, heard).chat.completions.create(model="", messages=HELLO, max_tokens=5)
        assert answer.choices[0].message.content == "user" and answers == [503, 200]
        one.client.state = "loading"
        with pytest.raises(openai.InternalServerError) as caught:
            client_of(one, "none", 0).chat.completions.create(model="", messages=HELLO)
        assert caught.value.status_code == 503 and caught.value.code == "model_loading"


def test_the_end_of_the_queue(tokenizer: Tokenizer, model_dir: Path) -> None:
    server = ServerConfig(max_num_queued_reqs=0)
    with serve_in_thread(FakeClient, tokenizer, EngineConfig(model=str(model_dir)), server) as one:
        with pytest.raises(openai.InternalServerError) as caught:
            client_of(one, "none", 0).completions.create(model="", prompt="a")
        assert caught.value.code == "server_overloaded" and caught.value.response.headers["retry-after"]
