"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them: where --allow-runtime-lora-updating lets them."""

from __future__ import annotations

import contextlib
import logging
import os

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from appliance.adapters import NAME
from appliance.core.params import RequestError
from appliance.runtime.client import EngineDied
from appliance.server.guard import Ticket, current
from appliance.server.hosts import Host
from appliance.server.redact import line
from appliance.server.respond import read
from appliance.server.route import site_of, state_of, staying
from appliance.server.schemas import LoadAdapterRequest, UnloadAdapterRequest
from appliance.server.site import Site

log = logging.getLogger("appliance.server")

router = APIRouter()


@router.post("/v1/load_lora_adapter")
async def load_adapter(request: Request) -> Response:
    """Load an adapter from a directory of this machine; answers when requests can ask for it."""
    _check_allowed(request)
    body = await read(request, LoadAdapterRequest)
    name, path = body.lora_name, _directory(body.lora_path)
    if not NAME.fullmatch(name):
        raise RequestError(f"lora_name is {name!r:.80}: printable ASCII without spaces is needed", param="lora_name")
    (current.get() or Ticket()).model = name  # as the logs have it
    async with (site := site_of(request)).adapting:
        host = _host(site, name, body)
        state = await staying(host)
        await state.client.load_adapter(name, path, replace=body.load_inplace)
        host.adapters.paths[name] = path
    log.info("%s: the adapter %s is loaded from %s", host.names[0], name, line(path))
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post("/v1/unload_lora_adapter")
async def unload_adapter(request: Request) -> Response:
    """Let no more requests ask for an adapter; those that have it go on to their end."""
    _check_allowed(request)
    body = await read(request, UnloadAdapterRequest)
    name = body.lora_name
    async with (site := site_of(request)).adapting:
        host = next((host for host in site.hosts if name in host.adapters.paths), None)
        if host is None:
            raise RequestError(f"There is no LoRA adapter `{name:.200}`.", param="lora_name", code="model_not_found", status=404)
        (current.get() or Ticket()).model = name
        if host.status == "unloaded":  # and its next engine does not get it
            del host.adapters.paths[name]
        else:
            state = await staying(host)
            del host.adapters.paths[name]
            with contextlib.suppress(EngineDied):  # the same
                await state.client.unload_adapter(name)
    log.info("%s: the adapter %s is unloaded", host.names[0], name)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def _check_allowed(request: Request) -> None:
    if not state_of(request).server_config.allow_runtime_lora_updating:
        message = f"adapters are loaded at start alone (--lora-modules): --allow-runtime-lora-updating opens {request.url.path}"
        raise RequestError(message, code="not_found", status=404)


def _directory(path: str) -> str:
    """Never a name on the hub: whoever may ask shall not have the server download. Raises RequestError."""
    if not os.path.isdir(path):
        message = f"lora_path is {path!r:.200}: there is no such directory on the server's machine"
        raise RequestError(message, param="lora_path")
    return os.path.abspath(path)


def _host(site: Site, name: str, body: LoadAdapterRequest) -> Host:
    """The model that the adapter is for: the one that is named, else the one that has it, else the first that takes any."""
    if any(name in host.names for host in site.hosts):
        raise RequestError(f"lora_name is {name!r}, which is a model's name: give the adapter another one", param="lora_name")
    owner = next((host for host in site.hosts if name in host.adapters.paths), None)
    if owner is not None and not body.load_inplace:
        message = f"The LoRA adapter `{name}` is loaded already: load_inplace true loads it anew"
        raise RequestError(message, param="lora_name")
    if body.model:
        named = site.find(body.model)
        if owner not in (None, named):
            raise RequestError(f"lora_name is {name!r}, which is an adapter of another model", param="lora_name")
        return named
    taking = (host for host in site.hosts if host.adapters.taken)
    return owner or next(taking, site.hosts[0])
