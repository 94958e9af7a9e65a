"""What a model says in a conversation: a job whose choices are taken apart as they come. All forms of chat begin here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from appliance.core.params import RequestError
from appliance.server.job import Job, clamp_max_tokens
from appliance.server.prompts import chat_prompt
from appliance.server.sampling import chat_params
from appliance.server.schemas import ChatRequest
from appliance.server.state import ServerState
from appliance.server.structured import with_grammar
from appliance.text.answer import Answer, AnswerParser
from appliance.text.delta import AnswerDelta
from appliance.text.output import Delta

PATIENCE_S = 10.0  # a stream begins at the latest then, token or not


async def begin(state: ServerState, request_id: str, body: ChatRequest, prefix: str = "chatcmpl", *, clamp: bool = False) -> Turn:
    """Everything up to the engine: it begins with ``run``. Raises RequestError for what cannot be served.

    ``clamp``: a max_tokens beyond the end of the context is no error.
    """
    body.check()
    state.check_unknown(body)
    params = await with_grammar(chat_params(body, state.defaults, state.server_config.max_logprobs), body)
    choice = state.parsers.choice(body, params)
    prompt = await chat_prompt(state.parsers.fitted(body), state.tokenizer, state.info.max_model_len, list(choice.tools) or None)
    params = await state.parsers.held(params, choice, body, prompt)
    if clamp:
        params = clamp_max_tokens(params, prompt, state.info.max_model_len)
    try:
        job = Job(state, request_id, prefix, [prompt], params, body, shown=state.parsers.shown(choice))
    except RequestError as error:
        name = "max_completion_tokens"  # which says the same, and counts
        if error.param != "max_tokens" or body.max_completion_tokens is None:
            raise
        raise RequestError(str(error).replace("max_tokens", name), param=name, code=error.code) from None
    return Turn(state, job, [state.parsers.new(choice, body, prompt) for _ in job.outputs])


class Turn:
    """A job's choices, each with its parser."""

    def __init__(self, state: ServerState, job: Job, parsers: Sequence[AnswerParser]) -> None:
        self.state, self.job, self.parsers = state, job, parsers
        self._thoughts, self._thought = [0] * len(parsers), 0  # tokens of reasoning, as counted last, and their sum
        self._fresh = set[int]()  # choices of which there is news since

    async def run(self) -> AsyncGenerator[tuple[int, Delta, AnswerDelta], None]:
        """(choice, what is new of it, the same taken apart) until all have ended; as ``Job.run``.

        An answer whose first call is to be the only one ends with it.
        """
        async with aclosing(self.job.run()) as deltas:
            async for c, delta in deltas:
                news = self.push(c, delta)
                if self.parsers[c].satisfied and delta.finish_reason is None:
                    self.job.end(c)
                    delta = replace(delta, finish_reason="stop")
                yield c, delta, news

    def push(self, c: int, delta: Delta) -> AnswerDelta:
        """What is new of a choice, taken apart."""
        self._fresh.add(c)
        return self.parsers[c].push(delta.text, last=delta.finish_reason is not None)

    async def announced(self) -> AsyncGenerator[tuple[int, Delta, AnswerDelta] | None, None]:
        """``run``, with None ahead: as soon as there is news, after PATIENCE_S at the latest. What fails before is raised."""
        async with aclosing(self.run()) as all_:
            first = asyncio.ensure_future(anext(all_))
            try:
                await asyncio.wait({first}, timeout=PATIENCE_S)
                if first.done():
                    first.result()
                yield None
                yield await first
            finally:
                first.cancel()
                await asyncio.gather(first, return_exceptions=True)
            async for one in all_:
                yield one

    async def finish(self) -> list[Answer]:
        """Run to the end: what has come of each choice."""
        told: list[list[AnswerDelta]] = [[] for _ in self.parsers]
        async with aclosing(self.run()) as all_:
            async for c, _, news in all_:
                told[c].append(news)
        answers = []
        for deltas in told:
            answers.append(answer := Answer(reasoning="".join(one.reasoning for one in deltas)))
            answer.add("".join(one.content for one in deltas), tuple(call for one in deltas for call in one.calls))
            await self.job.pace()
        return answers

    def finish_reason(self, c: int) -> str | None:
        """OpenAI's word for how the answer ended."""
        return self.parsers[c].finish_reason(self.job.outputs[c].finish_reason, self.job.outputs[c].stop_reason)

    def cut(self, c: int) -> bool:
        """Whether a stop string ended the answer in the midst of a call."""
        return self.parsers[c].cut(self.job.outputs[c].stop_reason)

    def reasoning_tokens(self, c: int) -> int:
        """How many of the answer's tokens are reasoning, tags included."""
        return self.parsers[c].reasoning_tokens(self.job.outputs[c].token_ids, self._spelled)

    def _spelled(self, token: int) -> bytes:
        assert self.state.tokenizer is not None  # the prompt was rendered
        return self.state.tokenizer.token_bytes(token) or b""

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object so far."""
        while self._fresh:  # a stream may ask with each of very many choices' tokens
            c = self._fresh.pop()
            count = self.reasoning_tokens(c)
            self._thought += count - self._thoughts[c]
            self._thoughts[c] = count
        return {**self.job.usage(), "completion_tokens_details": {"reasoning_tokens": self._thought}}
