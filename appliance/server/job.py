"""One HTTP request in the engine: its prompts, n completions of each, and the text that comes of them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

from appliance.core.door import ContextOverflow, check_submit
from appliance.core.messages import Event, Pooling, Submit, TokenLogprob, Unanswerable
from appliance.core.params import RequestError, SamplingParams
from appliance.server.beside import Pace
from appliance.server.errors import EngineFailed
from appliance.server.guard import Ticket, current
from appliance.server.kinds import MAX_COMPLETIONS
from appliance.server.metrics import Course
from appliance.server.prompts import Prompt
from appliance.server.structured import form_field
from appliance.text.output import Delta, OutputStream, best_of
from appliance.text.prepare import prepare, with_thinking

if TYPE_CHECKING:
    from appliance.server.schemas import PromptFields
    from appliance.server.shortcut import Shortcut
    from appliance.server.state import ServerState

_numbers = count(1)  # clients may send the same X-Request-Id twice; the engine never sees a name twice


class Job:
    """Output ``c`` is completion ``c % width`` of prompt ``c // width``. Raises RequestError where it can never be served."""

    def __init__(
        self,
        state: ServerState,
        request_id: str,
        prefix: str,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        body: PromptFields,
        *,
        shown: Mapping[int, str] | None = None,
        clamp: bool = False,
        pooling: Pooling | None = None,
    ) -> None:
        """``shown``: as ``OutputStream`` has it. ``clamp``: each prompt gets what of max_tokens fits behind it.

        ``pooling``: the prompts' embeddings are wanted, and no completions (``params`` are ``embedding_params()``).
        """
        if pooling is None and state.pooler is not None:
            message = "this model makes embeddings: use /v1/embeddings (a server with --runner generate makes it generate text)"
            raise RequestError(message, param="model", code="unsupported_model")
        if pooling is None and (total := len(prompts) * params.width) > MAX_COMPLETIONS:
            found = f"{len(prompts)} prompts with {params.width} completions each"
            message = f"the request asks for {found}, {total}: at most {MAX_COMPLETIONS} in all are taken in one; send several"
            raise RequestError(message, param="n" if params.best_of is None else "best_of")
        self.state, self.request_id, self.prompts, self.body = state, request_id, prompts, body
        self.adapter = state.adapter(body.model)
        self.model = self.adapter or state.names[0]  # as answers call it
        self.id = f"{prefix}-{request_id}"
        self.begun, self.arrived = time.time(), time.monotonic()  # to tell, and to measure by: clocks may be set
        self.ticket = current.get() or Ticket()
        self.answering = False  # whether there is a token yet
        self.params = prepare(params, state.tokenizer) if state.tokenizer else params
        self._news: deque[tuple[int, Event | Delta | Exception]] = deque()
        self._came = asyncio.Event()
        self._waits = False  # for news, with nothing left to do
        self.shortcut: Shortcut | None = None  # of a job with one completion
        self.pace = Pace()
        self.pooling = pooling
        self.embeddings = [b""] * len(prompts) if pooling else []
        self.submits = [self._submit(k, prompt, clamp=clamp) for k, prompt in enumerate(prompts)]
        for submit in self.submits:
            check_submit(submit, state.info)
        self.outputs = [
            OutputStream(state.tokenizer, self.params, p.token_ids, shown=shown) for p in prompts for _ in range(params.width)
        ]
        # of what is counted the sums are kept: a stream may tell them with each of very many pieces
        self.prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        self.completion_tokens = self.cached_tokens = 0
        self._cached = [0] * len(prompts)
        self.prompt_logprobs: list[Sequence[TokenLogprob | None] | None] = [None] * len(prompts)
        self.courses = [Course(self.arrived) for _ in self.outputs]

    def _submit(self, k: int, prompt: Prompt, *, clamp: bool) -> Submit:
        name = self.id if len(self.prompts) == 1 else f"{self.id}-{k}"
        self._check_length(prompt)
        params = with_thinking(self._cut(self.params, prompt), self.state.tokenizer, self.state.parsers.tags, prompt.token_ids)
        params = clamp_max_tokens(params, prompt, self.state.info.max_model_len) if clamp else params
        return Submit(
            f"{name}-{next(_numbers)}",
            prompt.token_ids,
            params,
            self.arrived,
            cache_salt=self.body.cache_salt or "",
            priority=self.body.priority,
            pooling=self.pooling,
            adapter=self.adapter,
        )

    def _limits(self, name: str) -> list[tuple[int, str]]:
        """Those of the server and of the key, the smallest first, and whose they are."""
        key = self.ticket.account.limits if self.ticket.account else None
        both = ((getattr(self.state.server_config, name), "this server"), (getattr(key, name, None), "this key"))
        return sorted((most, whose) for most, whose in both if most is not None)

    def _check_length(self, prompt: Prompt) -> None:
        for most, whose in self._limits("max_prompt_tokens")[:1]:
            if (tokens := len(prompt.token_ids)) > most:
                raise ContextOverflow(tokens, None, most, whose=whose)

    def _cut(self, params: SamplingParams, prompt: Prompt) -> SamplingParams:
        """An answer is no longer than the limits say, as one under vLLM's ``max_new_tokens``: it ends with "length"."""
        for most, whose in self._limits("max_output_tokens")[:1]:
            if params.min_tokens > most:
                raise RequestError(f"min_tokens is {params.min_tokens}, and {whose} gives at most {most}", param="min_tokens")
            if params.max_tokens is None or params.max_tokens > most:
                return clamp_max_tokens(replace(params, max_tokens=most), prompt, self.state.info.max_model_len)
        return params

    @property
    def best(self) -> list[OutputStream]:
        """The answers: all outputs, or the ``n`` best of each prompt under ``best_of``."""
        n, width = self.params.n, self.params.width
        return [one for k in range(len(self.prompts)) for one in best_of(self.outputs[k * width : (k + 1) * width], n)]

    async def run(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """(choice, what is new) until every choice has its finish_reason. Closing it frees everything in the engine.

        Raises RequestError (also where the queue is full, or the key's limit reached), EngineDied, or EngineFailed.
        """
        self.state.check_queue()
        self.ticket.begin(self)
        self.state.jobs.add(self)
        self._left = len(self.outputs)
        self.state.metrics.arrived += self._left
        reason = "abort"  # of the choices that do not come to their end
        try:
            for k, submit in enumerate(self.submits):
                self.state.client.submit(submit, partial(self._put, k))
            while self._left:
                if self._news:  # a step may bring news of very many
                    await self.pace()
                while not self._news:
                    self._came.clear()
                    self._waits = True
                    await self._came.wait()
                    self._waits = False
                    self.pace.begin()
                k, event = self._news.popleft()
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Delta):
                    choice, delta = 0, event
                else:
                    choice = k * self.params.width + event.index
                    if self.outputs[choice].finish_reason is not None:
                        continue  # the engine's answer to the abort after a stop string
                    delta = self._take(choice, k, event)
                self._left -= delta.finish_reason is not None
                yield choice, delta
        except Exception:
            reason = "error"
            raise
        finally:
            self.state.jobs.discard(self)
            width = self.params.width
            for k, submit in enumerate(self.submits):
                ended = all(output.finish_reason for output in self.outputs[k * width : (k + 1) * width])
                self.state.client.close(submit.request_id, abort=not ended)
            for choice, output in enumerate(self.outputs):
                if output.finish_reason is None:
                    self._count(choice, reason, time.monotonic())
            width = self.params.width
            for k in range(len(self.prompts)):
                longest = max(len(output.token_ids) for output in self.outputs[k * width : (k + 1) * width])
                if self.pooling is None:
                    self.state.metrics.answered(self.params, longest)

    def _put(self, k: int, news: Event | Delta | Exception) -> None:
        if self.shortcut is not None and self._waits and not self._news and isinstance(news, Event) and self.shortcut.takes(news):
            try:
                news = self._take(0, k, news)
                if news.finish_reason is None:
                    return self.shortcut.send(news)
            except Exception as error:  # is the request's, as if its task had met it, and not that of all others in this step
                news = error
        self._news.append((k, news))
        self._came.set()

    def _take(self, choice: int, k: int, event: Event) -> Delta:
        if event.finish_reason == "error":
            if isinstance(event.error, Unanswerable):
                raise RequestError(str(event.error), param=form_field(self.body))
            raise EngineFailed(event.error or "the engine failed to compute this request")
        if event.prompt_logprobs is not None:
            self.prompt_logprobs[k] = event.prompt_logprobs
        if event.index == 0:  # the others share what this one computes
            self.cached_tokens += max(0, event.cached_tokens - self._cached[k])
            self._cached[k] = max(self._cached[k], event.cached_tokens)
        if event.embedding is not None:
            self.embeddings[k] = event.embedding
        now = time.monotonic()
        if event.token_ids:
            self.answering = True
            self.ticket.generated(len(event.token_ids))
            self.state.metrics.tokens(self.courses[choice], event, now)
        delta = self.outputs[choice].push(event)
        self.completion_tokens += len(delta.token_ids)
        if delta.abort:
            self.state.client.abort(self.submits[k].request_id, event.index, "stop")
        if delta.finish_reason is not None:
            self._count(choice, delta.finish_reason, now)
        return delta

    def _count(self, choice: int, reason: str, now: float) -> None:
        self.ticket.finish_reasons.append(reason)
        prompt = self.prompts[choice // self.params.width]
        self.state.metrics.finished(
            reason,
            self.courses[choice],
            now,
            prompt_tokens=len(prompt.token_ids),
            output_tokens=len(self.outputs[choice].token_ids),
        )

    def end(self, choice: int) -> None:
        """Let a choice be complete with what it has, as after a stop string. For whoever takes what ``run`` yields."""
        self.outputs[choice].finish_reason = "stop"
        self.state.client.abort(self.submits[choice // self.params.width].request_id, choice % self.params.width, "stop")
        self._left -= 1
        self._count(choice, "stop", time.monotonic())

    def fail(self, error: Exception) -> None:
        """End the job now: whoever waits for it gets this error."""
        self._put(0, error)

    def abort(self) -> None:
        """Ask the engine to stop; the choices end with finish_reason "abort"."""
        for submit in self.submits:
            self.state.client.abort(submit.request_id)

    def usage(self, *, hidden: bool = False) -> dict[str, Any]:
        """OpenAI's usage object so far, with all that ``best_of`` generates. ``hidden``: that is not the client's."""
        completion = 0 if hidden else self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + completion,
            "completion_tokens": completion,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def clamp_max_tokens(params: SamplingParams, prompt: Prompt, limit: int) -> SamplingParams:
    """A max_tokens that nobody asked for shall not push a prompt over the context."""
    room = limit - len(prompt.token_ids)
    if params.max_tokens is None or room < 1 or room >= params.max_tokens or room < params.min_tokens:
        return params
    return replace(params, max_tokens=room)
