"""What the users of a soak do: they ask in every form, vanish, read slowly, send rubbish; what must be right is checked."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import httpx

TEXTS = (
    "The capital of France is",
    "Once upon a time there was a miller who",
    "def fibonacci(n):",
    "1, 2, 3, 4, 5,",
    "Dear Sir or Madam,",
    "Bystanders ask the same again and again:",
)
COMMON = "You know the following. " + "A long beginning that many requests share is computed once. " * 5
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}}
BAD: tuple[tuple[str, bytes], ...] = (
    ("/v1/completions", b"{"),
    ("/v1/completions", b'{"prompt": ' + b"[" * 50_000),
    ("/v1/completions", b'{"prompt": "\\ud800"}'),
    ("/v1/completions", b'{"prompt": "a", "max_tokens": ' + b"9" * 400 + b"}"),
    ("/v1/completions", b'{"prompt": "a", "n": 1000000000}'),
    ("/v1/completions", b'{"prompt": "' + b"a b " * 100_000 + b'"}'),
    ("/v1/completions", b'{"prompt": "a", "guided_regex": "("}'),
    ("/v1/chat/completions", b'{"messages": [{"role": "user"}]}'),
    ("/v1/messages", b'{"max_tokens": 0}'),
    ("/nowhere", b"{}"),
)


class Wrong(Exception):
    """An answer that should have been another one."""


class Users:
    """All of them, over one server. ``counts``: what was done, how often."""

    def __init__(self, url: str, keys: dict[str, str], seed: int) -> None:
        self.url, self.keys, self.rng = url, keys, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.known: dict[str, Any] = {}  # greedy answers of the quiet server
        self.http = self._client(keys["free"])
        self.limited = self._client(keys["limited"])
        self.kinds: dict[str, tuple[int, Callable[[], Awaitable[None]]]] = {
            "completion": (6, self.completion),
            "stream": (6, self.stream),
            "chat": (4, self.chat),
            "messages": (2, self.messages),
            "responses": (2, self.responses),
            "prefix": (4, self.prefix),
            "sampled": (3, self.sampled),
            "beams": (1, self.beams),
            "structured": (3, self.structured),
            "tools": (2, self.tools),
            "vanish": (6, self.vanish),
            "half-close": (1, self.half_close),
            "slow reader": (1, self.slow_reader),
            "abort": (2, self.abort),
            "bad": (4, self.bad),
            "no key": (1, self.no_key),
            "limited key": (2, self.limited_key),
            "reads": (4, self.reads),
        }

    def _client(self, key: str) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=200, max_keepalive_connections=50)
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.AsyncClient(base_url=self.url, timeout=120, limits=limits, headers=headers, trust_env=False)

    async def learn(self) -> None:
        """What a quiet server answers, one after another; twice, so that it is known to answer the same."""
        for _ in range(2):
            for work in (self.completion, self.stream, self.chat, self.messages, self.responses, self.prefix):
                for k in range(len(TEXTS)):
                    await work(k)

    async def one(self) -> None:
        """Any of them."""
        (name,) = self.rng.choices([*self.kinds], [weight for weight, _ in self.kinds.values()])
        try:
            await self.kinds[name][1]()
            self.counts[name] += 1
        except Wrong as error:
            self.wrong.append(f"{name}: {error}")
        except (httpx.HTTPError, OSError, ValueError, KeyError, IndexError) as error:
            self.wrong.append(f"{name}: {type(error).__name__}: {error}")

    async def post(self, path: str, body: dict[str, Any], http: httpx.AsyncClient | None = None) -> Any:
        response = await (http or self.http).post(path, json=body)
        if response.status_code != 200:
            raise Wrong(f"{response.status_code} {response.text[:200]}")
        return response.json()

    def same(self, name: str, answer: Any) -> None:
        if self.known.setdefault(name, answer) != answer:
            raise Wrong(f"{name}: {answer!r:.200} instead of {self.known[name]!r:.200}")

    def pick(self, k: int | None) -> int:
        return self.rng.randrange(len(TEXTS)) if k is None else k

    async def completion(self, k: int | None = None) -> None:
        k = self.pick(k)
        found = await self.post("/v1/completions", {"prompt": TEXTS[k], "max_tokens": 24, "temperature": 0, "ignore_eos": True})
        self.same(f"text {k}", found["choices"][0]["text"])

    async def stream(self, k: int | None = None) -> None:
        k = self.pick(k)
        body = {"prompt": TEXTS[k], "max_tokens": 24, "temperature": 0, "ignore_eos": True, "stream": True}
        text = ""
        async with self.http.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
        self.same(f"text {k}", text)

    async def chat(self, k: int | None = None) -> None:
        k = self.pick(k)
        messages = [{"role": "user", "content": TEXTS[k]}]
        found = await self.post("/v1/chat/completions", {"messages": messages, "max_tokens": 16, "temperature": 0})
        self.same(f"chat {k}", found["choices"][0]["message"]["content"])

    async def messages(self, k: int | None = None) -> None:
        k = self.pick(k)
        body = {"model": "demo", "messages": [{"role": "user", "content": TEXTS[k]}], "max_tokens": 16, "temperature": 0}
        found = await self.post("/v1/messages", body)
        self.same(f"chat {k}", "".join(part["text"] for part in found["content"]))

    async def responses(self, k: int | None = None) -> None:
        k = self.pick(k)
        found = await self.post("/v1/responses", {"input": TEXTS[k], "max_output_tokens": 16, "temperature": 0})
        self.same(f"chat {k}", "".join(part["text"] for item in found["output"] for part in item["content"]))

    async def prefix(self, k: int | None = None) -> None:
        k = self.pick(k)
        found = await self.post("/v1/completions", {"prompt": COMMON + TEXTS[k], "max_tokens": 8, "temperature": 0})
        self.same(f"prefix {k}", found["choices"][0]["text"])

    async def sampled(self) -> None:
        n = self.rng.choice((1, 3, 8))
        body = {"prompt": TEXTS[0], "n": n, "max_tokens": self.rng.choice((8, 64, 200)), "temperature": 0.8, "logprobs": 3}
        if len((await self.post("/v1/completions", body))["choices"]) != n:
            raise Wrong(f"not {n} choices")

    async def beams(self) -> None:
        body = {"prompt": TEXTS[self.pick(None)], "n": 4, "use_beam_search": True, "max_tokens": 12}
        if len((await self.post("/v1/completions", body))["choices"]) != 4:
            raise Wrong("not 4 beams")

    async def structured(self) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
        messages = [{"role": "user", "content": TEXTS[self.pick(None)]}]
        body = {"messages": messages, "max_tokens": 80, "response_format": form}
        choice = (await self.post("/v1/chat/completions", body))["choices"][0]
        if choice["finish_reason"] == "stop" and set(json.loads(choice["message"]["content"])) != {"name", "age"}:
            raise Wrong(choice["message"]["content"])
        bound = self.rng.randrange(1, 1000)  # grammars that nobody has sent before
        found = await self.post("/v1/completions", {"prompt": "a", "max_tokens": 8, "guided_regex": f"x{{1,3}}y{bound}"})
        if not re.fullmatch(f"x{{1,3}}(y{bound})?|x{{1,3}}y\\d*", found["choices"][0]["text"]):
            raise Wrong(found["choices"][0]["text"])

    async def tools(self) -> None:
        messages = [{"role": "user", "content": "Look somebody up."}]
        body = {"messages": messages, "max_tokens": 120, "tools": [TOOL], "tool_choice": "required"}
        choice = (await self.post("/v1/chat/completions", body))["choices"][0]
        calls = choice["message"].get("tool_calls") or []
        if choice["finish_reason"] == "tool_calls" and not all("age" in json.loads(c["function"]["arguments"]) for c in calls):
            raise Wrong(str(calls)[:200])

    async def _raw(self, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        place = urlsplit(self.url)
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        raw = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {self.keys['free']}\r\n"
        writer.write(f"{head}connection: close\r\ncontent-length: {len(raw)}\r\n\r\n".encode() + raw)
        return reader, writer

    async def vanish(self) -> None:
        """Before the request is whole, before the first token, or between two pieces of the answer."""
        body = {"prompt": COMMON, "max_tokens": 300, "ignore_eos": True, "stream": self.rng.random() < 0.7}
        reader, writer = await self._raw(body)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.rng.choice((0.0, 0.01, 0.1, 1.0))):
                while await reader.read(2000):
                    pass
        writer.transport.abort() if self.rng.random() < 0.5 else writer.close()

    async def half_close(self) -> None:
        reader, writer = await self._raw({"prompt": TEXTS[0], "max_tokens": 24, "temperature": 0, "ignore_eos": True})
        writer.write_eof()
        answer = await asyncio.wait_for(reader.read(), 60)
        writer.close()
        self.same("text 0", json.loads(answer.rpartition(b"\r\n\r\n")[2])["choices"][0]["text"])

    async def slow_reader(self) -> None:
        reader, writer = await self._raw({"prompt": "a", "max_tokens": 100, "ignore_eos": True, "stream": True, "logprobs": 5})
        for _ in range(5):
            await asyncio.sleep(1)
            await reader.read(100)
        writer.close()

    async def abort(self) -> None:
        name = f"soak-{self.rng.randrange(10**12)}"
        body = {"prompt": TEXTS[1], "max_tokens": 400, "ignore_eos": True}
        task = asyncio.create_task(self.http.post("/v1/completions", json=body, headers={"X-Request-Id": name}))
        await asyncio.sleep(0.2)
        gone = await self.http.delete(f"/v1/requests/{name}")
        response = await task
        if gone.status_code == 200 and response.json()["choices"][0]["finish_reason"] not in ("abort", "length"):
            raise Wrong(response.text[:200])

    async def bad(self) -> None:
        path, raw = self.rng.choice(BAD)
        response = await self.http.post(path, content=raw)
        if not 400 <= response.status_code < 500 or not response.json()["error"]["message"]:
            raise Wrong(f"{path} {raw[:40]!r}: {response.status_code} {response.text[:200]}")

    async def no_key(self) -> None:
        response = await self.http.post("/v1/completions", json={"prompt": "a"}, headers={"Authorization": "Bearer sk-wrong"})
        if response.status_code != 401:
            raise Wrong(str(response.status_code))

    async def limited_key(self) -> None:
        response = await self.limited.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
        if response.status_code != 200 and not (response.status_code == 429 and int(response.headers["Retry-After"]) >= 1):
            raise Wrong(f"{response.status_code} {response.text[:200]}")
        self.counts[f"limited key: {response.status_code}"] += 1

    async def reads(self) -> None:
        for path in ("/health", "/stats", "/metrics", "/v1/models"):
            if (response := await self.http.get(path)).status_code != 200:
                raise Wrong(f"{path}: {response.status_code}")
