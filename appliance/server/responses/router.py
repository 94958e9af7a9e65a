"""The routes of OpenAI's Responses API: its requests become chat requests, the answers of those are told as items and events."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.datastructures import QueryParams
from starlette.responses import Response

from appliance.core.params import RequestError
from appliance.server.errors import JSONResponse
from appliance.server.respond import read, while_connected
from appliance.server.responses import answer
from appliance.server.responses.schemas import InputTokensRequest, ResponsesRequest
from appliance.server.responses.store import ResponseStore
from appliance.server.route import reading, request_id, serving, state_of

router = APIRouter()


def store_of(request: Request) -> ResponseStore:
    return state_of(request).shared.responses


@router.post("/v1/responses")
async def create(request: Request) -> Response:
    body = await read(request, ResponsesRequest)
    return await while_connected(request, _create(request, body))


async def _create(request: Request, body: ResponsesRequest) -> Response:
    name = request_id(request, body.request_id)
    return await answer.answer(await serving(request, body.model), name, body)


@router.post("/v1/responses/input_tokens")
async def input_tokens(request: Request) -> Response:
    body = await read(request, InputTokensRequest)
    return JSONResponse(await answer.count(await reading(request, body.model), body))


@router.get("/v1/responses/{response_id}")
async def retrieve(request: Request, response_id: str) -> Response:
    given = request.query_params.get("stream", "false")
    if given not in ("true", "1", "false", "0"):
        raise RequestError(f"stream is true or false, got {given!r:.40}", param="stream")
    if given in ("true", "1"):
        message = "stream: a stream cannot be had a second time: leave it out, the whole response is kept"
        raise RequestError(message, param="stream", code="unsupported_parameter")
    return JSONResponse(store_of(request).get(answer.asker(), response_id).response)


@router.delete("/v1/responses/{response_id}")
async def delete(request: Request, response_id: str) -> Response:
    store_of(request).delete(answer.asker(), response_id)
    return JSONResponse({"id": response_id, "object": "response", "deleted": True})


@router.post("/v1/responses/{response_id}/cancel")
async def cancel(request: Request, response_id: str) -> Response:
    """End a response that is under way: its stream ends with what there is."""
    record = store_of(request).get(answer.asker(), response_id)
    if record.job is None:
        raise RequestError(f"the response {response_id!r} has ended already", param="response_id")
    record.job.abort()
    return JSONResponse({**record.response, "status": "cancelled"})


@router.get("/v1/responses/{response_id}/input_items")
async def input_items(request: Request, response_id: str) -> Response:
    """A page of the items that a response was made of, those of the responses before it included; the newest first."""
    records = store_of(request).chain(answer.asker(), store_of(request).get(answer.asker(), response_id).id)
    limit, order, after = _page(request.query_params)
    items = await asyncio.to_thread(lambda: [one for record in records[:-1] for one in record.items] + records[-1].input)
    if order == "desc":
        items.reverse()
    begin = next((i + 1 for i, item in enumerate(items) if item["id"] == after), None) if after else 0
    if begin is None:
        raise RequestError(f"after is {after!r:.80}: there is no such item", param="after")
    page: list[dict[str, Any]] = items[begin : begin + limit]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": "", "last_id": ""}
    return JSONResponse({"object": "list", "data": page, **ends, "has_more": begin + limit < len(items)})


def _page(query: QueryParams) -> tuple[int, str, str | None]:
    """limit, order, after. Raises RequestError."""
    given, order = query.get("limit", "20"), query.get("order", "desc")
    if not (given.isascii() and given.isdigit() and 1 <= int(given) <= 100):
        raise RequestError(f"limit is 1 to 100, got {given!r:.40}", param="limit")
    if order not in ("asc", "desc"):
        raise RequestError(f"order is 'asc' or 'desc', got {order!r:.40}", param="order")
    return int(given), order, query.get("after")
