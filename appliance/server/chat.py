"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

from starlette.responses import Response

from appliance.server.errors import JSONResponse
from appliance.server.job import Job
from appliance.server.logprobs import Logprobs
from appliance.server.prompts import chat_prompt
from appliance.server.respond import stream
from appliance.server.sampling import chat_params
from appliance.server.schemas import ChatRequest
from appliance.server.state import ServerState
from appliance.server.structured import with_grammar
from appliance.text.answer import Answer, AnswerDelta, AnswerParser
from appliance.text.tools.parser import CallDelta


async def answer(state: ServerState, request_id: str, body: ChatRequest) -> Response:
    body.check()
    state.check_unknown(body)
    params = await with_grammar(chat_params(body, state.defaults, state.server_config.max_logprobs), body)
    formed = params.structured_outputs is not None
    choice = state.parsers.choice(body)
    prompt = await chat_prompt(body, state.tokenizer, state.info.max_model_len, list(choice.tools) or None)
    params = await state.parsers.must_call(params, choice, body, prompt)
    job = Job(state, request_id, "chatcmpl", [prompt], params, body, shown=state.parsers.shown(choice))
    view = ChatView(state, job, body, partial(state.parsers.new, choice, body, prompt, formed=formed))
    return await stream(view.chunks()) if body.stream else JSONResponse(await view.full())


class ChatView:
    """A job as OpenAI's chat.completion object, whole or in chunks; ``parser()`` makes one for each answer."""

    def __init__(self, state: ServerState, job: Job, body: ChatRequest, parser: Callable[[], AnswerParser]) -> None:
        self.state, self.job, self.body, self.parser = state, job, body, parser
        self.format = Logprobs(state, as_ids=body.return_tokens_as_token_ids)

    def _base(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.job.id,
            "object": kind,
            "created": int(self.job.begun),
            "model": self.state.names[0],
            "system_fingerprint": f"appliance-{self.state.version}",
        }

    async def full(self) -> dict[str, Any]:
        async with aclosing(self.job.run()) as deltas:
            async for _ in deltas:
                pass
        choices = []
        for c, output in enumerate(self.job.best):
            parser = self.parser()
            found = parser.parse(output.text)
            choice: dict[str, Any] = {
                "index": c,
                "message": self._message(found),
                "logprobs": self.format.chat(output.logprobs or (), self.body.top_logprobs or 0) if self.body.logprobs else None,
                "finish_reason": parser.finish_reason(output.finish_reason),
                "stop_reason": output.stop_reason,
            }
            if self.body.return_token_ids:
                choice["token_ids"] = list(output.token_ids)
            choices.append(choice)
        result = {**self._base("chat.completion"), "choices": choices, "usage": self.job.usage()}
        if self.body.prompt_logprobs is not None:
            result["prompt_logprobs"] = self.format.prompt(self.job.prompt_logprobs[0])
        if self.body.return_token_ids:
            result["prompt_token_ids"] = list(self.job.prompts[0].token_ids)
        return result

    def _message(self, found: Answer) -> dict[str, Any]:
        content = found.content or (None if found.calls else "")
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if found.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in found.calls
            ]
        return message | self._reasoning(found.reasoning)

    def _reasoning(self, text: str) -> dict[str, Any]:
        """Under DeepSeek's name and under vLLM's."""
        return {"reasoning_content": text, "reasoning": text} if text and self.body.include_reasoning else {}

    def _delta(self, news: AnswerDelta) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": news.content} if news.content else {}
        if news.calls:
            delta["tool_calls"] = [_call(call) for call in news.calls]
        return delta | self._reasoning(news.reasoning)

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        parsers: dict[int, AnswerParser] = {}
        async with aclosing(self.job.run()) as deltas:
            async for c, delta in deltas:
                if c not in parsers:
                    parsers[c] = self.parser()
                    yield self._chunk(c, {"role": "assistant", "content": ""})
                logprobs = None
                if self.body.logprobs and delta.logprobs:
                    logprobs = self.format.chat(delta.logprobs, self.body.top_logprobs or 0)
                news = self._delta(parsers[c].push(delta.text, last=delta.finish_reason is not None))
                if news or logprobs or delta.finish_reason or self.body.return_token_ids:
                    reason = parsers[c].finish_reason(delta.finish_reason)
                    more: dict[str, Any] = {"logprobs": logprobs, "finish_reason": reason}
                    if delta.finish_reason:
                        more["stop_reason"] = delta.stop_reason
                    if self.body.return_token_ids:
                        more["token_ids"] = list(delta.token_ids)
                    yield self._chunk(c, news, **more)
        if self.body.stream_options and self.body.stream_options.include_usage:
            yield {**self._base("chat.completion.chunk"), "choices": [], "usage": self.job.usage()}

    def _chunk(self, c: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        choice = {"index": c, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        chunk = {**self._base("chat.completion.chunk"), "choices": [choice]}
        if (options := self.body.stream_options) and options.include_usage:
            chunk["usage"] = self.job.usage() if options.continuous_usage_stats else None
        return chunk


def _call(news: CallDelta) -> dict[str, Any]:
    """News of a call as a stream tells them: id, type and name once, then more of the arguments."""
    if news.name is None:
        return {"index": news.index, "function": {"arguments": news.arguments}}
    function = {"name": news.name, "arguments": news.arguments}
    return {"index": news.index, "id": news.id, "type": "function", "function": function}
