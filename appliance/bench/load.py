"""The load itself: requests begin when they should, whatever became of those before them, and nothing that happens is lost."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from appliance.bench.http import Broken, Target
from appliance.bench.outcome import Outcome, refused
from appliance.bench.samples import Sample
from appliance.config import BenchConfig
from quant.errors import InputError

TICK_S = 0.01  # how often the event loop is asked whether it is late
EMBEDDINGS = "openai-embeddings"
ENDPOINTS = {
    "openai": "/v1/completions",
    "vllm": "/v1/completions",
    "openai-chat": "/v1/chat/completions",
    EMBEDDINGS: "/v1/embeddings",
}
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")


@dataclass
class Run:
    """All that was seen. Times are perf_counter's."""

    begun: float
    outcomes: list[Outcome]
    end: float = 0.0
    cut: bool = False  # by ctrl-C: what had not ended then is an error of its own
    late_s: list[float] = field(default_factory=list)  # how late the event loop woke up, every TICK_S
    cpu_s: float = 0.0  # of this process

    @property
    def seconds(self) -> float:
        return max(self.end - self.begun, 1e-9)


class Asker:
    """Makes the requests of a run, and sends one."""

    def __init__(self, target: Target, config: BenchConfig, model: str) -> None:
        """Raises InputError for a --backend or an --extra-body that is none."""
        if config.backend not in ENDPOINTS:
            raise InputError(f"--backend {config.backend}: there are {', '.join(ENDPOINTS)}")
        self.target, self.config, self.model = target, config, model
        self.chat, self.embeds = config.backend == "openai-chat", config.backend == EMBEDDINGS
        self.path = config.endpoint or ENDPOINTS[config.backend]
        self.more = _object("--extra-body", config.extra_body)

    def body(self, sample: Sample) -> dict[str, Any]:
        config = self.config
        if self.embeds:
            if isinstance(sample.prompt, list) and sample.prompt and isinstance(sample.prompt[0], dict):
                raise InputError(
                    f"--backend {EMBEDDINGS}: a prompt of the data set is a conversation, and embeddings are of texts"
                )
            return {"model": self.model, "input": sample.prompt, "encoding_format": "base64", **self.more}
        body: dict[str, Any] = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        if self.chat:
            said = sample.prompt
            is_chat = isinstance(said, list) and bool(said) and isinstance(said[0], dict)
            if isinstance(said, list) and not is_chat:
                raise InputError("--backend openai-chat: a prompt of the data set is token ids, and chat takes text")
            body["messages"] = said if is_chat else [{"role": "user", "content": said}]
        else:
            body["prompt"] = sample.prompt
        if sample.output_tokens is not None:
            body["max_completion_tokens" if self.chat else "max_tokens"] = sample.output_tokens
        body |= {name: value for name in SAMPLING if (value := getattr(config, name)) is not None}
        if config.ignore_eos:
            body["ignore_eos"] = True
        if config.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": config.logprobs} if self.chat else {"logprobs": config.logprobs}
        return body | self.more

    async def ask(self, sample: Sample, outcome: Outcome) -> None:
        """Fill ``outcome``; every failure ends up in it. Cancelled: so does that."""
        outcome.asked_tokens = 0 if self.embeds else sample.output_tokens or 0
        prefix = self.config.request_id_prefix  # none without it: there are servers that take UUIDs alone
        named = {} if prefix is None else {"X-Request-Id": f"{prefix}{outcome.number}"}
        request = self.target.request(self.path, self.body(sample), named)
        try:
            async with asyncio.timeout(self.config.request_timeout):
                answer = await self.target.send(request, None if self.embeds else outcome.feed)
            if answer.status == 200 and self.embeds:
                outcome.embedded(answer.body, time.perf_counter())
            elif answer.status == 200:
                outcome.finish(time.perf_counter())
            else:
                outcome.fail(*refused(answer.status, answer.body))
        except Broken as error:
            outcome.fail(str(error))
        except TimeoutError:
            outcome.fail("timed out", f"no end after {self.config.request_timeout:g} s")
        except asyncio.CancelledError:
            outcome.fail("cut off", "the run was ended before")
            raise
        finally:
            outcome.end = outcome.end or time.perf_counter()


async def run(
    asker: Asker, samples: Sequence[Sample], arrivals: Sequence[float], stop: asyncio.Event, done: Callable[[], object]
) -> Run:
    """Send all requests at their times; ``done`` is called as each ends. Once ``stop`` is set, what has not ended is cut off."""
    config = asker.config
    places = asyncio.Semaphore(config.max_concurrency) if config.max_concurrency else None
    open_loop = any(arrivals)  # else requests have no times of their own: each begins when there is a place for it
    cpu, found = time.process_time(), Run(time.perf_counter(), [Outcome(i) for i in range(len(samples))])

    async def one(sample: Sample, outcome: Outcome, at: float) -> None:
        outcome.intended = found.begun + at
        async with places or nullcontext():
            now = outcome.sent = time.perf_counter()
            if places is not None and not open_loop:
                outcome.intended = now
            await asker.ask(sample, outcome)
        done()

    async def all_of_them() -> None:
        async with asyncio.TaskGroup() as group:
            for sample, outcome, at in zip(samples, found.outcomes, arrivals):
                if (wait := found.begun + at - time.perf_counter()) > 0:
                    await asyncio.sleep(wait)
                group.create_task(one(sample, outcome, at))

    watching = asyncio.create_task(_watch(found.late_s))
    work, stopped = asyncio.create_task(all_of_them()), asyncio.create_task(stop.wait())
    await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
    found.end, found.cut = time.perf_counter(), not work.done()
    for task in (watching, work, stopped):
        task.cancel()
    results = await asyncio.gather(watching, work, stopped, return_exceptions=True)
    if isinstance(results[1], BaseExceptionGroup):
        raise results[1].exceptions[0]
    found.cpu_s = time.process_time() - cpu
    for outcome in found.outcomes:
        if found.cut and not outcome.end:
            outcome.fail("never sent" if outcome.sent is None else "cut off", "the run was ended before")
    return found


async def _watch(late_s: list[float]) -> None:
    while True:
        due = time.perf_counter() + TICK_S
        await asyncio.sleep(TICK_S)
        late_s.append(max(0.0, time.perf_counter() - due))


def headers(config: BenchConfig) -> dict[str, str]:
    """Those of every request: the key, and --header. Raises InputError."""
    key = config.api_key if config.api_key is not None else os.environ.get("OPENAI_API_KEY")
    found = {"Authorization": f"Bearer {key}"} if key else {}
    return found | pairs("--header", config.header, "=")


def pairs(flag: str, values: Sequence[str], sign: str) -> dict[str, str]:
    found = {}
    for value in values:
        name, between, what = value.partition(sign)
        if not between or not name:
            raise InputError(f"{flag} {value}: it looks like NAME{sign}VALUE")
        found[name] = what
    return found


def _object(flag: str, text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text) if text else {}
    except ValueError as error:
        raise InputError(f"{flag} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{flag} is a JSON object, got {text}")
    return found
