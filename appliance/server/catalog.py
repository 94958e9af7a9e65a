"""Routes about the server's models: which there are, whether they can be used, and loading and unloading them by hand."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from appliance.core.params import RequestError
from appliance.server.errors import RETRY_AFTER_S, JSONResponse, error_body, speaks_anthropic, unavailable
from appliance.server.host import EngineHost
from appliance.server.hosts import Host
from appliance.server.messages.models import model_info, models_page
from appliance.server.respond import read
from appliance.server.route import asked, site_of, state_of
from appliance.server.schemas import ModelRequest
from appliance.server.site import Site

router = APIRouter()


def _card(site: Site, host: Host, name: str) -> dict[str, Any]:
    """Of the model under one of its names, or of an adapter of it."""
    adapter = host.adapters.paths.get(name)
    return {
        "id": name,
        "object": "model",
        "created": int(site.shared.begun),
        "owned_by": "appliance",
        "root": adapter or host.root,
        "parent": host.names[0] if adapter else None,
        "max_model_len": host.max_model_len,
        "status": host.status,
        "permission": [],
    }


@router.get("/v1/models")
async def models(request: Request) -> Response:
    site = site_of(request)
    cards = [_card(site, host, name) for host in site.hosts for name in (*host.names, *host.adapters.paths)]
    return JSONResponse(models_page(cards) if speaks_anthropic(request.scope) else {"object": "list", "data": cards})


@router.get("/health")
@router.get("/v1/health")
@router.get("/ready")
async def health(request: Request) -> Response:
    """200 when requests are served, else 503; never waits for an engine process."""
    site, state = site_of(request), state_of(request)
    for one in site.shared.states:  # what comes of it is told from the next time on
        one.client.nudge()
    status = "stuck" if site.status == "ok" and site.stuck else site.status
    if status == "ok":
        return JSONResponse({"status": "ok"})
    error = unavailable("the engine answers nothing", "engine_stuck") if status == "stuck" else state.refusal()
    body = {"status": status, **error_body(str(error), status=503, code=error.code)}
    if status == "loading":
        body["loaded_bytes"], body["total_bytes"] = state.client.loading
    return JSONResponse(body, status_code=503, headers={"Retry-After": str(RETRY_AFTER_S[503])})


@router.post("/v1/models/load")
async def load_model(request: Request) -> Response:
    """Load a model, once others have made room for it; answers when it is loaded."""
    body = await read(request, ModelRequest)
    host = _own(request, body.model)
    await host.come()
    return JSONResponse({"success": True, "model": host.names[0], "status": host.status})


@router.post("/v1/models/unload")
async def unload_model(request: Request) -> Response:
    """Unload a model as soon as its requests are answered; the next request for it loads it again."""
    body = await read(request, ModelRequest)
    site = site_of(request)
    if body.model in site.find(body.model).adapters.paths:
        raise RequestError(f"{body.model!r} is an adapter: POST /v1/unload_lora_adapter unloads it alone", param="model")
    host = _own(request, body.model)
    await asyncio.shield(asyncio.ensure_future(site.send_away(host, wait=True)))
    return JSONResponse({"success": True, "model": host.names[0], "status": host.status})


@router.get("/v1/models/{model:path}")
async def model(request: Request, model: str) -> Response:
    """Behind the two above: of a method that none of them has, the first one's are told."""
    site = site_of(request)
    card = _card(site, site.find(model or "(none)"), model)
    return JSONResponse(model_info(card) if speaks_anthropic(request.scope) else card)


def _own(request: Request, name: str) -> EngineHost:
    host = asked(request, name)
    if not isinstance(host, EngineHost):
        raise RequestError(f"the engine of {name!r} is not this server's to load or unload", param="model")
    return host
