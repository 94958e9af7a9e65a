"""Routes that ask about the server: version, metrics, stats; and those that end what runs."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from appliance.core.params import RequestError
from appliance.server.errors import JSONResponse
from appliance.server.guard import Ticket, current
from appliance.server.route import site_of, state_of
from appliance.server.scrape import Model
from appliance.server.stats import absent_body, models_of, stats_body

router = APIRouter()


@router.get("/ping")
async def ping() -> Response:
    """Says that the process answers, whatever the engine does."""
    return JSONResponse({"status": "ok"})


@router.get("/version")
async def version(request: Request) -> Response:
    return JSONResponse({"version": state_of(request).version})


@router.get("/load")
async def load(request: Request) -> Response:
    return JSONResponse({"server_load": len(state_of(request).jobs)})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    shared = state_of(request).shared
    lost = shared.audit.lost if shared.audit else 0
    text = shared.scrape.text([await Model.of(one) for one in shared.states], await shared.hardware.latest(), audit_lost=lost)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/stats")
async def stats(request: Request, model: str | None = None) -> Response:
    """All that the dashboard shows of one model, the first one where none is named, in one object."""
    site = site_of(request)
    host = site.find(model)
    body = await stats_body(host.state) if host.state else absent_body(site, host)
    return JSONResponse({**body, "models": models_of(site)})


@router.post("/reset_prefix_cache")
async def reset_prefix_cache(request: Request, model: str | None = None) -> Response:
    """Requests that come from now on find nothing of what was computed before; of a model that is not loaded nothing is kept."""
    host = site_of(request).find(model)
    if host.status == "ok" and host.state:
        host.state.client.reset_prefix_cache()
    elif host.status != "unloaded":
        raise (host.state or state_of(request)).refusal()
    return JSONResponse({"success": True})


@router.delete("/v1/requests/{request_id:path}")
async def abort(request: Request, request_id: str) -> Response:
    """Abort a request by its X-Request-Id, or by the id of its answer. Each key sees its own requests alone."""
    shared, asker = state_of(request).shared, current.get() or Ticket()
    jobs = [job for job in shared.jobs if request_id in (job.id, job.request_id) and job.ticket.key == asker.key]
    asked = [one for one in shared.asked if one.ids["request_id"] == request_id and one.ticket.key == asker.key]
    waiting = [one for one in asked if not one.ticket.jobs]
    if not jobs and not waiting:
        message = f"no running request has the id {request_id!r}"
        raise RequestError(message, param="request_id", code="request_not_found", status=404)
    for abort_it in (*(job.abort for job in jobs), *(one.abort for one in waiting)):
        abort_it()
    return JSONResponse({"id": request_id, "object": "request", "aborted": True})
