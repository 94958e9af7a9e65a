"""Web pages of other places, where nobody is asked for a key: they may not use a server that their reader's machine reaches."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import Scope

from appliance.core.params import RequestError
from appliance.server.errors import JSONResponse, error_body

READS = ("GET", "HEAD", "OPTIONS")
LOCAL = (
    "localhost",
    "local",
    "internal",
    "lan",
    "home.arpa",
    "test",
)  # no public name ends so


class Pages:
    """What is asked of requests that need no key. Two tricks of pages are known:

    - DNS rebinding: a page's own name is made to mean 127.0.0.1, so that the server seems to be where the page came from, and the
      browser lets it read answers. Such a request has that name as its Host, and no local one.
    - Sending without being allowed to read the answer: plain POSTs need no leave. Browsers tell it (Sec-Fetch-Site).

    A server that only a proxy reaches, under the proxy's name, has ``--allowed-origins`` for that, ``--insecure``, or keys.
    """

    def __init__(self, host: str, allowed_origins: Iterable[str]) -> None:
        self._origins = frozenset(origin.rstrip("/").lower() for origin in allowed_origins)
        names = {urlsplit(origin).hostname for origin in self._origins} | {host, socket.gethostname()}
        self._names = {name.lower() for name in names if name}

    def check(self, scope: Scope) -> None:
        """Raises RequestError (403)."""
        if "*" in self._origins:
            return
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if not self._ours(host):
            message = (
                f"this server is asked by the name {host[:200]!r}, which may be any page's: ask it by its address, name it in "
                f"--allowed-origins http://{host[:200]}, or give it keys (--api-key)"
            )
            raise RequestError(message, code="host_not_allowed", status=403)
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        foreign = headers.get(b"sec-fetch-site") == b"cross-site" and origin not in self._origins
        if foreign and scope["method"] not in READS:
            message = f"pages of {origin[:200] or 'other places'} may not use this server: --allowed-origins lets those of one in"
            raise RequestError(message, code="origin_not_allowed", status=403)

    def _ours(self, host: str) -> bool:
        """Whether a Host header is an address, or a name that no page of elsewhere can have. Without one there is no browser."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        if "." not in name or name in self._names or name.endswith(tuple(f".{end}" for end in LOCAL)):
            return True  # names without a dot are the local network's
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


class Cors(CORSMiddleware):
    """Starlette's, but that its refusal is JSON as all others are."""

    def preflight_response(self, request_headers: Headers) -> Response:
        found = super().preflight_response(request_headers)
        if found.status_code < 400:
            return found
        refused = bytes(found.body).decode().removeprefix("Disallowed CORS ")
        message = f"pages of {request_headers['origin'][:200]} may not ask so ({refused}): --allowed-origins lets those of one in"
        code = "origin_not_allowed" if "origin" in refused else None
        headers = {name: value for name, value in found.headers.items() if not name.startswith("content-")}
        return JSONResponse(error_body(message, status=found.status_code, code=code), found.status_code, headers)
