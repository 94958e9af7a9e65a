"""POST /v1/responses and /v1/responses/input_tokens."""

from __future__ import annotations

import asyncio
import sys
import uuid
from contextlib import aclosing
from typing import Any

from starlette.responses import Response

from appliance.core.params import RequestError
from appliance.server.errors import JSONResponse
from appliance.server.guard import Ticket, current
from appliance.server.prompts import chat_prompt
from appliance.server.respond import ALIVE, QUIET_S, Form, named_event, stream
from appliance.server.responses.chat import chat_request, renamed
from appliance.server.responses.events import Event
from appliance.server.responses.items import Item, items_of, messages_of
from appliance.server.responses.schemas import InputTokensRequest, ResponsesRequest
from appliance.server.responses.store import ResponseStore
from appliance.server.responses.view import ResponseView
from appliance.server.sampling import chat_params
from appliance.server.state import ServerState
from appliance.server.turn import Turn, begin


async def answer(state: ServerState, request_id: str, body: ResponsesRequest) -> Response:
    body.check()
    state.check_unknown(body)
    key, store = asker(), state.shared.responses
    given, messages = await conversation(store, key, body)
    turn = await _begin(state, request_id, body, messages)
    response_id = f"resp_{request_id}"
    if store.find(key, response_id) is not None:  # clients may send the same X-Request-Id twice
        response_id += f"_{uuid.uuid4().hex[:8]}"
    view = ResponseView(turn, body, response_id, given, key)
    if body.stream:
        return await stream(view.batches(), Form(_encoded, lambda error: _encoded(view.failed(error)), b"", ALIVE, QUIET_S))
    async with aclosing(view.batches()) as batches:
        *_, last = [batch[-1] async for batch in batches]
    return JSONResponse(last["response"])


async def count(state: ServerState, body: InputTokensRequest) -> dict[str, Any]:
    """As many tokens as a request with the same fields has; also of a prompt that is longer than the context."""
    body.check()
    state.check_unknown(body)
    _, messages = await conversation(state.shared.responses, asker(), body)
    chat = chat_request(body, messages)
    assert state.known  # or it is not to be served now
    try:
        chat.check()
        chat_params(chat, state.defaults, state.server_config.max_logprobs)  # refuses what an answer could not be made with
        choice = state.parsers.choice(chat)
        prompt = await chat_prompt(chat, state.tokenizer, sys.maxsize, list(choice.tools) or None)
    except RequestError as error:
        raise renamed(error, body) from None
    return {"object": "response.input_tokens", "input_tokens": len(prompt.token_ids)}


def asker() -> str | None:
    """The key of the request that is being answered: responses are its own."""
    return (current.get() or Ticket()).key


async def conversation(
    store: ResponseStore, key: str | None, body: InputTokensRequest
) -> tuple[list[Item], list[dict[str, Any]]]:
    """(the items that the body gives, the messages of all that it goes on with and of these). Raises RequestError."""
    records, known = store.chain(key, body.previous_response_id), store.lookup(key)

    def read() -> tuple[list[Item], list[dict[str, Any]]]:
        history = [item for record in records for item in record.items]
        given = items_of(body.input, known, history)
        return given, messages_of(body.instructions, [*history, *given])

    return await asyncio.to_thread(read)  # what is kept may be many thousands of items


async def _begin(state: ServerState, request_id: str, body: ResponsesRequest, messages: list[dict[str, Any]]) -> Turn:
    """``truncation`` "auto" leaves away what was said first, up to a message of the user, where it has to."""
    head = 1 if messages and messages[0]["role"] == "system" else 0

    async def attempt(start: int, *, clamp: bool) -> Turn | RequestError:
        try:
            chat = chat_request(body, messages[:head] + messages[max(start, head) :])
            return await begin(state, request_id, chat, "resp", clamp=clamp)
        except RequestError as error:
            if error.code != "context_length_exceeded":
                raise renamed(error, body) from None
            return renamed(error, body)

    auto = body.truncation == "auto"
    found = await attempt(0, clamp=not auto)
    if auto and isinstance(found, RequestError):
        starts = [i for i, message in enumerate(messages) if i > head and message["role"] == "user"] or [0]
        low, high = 0, len(starts) - 1
        while low <= high:  # the first of them that fits
            middle = (low + high) // 2
            if isinstance(turn := await attempt(starts[middle], clamp=False), Turn):
                found, high = turn, middle - 1
            else:
                low = middle + 1
        if isinstance(found, RequestError):
            found = await attempt(starts[-1], clamp=True)
    if isinstance(found, RequestError):
        raise found
    return found


def _encoded(events: list[Event]) -> bytes:
    return b"".join(named_event(event["type"], event) for event in events)
