"""The HTTP application: routes, request ids, errors. It knows nothing of how the engine runs."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from appliance.config import EngineConfig, ServerConfig
from appliance.runtime.client import EngineDied
from appliance.server import catalog, chat, completions, embeddings, info, logs, lora, openapi
from appliance.server.errors import EngineFailed, JSONResponse, about, error_body, error_response, failure, speaks_anthropic
from appliance.server.guard import Guard
from appliance.server.habits import Habits, methods, unserved
from appliance.server.hosts import FixedHost
from appliance.server.messages import router as messages
from appliance.server.pages import Cors
from appliance.server.respond import read, while_connected
from appliance.server.responses import router as responses
from appliance.server.route import reading, request_id, serving, usable
from appliance.server.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    PromptFields,
    TokenizeRequest,
)
from appliance.server.site import Site
from appliance.server.state import EngineClient, ServerState
from appliance.server.tokens import detokenize_answer, tokenize_answer, tokenizer_info
from appliance.text.tokenizer import Tokenizer
from appliance.web import pages
from quant.errors import InputError

RATES = [f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in ("requests", "tokens")]
EXPOSED = ["X-Request-Id", "request-id", "Retry-After", *RATES]  # headers that pages of other origins may read

router = APIRouter()

Prompted = TypeVar("Prompted", bound=PromptFields)


def create_app(
    client: EngineClient, tokenizer: Tokenizer | None, engine_config: EngineConfig, server_config: ServerConfig
) -> FastAPI:
    """The application over an engine's client, which may still be loading. ``engine_config.model`` is a local directory.

    Its ``state.server`` is the ServerState. Raises InputError for a bad generation_config.json, key file or audit log.
    """
    state = ServerState(client, tokenizer, engine_config, server_config)
    site = Site([FixedHost(state)], state.shared)
    site.starting = False
    return app_of(site, state)


def app_of(site: Site, state: ServerState) -> FastAPI:
    """The application over the models of a site; ``state`` is that of the first one."""
    # Habits takes slashes away: to send a client after one is to send it in circles.
    app = FastAPI(title="appliance", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.server, app.state.site, server_config = state, site, state.server_config
    app.include_router(catalog.router)
    app.include_router(info.router)
    app.include_router(logs.router)
    app.include_router(lora.router)
    app.include_router(messages.router)
    app.include_router(openapi.router)
    app.include_router(responses.router)
    app.include_router(router)
    if server_config.web_ui:
        app.router.routes.extend(pages.ROUTES)
    app.add_middleware(Guard, state=state)
    if server_config.allowed_origins:  # outside of the guard: browsers ask for leave without a key
        app.add_middleware(
            Cors,
            allow_origins=server_config.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=EXPOSED,
        )
    app.add_middleware(RequestIds)
    app.add_middleware(Habits)
    for kind in (InputError, EngineDied, EngineFailed):
        app.add_exception_handler(kind, _on_error)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(RequestValidationError, _on_http)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    return app


@router.post("/v1/completions")
async def post_completions(request: Request) -> Response:
    body = await read(request, CompletionRequest)
    return await while_connected(request, _answer(request, body, completions.answer))


@router.post("/v1/chat/completions")
async def post_chat(request: Request) -> Response:
    body = await read(request, ChatRequest)
    return await while_connected(request, _answer(request, body, chat.answer))


@router.post("/v1/embeddings")
async def post_embeddings(request: Request) -> Response:
    body = await read(request, EmbeddingRequest)
    return await while_connected(request, _answer(request, body, embeddings.answer))


async def _answer(
    request: Request, body: Prompted, answer: Callable[[ServerState, str, Prompted], Awaitable[Response]]
) -> Response:
    name = request_id(request, body.request_id)  # by which it can be aborted while it waits for its model
    return await answer(await serving(request, body.model), name, body)


@router.post("/tokenize")
async def post_tokenize(request: Request) -> Response:
    body = await read(request, TokenizeRequest)
    return JSONResponse(await tokenize_answer(await reading(request, body.model), body))


@router.post("/detokenize")
async def post_detokenize(request: Request) -> Response:
    body = await read(request, DetokenizeRequest)
    return JSONResponse(await detokenize_answer(await reading(request, body.model), body))


@router.get("/tokenizer_info")
async def get_tokenizer_info(request: Request, model: str | None = None) -> Response:
    return JSONResponse(await asyncio.to_thread(tokenizer_info, await reading(request, model)))


class RequestIds:
    """Gives every request an id (its X-Request-Id where it brings a usable one) and returns it as a header, also of a 500."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = next((v.decode("latin-1") for k, v in scope["headers"] if k == b"x-request-id"), "")
        ids = scope.setdefault("state", {})
        about.set(ids)
        ids["request_id_given"] = usable(given)
        ids["request_id"] = given if usable(given) else uuid.uuid4().hex

        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                for name in ("X-Request-Id", *(["request-id"] if speaks_anthropic(scope) else [])):
                    MutableHeaders(scope=message)[name] = ids["request_id"]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            if started:
                raise
            await error_response(error, scope)(scope, receive, send_with_id)


async def _on_error(request: Request, error: Exception) -> Response:
    return error_response(error, request.scope)


async def _on_http(request: Request, error: Exception) -> Response:
    """Unknown routes and wrong methods, in the same JSON form as everything else."""
    if not isinstance(error, HTTPException):
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]  # of a query: bodies are read by hand
        name = str(first["loc"][-1])
        message = f"{name}: {first['msg']}, got {first.get('input')!r:.80}"
        return JSONResponse(error_body(message, status=400, param=name, code="invalid_type"), status_code=400)
    where = f"{request.method} {request.url.path}"
    message, code = {
        404: (f"there is no route {where}: {unserved(request.url.path)}", "not_found"),
        405: (f"the method is not allowed here: {where}", "method_not_allowed"),
    }.get(error.status_code, (str(error.detail), None))
    body = error_body(message, status=error.status_code, code=code)
    headers = (
        {"Allow": ", ".join(sorted(methods(request.app.routes, request.scope)))} if error.status_code == 405 else error.headers
    )
    return failure(error.status_code, body, request.scope, headers)


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=499)
