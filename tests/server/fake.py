"""An engine client that needs no engine: it repeats the prompt's tokens, slowly if asked to, and counts what is asked of it."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

from appliance.core.messages import EngineInfo, Event, Stats, Submit, TokenLogprob, Unanswerable
from appliance.core.params import RequestError, SamplingParams
from appliance.core.scores import PromptLogprobs
from appliance.runtime.client import EngineDied

VOCAB = 99
END = 2  # "</s>" of the tiny tokenizer


def info(max_model_len: int = 512) -> EngineInfo:
    return EngineInfo(
        model="tiny",
        directory="tiny",
        architecture="LlamaForCausalLM",
        quantization="awq",
        dtype="float32",
        device="cpu",
        max_model_len=max_model_len,
        vocab_size=VOCAB,
        eos_token_ids=(END,),
        hidden_size=64,
        ready_s=0.1,
        plan={
            "num_blocks": 64,
            "weights_bytes": {"mlp": 5, "total": 7},
            "runtime_bytes": 3,
            "found_bytes": {"weights": 7, "KV cache": 9},
        },
    )


class FakeClient:
    """Answers a prompt with itself: output token k is prompt token ``(k + index) % len``, so every answer shows whose it is;
    with an adapter it begins so many tokens later as its name has characters.

    Its embedding are its token ids.
    """

    def __init__(self, *, delay_s: float = 0.0, max_model_len: int = 512, state: str = "ready") -> None:
        self.state = state
        self.info: EngineInfo | None = None if state in ("unloaded", "loading") else info(max_model_len)
        self.failure: str | None = None
        self.loading = (3, 10)
        self.pid: int | None = None
        self.stuck, self.nudges = False, 0
        self.delay_s = delay_s
        self.fail_at: int | None = None  # the output token at which every request ends with an error
        self.unanswerable: str | None = None  # what every request ends with: its own fault
        self.aborted: list[tuple[str, int | None]] = []
        self.submitted: list[Submit] = []
        self.running: dict[str, set[int]] = {}
        self.pumps: dict[str, asyncio.Task[None]] = {}
        self.prompt_scores: PromptLogprobs | None = None  # of every prompt, where they are asked for
        self.tokens = self.cached = self.resets = 0
        self.adapters: dict[str, str] = {}  # name -> directory
        self.refuses: str | None = None  # what is wrong with every adapter
        self.decay = 0.0  # added to a log-probability for each completion before it
        self._dead = asyncio.Event()

    def submit(self, submit: Submit, sink: Callable[[Event | Exception], None]) -> None:
        if self.state != "ready":
            raise EngineDied(self.failure or f"the engine is {self.state}")
        self.pumps[submit.request_id] = asyncio.create_task(self._pump(submit, sink))

    async def _pump(self, submit: Submit, sink: Callable[[Event | Exception], None]) -> None:
        try:
            async with aclosing(self.generate(submit)) as events:
                async for event in events:
                    sink(event)
        except Exception as error:
            sink(error)

    def nudge(self) -> None:
        self.nudges += 1

    def close(self, request_id: str, *, abort: bool) -> None:
        if pump := self.pumps.pop(request_id, None):
            pump.cancel()

    async def generate(self, submit: Submit) -> AsyncGenerator[Event, None]:
        if self.state != "ready":
            raise EngineDied(self.failure or f"the engine is {self.state}")
        if submit.adapter and submit.adapter not in self.adapters:
            raise RequestError(f"there is no LoRA adapter {submit.adapter!r}", param="model", code="model_not_found", status=404)
        assert submit.request_id not in self.running
        self.submitted.append(submit)
        alive = self.running[submit.request_id] = set(range(submit.params.width))
        told: set[int] = set()
        try:
            scores: Sequence[TokenLogprob | None] | None = None
            if submit.params.prompt_logprobs is not None:  # an engine makes them in another process
                scores = await asyncio.to_thread(self._prompt_scores, submit, submit.params.prompt_logprobs)
            step = 0
            while len(told) < submit.params.width:
                await self._wait()
                for index in range(submit.params.width):
                    if index in told:
                        continue
                    event = Event(submit.request_id, index, finish_reason="abort")
                    if index in alive:
                        event = self._event(submit, index, step)
                        event = event if step or scores is None else replace(event, prompt_logprobs=scores)
                    if event.finish_reason:
                        told.add(index)
                    yield event
                step += 1
        finally:
            del self.running[submit.request_id]
            if len(told) < submit.params.width:
                self.aborted.append((submit.request_id, None))

    async def _wait(self) -> None:
        try:
            await asyncio.wait_for(self._dead.wait(), self.delay_s)
        except TimeoutError:
            return
        raise EngineDied(self.failure or "dead")

    def _event(self, submit: Submit, index: int, step: int) -> Event:
        prompt, params = submit.prompt_token_ids, submit.params
        if self.unanswerable is not None:
            return Event(submit.request_id, index, finish_reason="error", error=Unanswerable(self.unanswerable))
        if self.fail_at is not None and step >= self.fail_at:
            return Event(submit.request_id, index, finish_reason="error", error="the step failed")
        if submit.pooling is not None:
            vector = struct.pack(f"<{len(prompt)}f", *prompt)[: 4 * (submit.pooling.dimensions or len(prompt))]
            return Event(submit.request_id, index, finish_reason="stop", embedding=vector)
        token = prompt[(step + index + len(submit.adapter)) % len(prompt)]
        self.tokens += 1
        limit = params.max_tokens or self.info.max_model_len - len(prompt)  # type: ignore[union-attr]
        reason = "stop" if token == END and not params.ignore_eos else "length" if step + 1 >= limit else None
        return Event(
            submit.request_id,
            index,
            token_ids=(token,),
            logprobs=self._scored(token, index, params),
            finish_reason=reason,
            cached_tokens=self.cached if index == 0 else len(prompt) - 1,  # the others share what the first one computes
        )

    def _prompt_scores(self, submit: Submit, top: int) -> Sequence[TokenLogprob | None]:
        return self.prompt_scores or (None, *(score(token, top) for token in submit.prompt_token_ids[1:]))

    def _scored(self, token: int, index: int, params: SamplingParams) -> tuple[TokenLogprob, ...] | None:
        """Later completions are better ones where ``decay`` is above 0."""
        if params.scored is None and params.width == params.n:
            return None
        if isinstance(params.scored, tuple):
            return (TokenLogprob(token, -0.5, 1, tuple((other, -1.0 * other) for other in params.scored)),)
        found = score(token, params.scored or 0)
        return (replace(found, logprob=found.logprob + index * self.decay),)

    async def load_adapter(self, name: str, path: str, *, replace: bool = False) -> None:
        await asyncio.sleep(self.delay_s)
        if self.state != "ready":
            raise EngineDied(self.failure or f"the engine is {self.state}")
        if self.refuses is not None or (name in self.adapters and not replace):
            raise RequestError(self.refuses or f"{name} is taken", param="lora_name")
        self.adapters[name] = path

    async def unload_adapter(self, name: str) -> None:
        await asyncio.sleep(self.delay_s)
        if self.state != "ready":
            raise EngineDied(self.failure or f"the engine is {self.state}")
        if self.adapters.pop(name, None) is None:
            raise RequestError(f"there is no LoRA adapter {name!r}", param="lora_name")

    def give_way(self) -> None:
        """There is no engine to give way to."""

    def reset_prefix_cache(self) -> None:
        self.resets += 1

    def abort(self, request_id: str, index: int | None = None, reason: str = "abort") -> None:
        self.aborted.append((request_id, index))
        if alive := self.running.get(request_id):
            alive -= {index} if index is not None else set(alive)

    async def stats(self) -> Stats:
        return Stats(
            running=len(self.running),
            waiting=3,
            swapped=2,
            blocks_total=64,
            blocks_used=4 * len(self.running),
            blocks_kept=5,
            swap_total=10,
            swap_used=4,
            swap_kept=1,
            generation_tokens=self.tokens,
            steps=7,
            swaps=6,
            prefix_queries=100,
            prefix_hits=40,
            prefix_host_hits=8,
            copied_blocks={"out": 9, "copy": 2},
        )

    async def stop(self, drain_s: float = 0.0) -> None:
        self.state = "stopped"

    def die(self, why: str) -> None:
        """As when the engine process is killed."""
        self.state, self.failure = "dead", why
        self._dead.set()


def score(token: int, top: int) -> TokenLogprob:
    """Any numbers that depend on the token."""
    others = tuple(((token + k) % VOCAB, -0.5 - k) for k in range(top))
    return TokenLogprob(token, -0.5, 1, others)
