"""Bodies that are meant to be too much: refused in time and memory that do not depend on them, while others are answered."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from appliance.config import EngineConfig, ServerConfig
from appliance.core.messages import TokenLogprob
from appliance.core.params import RequestError, StructuredOutputsParams
from appliance.core.scores import PromptLogprobs
from appliance.server import beside
from appliance.server.beside import MAX_VALUES, Share, check_values, weight
from appliance.text.grammar import compile_grammar
from appliance.text.tokenizer import Tokenizer
from appliance.text.tools.choice import tool_choice
from tests.server.conftest import Served, serve_in_thread
from tests.server.fake import FakeClient
from tests.server.test_lifecycle import eventually

C, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
HELLO = [{"role": "user", "content": "Hi"}]
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "[" * 100_000}}

TOO_MUCH: dict[str, tuple[str, Any, str]] = {
    "deep lists": (C, b'{"prompt": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "recursion"),
    "deep objects": (C, b'{"a":' * 60_000, "recursion"),
    "deep arguments of a call": (CHAT, {"messages": [*HELLO, {"role": "assistant", "tool_calls": [CALL]}]}, "not JSON"),
    "long integers": (C, b'{"prompt": "a", "max_tokens": ' + b"9" * 400 + b"}", "max_tokens"),
    "longer integers": (C, b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", ""),
    "endless numbers": (C, b'{"prompt": "a", "temperature": 1e400}', "temperature"),
    "no numbers": (C, b'{"prompt": "a", "temperature": NaN}', "temperature"),
    "long token ids": (C, b'{"prompt": [' + b"9" * 400 + b"]}", "token id"),
    "half a pair": (C, b'{"prompt": "\\ud800"}', "JSON"),
    "half a pair as a name": (C, b'{"prompt": "a", "\\udc00": 1}', "JSON"),
    "bytes that are no UTF-8": (C, b'{"prompt": "\xff\xfe"}', "JSON"),
    "UTF-16": (C, '{"prompt": "a"}'.encode("utf-16"), "JSON"),
    "100,000 prompts": (C, {"prompt": ["a"] * 100_000}, "at most 1024"),
    "100,000 prompts of ids": (C, {"prompt": [[1]] * 100_000}, "at most 1024"),
    "a billion answers": (C, {"prompt": "a", "n": 10**9}, "at most 1024"),
    "a billion beams": (C, {"prompt": "a", "n": 10**9, "use_beam_search": True}, "at most 256"),
    "2000 answers": (C, {"prompt": "a", "n": 2000}, "at most 1024"),
    "prompts times answers": (C, {"prompt": ["a"] * 100, "n": 11}, "100 prompts with 11 completions each"),
    "the best of 2000": (C, {"prompt": "a", "best_of": 2000}, "at most 1024"),
    "10,000 stop texts": (C, {"prompt": "a", "stop": [f"stop {i}" for i in range(10_000)]}, "at most 1024"),
    "a long stop text": (C, {"prompt": "a", "stop": "x" * 1_000_000}, "of 32768 characters"),
    "10,000 bad words": (C, {"prompt": "a", "bad_words": [f"bad {i}" for i in range(10_000)]}, "at most 1024"),
    "100,000 biases": (C, {"prompt": "a", "logit_bias": {str(i): 1 for i in range(100_000)}}, "logit_bias"),
    "600,000 stop ids": (C, {"prompt": "a", "stop_token_ids": [1] * 600_000}, "more than any vocabulary"),
    "a long text": (C, {"prompt": "ab" * 1_500_000}, "at least"),
    "a long text to cut": (C, {"prompt": "ab" * 1_500_000, "truncate_prompt_tokens": 9}, "3000000 characters"),
    "a long text to count": ("/tokenize", {"prompt": "ab" * 1_500_000}, "3000000 characters"),
    "a long text to spell": ("/tokenize", {"prompt": "ab" * 200_000, "return_token_strs": True}, "400000 characters"),
    "50,000 messages": (CHAT, {"messages": HELLO * 50_000}, "at least"),
    "10,000 items": ("/v1/responses", {"input": HELLO * 10_000}, "at most 8192"),
    "a long text of which only the size is asked": (
        "/v1/messages/count_tokens",
        {"model": "tiny", "messages": [{"role": "user", "content": "ab" * 1_500_000}]},
        "at most 2097152",
    ),
    "templates": (CHAT, {"messages": HELLO, "chat_template": "{% for i in range(9999999999) %}a{% endfor %}"}, "not taken"),
    "what templates are given": (CHAT, {"messages": HELLO, "chat_template_kwargs": {"messages": []}}, "may not hold"),
    "a schema of the world": (C, {"prompt": "a", "guided_json": {"enum": ["x" * 70_000]}}, "at most 65536"),
    "files": (C, {"prompt": "a", "guided_json": {"$ref": "file:///etc/passwd"}}, "cannot be served"),
    "addresses": (C, {"prompt": "a", "guided_json": {"$ref": "http://127.0.0.1:9/x"}}, "cannot be served"),
    "no end": (C, {"prompt": "a", "guided_json": {"$ref": "#"}}, "cannot be served"),
}


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "served" in request.fixturenames:
        served = request.getfixturevalue("served")
        answer = served.post(C, prompt=[5, 6], max_tokens=3, return_token_ids=True).json()
        assert answer["choices"][0]["token_ids"] == [5, 6, 5]
        eventually(lambda: not served.state.jobs and not served.client.running and not Share.held)


@pytest.mark.parametrize("name", TOO_MUCH)
def test_it_is_refused_with_a_word(served: Served, name: str) -> None:
    path, body, words = TOO_MUCH[name]
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with served.http as http:
        answer = http.post(path, content=raw)
    assert answer.status_code == 400, answer.text[:500]
    assert words in answer.json()["error"]["message"] and len(answer.text) < 2000


@pytest.mark.parametrize(
    "raw", [b"[1," * 600_000, b"{},[]," * 300_000, b'{"a":' * 100_000, b'{"prompt": [' + b"1," * (MAX_VALUES + 1) + b"1]}"]
)
def test_more_values_than_are_read(served: Served, raw: bytes) -> None:
    with served.http as http:
        answer = http.post(C, content=raw)
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"


def test_more_messages_than_are_read(served: Served) -> None:
    answer = served.post(CHAT, messages=HELLO * 100_000)
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ["ab"] * 500, "max_tokens": 1},
        {"prompt": "ab", "max_tokens": 1, "n": 500, "temperature": 1},
        {"prompt": "ab", "stop": [f"stop {i}" for i in range(1000)], "max_tokens": 1},
        {"prompt": "ab", "metadata": {"x": "y" * 3_000_000}, "max_tokens": 1},
        {"prompt": "a" * 300_000, "truncate_prompt_tokens": 9, "max_tokens": 1},
        {"prompt": "ab", "max_tokens": 1, "user": "\0" * 1000},
    ],
)
def test_what_is_much_and_not_too_much(served: Served, body: dict[str, Any]) -> None:
    assert served.post(C, **body).status_code == 200


@pytest.fixture(scope="module")
def long(tokenizer: Tokenizer, model_dir: Path) -> Iterator[Served]:
    """A server of long prompts, with scores that are there."""

    def make() -> FakeClient:
        client = FakeClient(max_model_len=40_000)
        top = tuple((token, -0.1 * token) for token in range(20))
        client.prompt_scores = PromptLogprobs.of([None, *[TokenLogprob(5, -0.5, 1, top)] * 29_999])
        return client

    engine = EngineConfig(model=str(model_dir))
    with serve_in_thread(make, tokenizer, engine, ServerConfig(served_model_name=("tiny",))) as one:
        yield one


@pytest.mark.parametrize(
    ("path", "more"),
    [
        (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 20}),
        (C, {"prompt": "ab", "logprobs": 20}),
        (C, {"prompt": "ab", "logprobs": 20, "stream": True}),
        (C, {"prompt": ["abc" * 160] * 16, "logprobs": 20, "prompt_logprobs": 20, "echo": True, "max_tokens": 1, "n": 1}),
    ],
)
def test_large_answers_let_others_run(served: Served, path: str, more: dict[str, Any]) -> None:
    """The longest turn of the event loop, in processor time: others wait for it."""
    body = {"n": 250, "max_tokens": 12, "temperature": 1, "ignore_eos": True, **more}
    answer = served.answer_in_turns(lambda: served.post(path, **body))
    assert answer.status_code == 200, answer.text[:500]
    if "stream" not in more:
        scored = [choice["logprobs"] for choice in answer.json()["choices"]]
        assert len(scored) == (16 if "n" in more else 250)
        assert all(len(one["content"]) == 12 if path == CHAT else len(one["top_logprobs"]) >= 12 for one in scored)


@pytest.mark.parametrize(
    ("path", "more"),
    [
        (C, {"prompt": [5, 6] * 15_000, "prompt_logprobs": 20}),
        (C, {"prompt": [5, 6] * 15_000, "logprobs": 20, "echo": True}),
        (C, {"prompt": [5, 6] * 15_000, "logprobs": 20, "echo": True, "stream": True}),
        (CHAT, {"messages": [{"role": "user", "content": "ab " * 7_000}], "prompt_logprobs": 20}),
    ],
)
def test_the_scores_of_a_long_prompt_let_others_run(long: Served, path: str, more: dict[str, Any]) -> None:
    answer = long.answer_in_turns(lambda: long.post(path, max_tokens=1, **more))
    assert answer.status_code == 200, answer.text[:500]
    assert len(answer.content) > 5_000_000


def test_long_conversations_let_others_run(served: Served) -> None:
    """Many texts of the system become one, and what is gone on with is read, without that others wait."""
    many = [{"role": "system", "content": "s" * 1900}] * 8000
    answer = served.answer_in_turns(lambda: served.post(RESPONSES, input=many))
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
    said = [{"role": ("user", "assistant")[i % 2], "content": "a"} for i in range(8001)]
    body = {"truncation": "auto", "max_output_tokens": 2}
    kept = served.post(RESPONSES, input=said, **body).json()["id"]
    answer = served.answer_in_turns(lambda: served.post(RESPONSES, input="on", previous_response_id=kept, **body))
    assert answer.status_code == 200, answer.text[:500]


def test_large_bodies_share_what_there_is(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as fit are read at once; the others hear of it, and small ones are answered all the time."""
    monkeypatch.setattr(beside, "BUDGET", 5_000_000)
    large = json.dumps({"prompt": "ab", "max_tokens": 1, "user": "x" * 2_000_000}).encode()

    async def all_at_once() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=served.url, timeout=30, trust_env=False) as http:
            small = [http.post(C, json={"prompt": "ab", "max_tokens": 1}) for _ in range(4)]
            return await asyncio.gather(*(http.post(C, content=large) for _ in range(6)), *small)

    *answers, a, b, c, d = asyncio.run(all_at_once())
    assert {one.status_code for one in (a, b, c, d)} == {200}
    assert {one.status_code for one in answers} <= {200, 503} and 200 in {one.status_code for one in answers}
    assert all(one.headers["retry-after"] for one in answers if one.status_code == 503)
    eventually(lambda: not Share.held)
    with served.http as http:
        assert http.post(C, content=large).status_code == 200


