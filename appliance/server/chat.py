"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.responses import Response

from appliance.server.logprobs import Logprobs
from appliance.server.pieces import Chunks, PiecedResponse, pieces
from appliance.server.respond import stream
from appliance.server.schemas import ChatRequest
from appliance.server.shortcut import Shortcut
from appliance.server.state import ServerState
from appliance.server.turn import Turn, begin
from appliance.text.answer import Answer
from appliance.text.delta import AnswerDelta, CallDelta
from appliance.text.output import Delta


async def answer(state: ServerState, request_id: str, body: ChatRequest) -> Response:
    view = ChatView(await begin(state, request_id, body), body)
    return await stream(view.chunks(), shortcut=view.job.shortcut) if body.stream else PiecedResponse(pieces(await view.full()))


class ChatView:
    """A turn as OpenAI's chat.completion object, whole or in chunks."""

    def __init__(self, turn: Turn, body: ChatRequest) -> None:
        self.turn, self.job, self.state, self.body = turn, turn.job, turn.state, body
        self.format = Logprobs(self.state, self.job.pace, as_ids=body.return_tokens_as_token_ids)
        self.top = -1 if body.logprob_token_ids else (body.top_logprobs or 0) if body.logprobs else None  # beside each token
        self._chunk = Chunks(self._base("chat.completion.chunk"))
        if self.top is None and len(turn.parsers) == 1 and not turn.parsers[0].may_end:
            self.job.shortcut = Shortcut(lambda delta: self._told(0, delta, turn.push(0, delta)))

    def _base(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.job.id,
            "object": kind,
            "created": int(self.job.begun),
            "model": self.job.model,
            "system_fingerprint": f"appliance-{self.state.version}",
        }

    async def full(self) -> dict[str, Any]:
        """As ``pieces`` takes it."""
        answers = await self.turn.finish()
        choices, place = [], {id(output): c for c, output in enumerate(self.job.outputs)}
        for index, output in enumerate(self.job.best):
            c = place[id(output)]
            choice: dict[str, Any] = {
                "index": index,
                "message": self._message(answers[c]),
                "logprobs": None if self.top is None else await self.format.chat(output.logprobs, self.top),
                "finish_reason": self.turn.finish_reason(c),
                "stop_reason": output.stop_reason,
            }
            if self.body.return_token_ids:
                choice["token_ids"] = list(output.token_ids)
            choices.append(choice)
            await self.job.pace()
        result = {**self._base("chat.completion"), "choices": choices, "usage": self.turn.usage()}
        if self.body.prompt_logprobs is not None:
            result["prompt_logprobs"] = await self.format.prompt(self.job.prompt_logprobs[0], self.body.prompt_logprobs)
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
        delta: dict[str, Any] = {"content": content} if (content := news.content) else {}
        if calls := news.calls:
            delta["tool_calls"] = [_call(call) for call in calls]
        return delta | self._reasoning(news.reasoning)

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        begun = set[int]()
        async with aclosing(self.turn.run()) as all_:
            async for c, delta, found in all_:
                if c not in begun:
                    begun.add(c)
                    yield self._chunk(_piece(c, {"role": "assistant", "content": ""}), **self._usage())
                logprobs = None
                if self.top is not None and delta.logprobs:
                    logprobs = await self.format.chat(delta.logprobs, self.top)
                if found.calls and delta.finish_reason:  # the openai client has no event for a call that ends where it began
                    yield self._chunk(_piece(c, self._delta(found), logprobs), **self._usage())
                    found, logprobs = AnswerDelta(), None
                if (told := self._told(c, delta, found, logprobs)) is not None:
                    yield told
        if self.body.stream_options and self.body.stream_options.include_usage:
            yield self._chunk(None, usage=self.turn.usage())

    def _told(self, c: int, delta: Delta, found: AnswerDelta, logprobs: Any = None) -> bytes | None:
        """The chunk of what is new of a choice, where there is something to tell."""
        news = self._delta(found)
        if not (news or logprobs or delta.finish_reason or self.body.return_token_ids):
            return None
        choice = _piece(c, news, logprobs)
        if delta.finish_reason:
            choice |= {"finish_reason": self.turn.finish_reason(c), "stop_reason": delta.stop_reason}
        if self.body.return_token_ids:
            choice["token_ids"] = list(delta.token_ids)
        return self._chunk(choice, **self._usage())

    def _usage(self) -> dict[str, Any]:
        """What chunks with a choice have behind it."""
        if (options := self.body.stream_options) is None or not options.include_usage:
            return {}
        return {"usage": self.turn.usage() if options.continuous_usage_stats else None}


def _piece(c: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"index": c, "delta": delta, "logprobs": logprobs, "finish_reason": None}


def _call(news: CallDelta) -> dict[str, Any]:
    """News of a call as a stream tells them: id, type and name once, then more of the arguments."""
    if news.name is None:
        return {"index": news.index, "function": {"arguments": news.arguments}}
    function = {"name": news.name, "arguments": news.arguments}
    return {"index": news.index, "id": news.id, "type": "function", "function": function}
