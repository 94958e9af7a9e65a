"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

from starlette.responses import Response

from appliance.core.door import ContextOverflow
from appliance.core.params import RequestError
from appliance.server.errors import JSONResponse, anthropic_body, describe
from appliance.server.messages.convert import Way, chat_request
from appliance.server.messages.events import Blocks, Event, message_of
from appliance.server.messages.schemas import CountRequest, MessagesRequest
from appliance.server.prompts import Prompt, chat_prompt
from appliance.server.respond import Form, named_event, stream
from appliance.server.schemas import ChatRequest
from appliance.server.state import ServerState
from appliance.server.turn import Turn, begin
from appliance.text.output import Delta
from appliance.text.tools.formats import Mistral, nine_characters

T = TypeVar("T")
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
QUIET_S = 10.0  # a stream in which nothing comes says so often that it lives
PING: Event = {"type": "ping"}
WAYS = (Way(), Way(after_results=False))
# What fields are called here: chat's name, in the errors of what both share -> Anthropic's.
NAMES = {
    "response_format.json_schema.schema": "output_config.format.schema",
    "response_format": "output_config.format",
    "stop": "stop_sequences",
}


async def answer(state: ServerState, request_id: str, body: MessagesRequest) -> Response:
    turn = await _understood(state, body, lambda chat: begin(state, request_id, chat, "msg", clamp=True))
    view = MessageView(turn, body)
    if not body.stream:
        return JSONResponse(await message_of(view.batches()))
    form = Form(_encoded, lambda error: _encoded([_failed(error, request_id)]), b"", _encoded([PING]), QUIET_S)
    return await stream(view.batches(), form)


async def count(state: ServerState, body: CountRequest) -> dict[str, Any]:
    """As many tokens as a request with the same fields has; also of a prompt that is longer than the context."""

    async def prompt(chat: ChatRequest) -> Prompt:
        chat.check()
        state.check_unknown(chat)
        tools = state.parsers.choice(chat).tools
        return await chat_prompt(chat, state.tokenizer, sys.maxsize, list(tools) or None)

    assert state.known  # else it is not to be served now
    return {"input_tokens": len((await _understood(state, body, prompt)).token_ids)}


async def _understood(state: ServerState, body: CountRequest, then: Callable[[ChatRequest], Awaitable[T]]) -> T:
    """What ``then`` makes of the request, told in the first way that the model's chat template takes."""
    refused: RequestError | None = None
    for way in WAYS:
        way = replace(way, fit_id=nine_characters) if state.parsers.tools is Mistral else way
        chat = await asyncio.to_thread(chat_request, body, way)  # there may be very many blocks
        if body.thinking is not None and body.thinking.type == "enabled" and state.parsers.ends_thoughts:
            chat.thinking_token_budget = body.thinking.budget_tokens
        try:
            return await then(chat)
        except RequestError as error:
            if error.param != "messages":
                raise renamed(error) from None
            refused = refused or error
    assert refused is not None
    raise refused


def renamed(error: RequestError) -> RequestError:
    """An error of what chat shares, with the names that fields have here, and words that clients look for to shorten a prompt."""
    if isinstance(error, ContextOverflow):
        message = f"prompt is too long: {error.prompt_len} tokens > {error.limit} maximum"
        return RequestError(message, param="messages", code=error.code)
    param, message = error.param or "", str(error)
    for name, here in NAMES.items():
        if param == name or name in message.split():
            param, message = param.replace(name, here), message.replace(name, here, 1)
            break
    return RequestError(message, param=param, code=error.code, status=error.status)


class MessageView:
    """A turn as Anthropic's message, in events: those of one delta are a batch."""

    def __init__(self, turn: Turn, body: MessagesRequest) -> None:
        self.turn, self.job, self.body = turn, turn.job, body
        self.job.id = f"msg_{self.job.request_id}"
        self.blocks = Blocks(thinking_shown=body.thinking is None or body.thinking.display != "omitted")

    async def batches(self) -> AsyncGenerator[list[Event], None]:
        async with aclosing(self.turn.announced()) as all_:
            async for news in all_:
                if news is None:
                    yield [{"type": "message_start", "message": self._start()}, PING]
                elif batch := self._events(news[1], self.blocks.push(news[2]) if self.body.max_tokens else []):
                    yield batch

    def _events(self, delta: Delta, events: list[Event]) -> list[Event]:
        if delta.finish_reason is None:
            return events
        if delta.finish_reason == "abort":
            raise RequestError("the request was aborted", code="aborted", status=499)
        stopped = delta.stop_reason if isinstance(delta.stop_reason, str) else None
        reason = self._stop_reason(delta, stopped)
        end = {"stop_reason": reason, "stop_sequence": stopped if reason == "stop_sequence" else None}
        cut = delta.finish_reason == "length" or stopped is not None
        last: list[Event] = [{"type": "message_delta", "delta": end, "usage": self._usage()}, {"type": "message_stop"}]
        return [*events, *self.blocks.finish(cut=cut), *last]

    def _stop_reason(self, delta: Delta, stopped: str | None) -> str:
        reason = self.turn.finish_reason(0)
        if reason == "length" and (self.job.params.max_tokens or 0) < self.body.max_tokens:
            return "model_context_window_exceeded"
        if not self.body.max_tokens:
            return "max_tokens"
        return "stop_sequence" if reason == "stop" and stopped is not None else STOP_REASONS.get(reason or "", "end_turn")

    def _start(self) -> dict[str, Any]:
        return {
            "id": self.job.id,
            "type": "message",
            "role": "assistant",
            "model": self.job.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage() | {"service_tier": "standard"},
        }

    def _usage(self) -> dict[str, Any]:
        """So far. A token of the prompt was computed, or found in the cache; that computed ones are kept is not counted again."""
        usage, told = self.job.usage(), self.body.max_tokens > 0
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": usage["completion_tokens"] if told else 0,
            "output_tokens_details": {"thinking_tokens": self.turn.reasoning_tokens(0) if told else 0},
        }


def _encoded(events: list[Event]) -> bytes:
    return b"".join(named_event(event["type"], event) for event in events)


def _failed(error: Exception, request_id: str) -> Event:
    status, body = describe(error)
    return anthropic_body(status, body, request_id)