def test_a_body_that_breaks_off_holds_nothing(served: Served) -> None:
    def half() -> Iterator[bytes]:
        yield b'{"prompt": "' + b"a" * 2_000_000
        eventually(lambda: Share.held >= 2_000_000)
        raise ConnectionError

    with served.http as http, pytest.raises(ConnectionError):
        http.post(C, content=half())
    eventually(lambda: not Share.held)


def test_more_tools_than_are_taken() -> None:
    with pytest.raises(RequestError, match="at most 1024"):
        tool_choice([{"type": "function", "function": {"name": f"f{k}"}} for k in range(1025)], None)


def test_weights() -> None:
    assert weight(b'{"a": [1, 2]}') == 2 * 13 + 40 * (1 + 4 + 16)
    assert weight('{"a": "ä"}'.encode()) == 5 * 11 + 640 and weight(b'{"a": "\\u00e4"}') == 5 * 15 + 640
    assert check_values(rb'{"a": "{\"b\": {\n1}, {2}"}') == 1 + 2 * 16, "an object, and one brace that could be one"
    with pytest.raises(RequestError, match="values"):
        check_values(b"," * (MAX_VALUES + 1))


def _counted(value: Any, ascii_alone: bool) -> int:
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):  # as an upper bound, by its characters as they are escaped
        text = json.dumps(value, ensure_ascii=ascii_alone)
        return text.count(",") + 4 * text.count("[") + 16 * (text.count("{") - text.count("{\\"))
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else None
    if inner is None:
        return 0
    return (16 if isinstance(value, dict) else 4) + max(0, len(inner) - 1) + sum(_counted(one, ascii_alone) for one in inner)


