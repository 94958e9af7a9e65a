"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from itertools import accumulate, chain
from typing import Any

from starlette.responses import Response

from appliance.core.messages import TokenLogprob
from appliance.server.job import Job
from appliance.server.logprobs import Logprobs
from appliance.server.pieces import Chunks, PiecedResponse, pieces
from appliance.server.prompts import Prompt, completion_prompts, text_of
from appliance.server.respond import stream
from appliance.server.sampling import completion_params
from appliance.server.schemas import CompletionRequest
from appliance.server.shortcut import Shortcut
from appliance.server.state import ServerState
from appliance.server.structured import with_grammar
from appliance.text.output import Delta


async def answer(state: ServerState, request_id: str, body: CompletionRequest) -> Response:
    body.check()
    state.check_unknown(body)
    limit = state.info.max_model_len
    params = await with_grammar(completion_params(body, state.defaults, state.server_config.max_logprobs), body)
    prompts = await completion_prompts(body, state.tokenizer, limit)
    job = Job(state, request_id, "cmpl", prompts, params, body, clamp=body.max_tokens is None)
    view = CompletionView(state, job, body)
    return await stream(view.chunks(), shortcut=job.shortcut) if body.stream else PiecedResponse(pieces(await view.full()))


class CompletionView:
    """A job as OpenAI's text_completion object, whole or in chunks."""

    def __init__(self, state: ServerState, job: Job, body: CompletionRequest) -> None:
        self.state, self.job, self.body = state, job, body
        self.top = -1 if body.logprob_token_ids else body.logprobs  # how many of those that come are told; None: none
        self.logprobs = Logprobs(state, job.pace, as_ids=body.return_tokens_as_token_ids)
        self.hidden = body.max_tokens == 0  # the one token that the engine computed for echo alone
        self.offsets = [0] * len(job.outputs)  # text offset of each choice's next token
        self._chunk = Chunks(self._base())
        if self.top is None and len(job.outputs) == 1:
            job.shortcut = Shortcut(lambda delta: self._told(self._piece(0, delta.text, delta)))

    def _base(self) -> dict[str, Any]:
        return {
            "id": self.job.id,
            "object": "text_completion",
            "created": int(self.job.begun),
            "model": self.job.model,
            "system_fingerprint": f"appliance-{self.state.version}",
        }

    async def full(self) -> dict[str, Any]:
        """As ``pieces`` takes it."""
        async with aclosing(self.job.run()) as deltas:
            async for _ in deltas:
                pass
        choices = []
        for c, output in enumerate(self.job.best):
            whole = Delta(
                text=output.text,
                token_ids=tuple(output.token_ids),
                logprobs=tuple(output.logprobs or ()),
                finish_reason=output.finish_reason,
                stop_reason=output.stop_reason,
                abort=False,
            )
            prompt = None
            if self.body.prompt_logprobs is not None:
                prompt = await self.logprobs.prompt(self._prompt_scores(c), self.body.prompt_logprobs)
            choices.append({**await self._choice(c, whole, first=True), "prompt_logprobs": prompt})
            await self.job.pace()
        return {**self._base(), "choices": choices, "usage": self.job.usage(hidden=self.hidden)}

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        options, seen = self.body.stream_options, set[int]()
        async with aclosing(self.job.run()) as deltas:
            async for c, delta in deltas:
                first = c not in seen
                seen.add(c)
                if (told := self._told(await self._choice(c, delta, first))) is not None:
                    yield told
        if options and options.include_usage:
            yield self._chunk(None, usage=self.job.usage(hidden=self.hidden))

    def _told(self, choice: dict[str, Any]) -> bytes | None:
        """The chunk of a choice in which there is something to tell."""
        if not (choice["text"] or choice["finish_reason"] or choice["logprobs"] or self.body.return_token_ids):
            return None
        if (options := self.body.stream_options) is None or not options.include_usage:
            return self._chunk(choice)
        return self._chunk(choice, usage=self.job.usage(hidden=self.hidden) if options.continuous_usage_stats else None)

    def _prompt_scores(self, c: int) -> Sequence[TokenLogprob | None] | None:
        return self.job.prompt_logprobs[c // self.job.params.n]

    def _widths(self, token_ids: Sequence[int]) -> list[int]:
        """How many characters of the text each token is."""
        tokenizer = self.state.tokenizer
        if tokenizer is None:
            return [0] * len(token_ids)
        hidden = tokenizer.special_ids if self.job.params.skip_special_tokens else ()
        return [0 if token in hidden else len(self.state.token_name(token)) for token in token_ids]

    def _widths_of(self, prompt: Prompt) -> list[int]:
        """The same of an echoed prompt: special tokens are shown, but not the one that the tokenizer has put ahead of a text."""
        if (tokenizer := self.state.tokenizer) is None:
            return [0] * len(prompt.token_ids)
        names = [self.state.token_name(token) for token in prompt.token_ids]
        ahead = prompt.token_ids[0] in tokenizer.special_ids and prompt.text is not None and not prompt.text.startswith(names[0])
        return [0 if ahead else len(names[0]), *map(len, names[1:])]

    async def _choice(self, c: int, delta: Delta, first: bool) -> dict[str, Any]:
        """What is new of choice ``c``; its first piece brings the echoed prompt."""
        prompt = self.job.prompts[c // self.job.params.n]
        text, ids = ("", ()) if self.hidden else (delta.text, delta.token_ids)
        scored: list[Sequence[TokenLogprob | None]] = [] if self.hidden else [delta.logprobs or ()]
        shown, echoed = ids, first and self.body.echo
        if echoed:
            text = text_of(prompt, self.state.tokenizer) + text
            shown = prompt.token_ids + ids
            scored.insert(0, self._prompt_scores(c) or (None,) * len(prompt.token_ids))
        logprobs = None
        if self.top is not None and (count := sum(map(len, scored))):
            widths = (self._widths_of(prompt) if echoed else []) + self._widths(ids)
            *offsets, self.offsets[c] = accumulate(widths[:count], initial=self.offsets[c])
            logprobs = await self.logprobs.completion(shown[:count], chain(*scored), self.top, offsets)
        choice = self._piece(c, text, delta, logprobs)
        if self.body.return_token_ids and first:
            choice["prompt_token_ids"] = list(prompt.token_ids)
        return choice

    def _piece(self, c: int, text: str, delta: Delta, logprobs: Any = None) -> dict[str, Any]:
        """``delta`` with this text in its place."""
        reason, stop_reason = delta.finish_reason, delta.stop_reason
        if self.hidden:
            reason, stop_reason = "length" if reason == "stop" else reason, None
        choice = {"index": c, "text": text, "logprobs": logprobs, "finish_reason": reason, "stop_reason": stop_reason}
        if self.body.return_token_ids:
            choice |= {"token_ids": [] if self.hidden else list(delta.token_ids), "prompt_token_ids": None}
        return choice
