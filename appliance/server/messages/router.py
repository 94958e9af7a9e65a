"""Anthropic's Messages API: its requests made into chat requests, the answers of those told in its words."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from appliance.server.errors import JSONResponse
from appliance.server.messages import answer
from appliance.server.messages.schemas import CountRequest, MessagesRequest
from appliance.server.respond import read, while_connected
from appliance.server.route import reading, request_id, serving

router = APIRouter()


@router.post("/v1/messages")
async def post_messages(request: Request) -> Response:
    body = await read(request, MessagesRequest)
    return await while_connected(request, _messages(request, body))


async def _messages(request: Request, body: MessagesRequest) -> Response:
    asked = (body.model_extra or {}).get("request_id")
    name = request_id(request, asked if isinstance(asked, str) else None)
    return await answer.answer(await serving(request, body.model), name, body)


@router.post("/v1/messages/count_tokens")
async def post_count_tokens(request: Request) -> Response:
    body = await read(request, CountRequest)
    return JSONResponse(await answer.count(await reading(request, body.model), body))