def _any_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(6 if depth < 4 else 3)
    if kind < 2:
        return "".join(rng.choices(['"', "\\", "{", "[", ",", "a", "\n", " ", "é", '"}'], k=rng.randrange(9)))
    if kind == 2:
        return rng.random()
    inner = [_any_value(rng, depth + 1) for _ in range(rng.randrange(5))]
    return inner if kind == 3 else {f'{i}"{{\\': one for i, one in enumerate(inner)}


@pytest.mark.parametrize("part", [2, 3, 64, 64 * 1024])
def test_values_outside_texts_are_counted(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "ROUGH", -1)
    monkeypatch.setattr(beside, "PART", part)
    rng = random.Random(part)
    for _ in range(500):
        value, ascii_alone = _any_value(rng), rng.random() < 0.5
        found, exact = check_values(raw := json.dumps(value, ensure_ascii=ascii_alone).encode()), _counted(value, ascii_alone)
        assert found == exact or (part < len(raw) and exact < found <= exact + 16 * len(raw) // part), "a brace where a part ends"
        check_values(bytes(rng.choices(b'"\\{[,a', k=rng.randrange(30))))  # comes to an end


def test_code_is_no_structure() -> None:
    """A megabyte of it weighs no more than its bytes. So much structure is refused, also in a text, as arguments are."""
    raw = json.dumps({"model": "m", "prompt": ".a{b:c}" * 150_000}).encode()
    assert check_values(raw) == 17 and weight(raw) == 2 * len(raw) + 40 * 17
    rows = json.dumps([{"a": [i, {}]} for i in range(60_000)])
    for text in (rows, " \n" + rows):
        arguments: Any = {"messages": [{"tool_calls": [{"function": {"arguments": text}}]}]}
        for much in (text, json.dumps(text), json.dumps(text).replace("[", "\\u005b", 1), json.dumps(arguments)):
            with pytest.raises(RequestError, match="values"):
                check_values(much.encode())
    assert check_values(b'{"a": "a' + b"{" * 2**20 + b'"}') == 16


def test_tokenizing_lets_others_run(tokenizer: Tokenizer) -> None:
    """Else a long prompt would stop every stream of the server. In one of three times: what a busy host takes is a gap too."""
    found = []
    for _ in range(3):
        found.append(_longest_gap(lambda: tokenizer.encode("who are you? " * 150_000)))
        if found[-1] < 0.6:
            return
    pytest.fail(f"parts of the time in which nobody else ran: {found}")


def _longest_gap(work: Callable[[], object]) -> float:
    """In which another thread cannot run while this one works, as part of all the time that it works."""
    gaps, done = [0.0], threading.Event()

    def watch() -> None:
        last = time.perf_counter()
        while not done.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.perf_counter()
    work()
    took = time.perf_counter() - begun
    done.set()
    watcher.join()
    return max(gaps) / took


def test_a_grammar_that_takes_too_long_ends_alone() -> None:
    begun = time.monotonic()
    with pytest.raises(RequestError, match="takes more than 2 s"):
        compile_grammar(StructuredOutputsParams(json={"type": "integer", "multipleOf": 99999999}))
    with pytest.raises(RequestError, match="takes more than 2 s"):  # known by now
        compile_grammar(StructuredOutputsParams(json={"type": "integer", "multipleOf": 99999999}))
    assert compile_grammar(StructuredOutputsParams(json={"type": "integer", "multipleOf": 7}))
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize("jump", [-86400.0, 86400.0, -1e9])
def test_a_clock_that_is_set_while_answers_are_made(slow: Served, monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    now, ahead = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: now() + ahead[0])
    begun = time.monotonic()
    with slow.http as http, http.stream("POST", C, json={"prompt": [5, 6], "max_tokens": 20, "stream": True}) as response:
        lines = [line for line in response.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
    with slow.http as http, http.stream("POST", C, json={"prompt": [5, 6], "max_tokens": 20, "stream": True}) as response:
        found = []
        for line in response.iter_lines():
            ahead[0] = jump
            found += [line] if line else []
        assert len(found) == len(lines) and found[-1] == "data: [DONE]"
        took = time.monotonic() - begun
        assert slow.post(C, prompt=[5, 6], max_tokens=2).status_code == 200
        sums = [line.split() for line in http.get("/metrics").text.splitlines() if "_seconds_sum" in line and line[0] != "#"]
        assert len(sums) > 8 and all(0 <= float(value) <= 3 * took for _, value in sums), sums
        stats = http.get("/stats").json()
        assert 0 < stats["uptime_s"] < 60 and stats["latency"]["ttft"]["p99_s"] < took and http.get("/health").status_code == 200
