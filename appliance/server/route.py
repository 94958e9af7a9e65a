"""What every route asks first: the server's state, the id of the request, and the state of the model it is for."""

from __future__ import annotations

from fastapi import Request

from appliance.server.guard import Ticket, current
from appliance.server.hosts import Host
from appliance.server.redact import has_key
from appliance.server.site import Site
from appliance.server.state import ServerState


def site_of(request: Request) -> Site:
    """All models of the server."""
    return request.app.state.site


def state_of(request: Request) -> ServerState:
    """The first model, and what the server itself has."""
    return request.app.state.server


def request_id(request: Request, asked: str | None = None) -> str:
    """The X-Request-Id header, else the body's request_id, else the one that was made up."""
    ids = request.scope["state"]
    if asked is not None and not ids["request_id_given"] and usable(asked):
        ids["request_id"] = asked
    return ids["request_id"]


def usable(name: str) -> bool:
    """Whether a client's own id may stand in headers and logs."""
    return 0 < len(name) <= 128 and name.isascii() and name.isprintable() and not has_key(name)


def asked(request: Request, model: str | None) -> Host:
    """The model of that name, of which the request is from now on, as the logs have it. Raises RequestError (404)."""
    host = site_of(request).find(model)
    (current.get() or Ticket()).model = model or host.names[0]
    return host


async def serving(request: Request, model: str | None) -> ServerState:
    """The state of the model of that name, of the first one where none is named; it stays loaded until the request is answered.

    Raises RequestError: 404 where there is none of that name, 503 where it cannot be served now.
    """
    return await staying(asked(request, model))


async def staying(host: Host) -> ServerState:
    """As ``serving``, of a model that is found already."""
    visitor = object()
    state = await host.enter(visitor)
    (current.get() or Ticket()).held.callback(host.leave, visitor)
    return state


async def reading(request: Request, model: str | None) -> ServerState:
    """As ``serving``, for what needs the model's tokenizer alone: nothing is loaded for it, and nothing stays loaded."""
    return await asked(request, model).read()
