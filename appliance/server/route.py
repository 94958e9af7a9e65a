"""What every route asks first: the server's state, the id of the request, and the state of the model it is for."""

from __future__ import annotations

from fastapi import Request

from appliance.server.state import ServerState


def state_of(request: Request) -> ServerState:
    return request.app.state.server


def request_id(request: Request, asked: str | None = None) -> str:
    """The X-Request-Id header, else the body's request_id, else the one that was made up."""
    ids = request.scope["state"]
    if asked is not None and not ids["request_id_given"] and usable(asked):
        ids["request_id"] = asked
    return ids["request_id"]


def usable(name: str) -> bool:
    """Whether a client's own id may stand in headers and logs."""
    return 0 < len(name) <= 128 and name.isascii() and name.isprintable()


async def serving(request: Request, model: str | None) -> ServerState:
    """The state of the model of that name, or of the only one. Raises RequestError (404) where there is none of that name."""
    state = state_of(request)
    state.check_model(model)
    return state
