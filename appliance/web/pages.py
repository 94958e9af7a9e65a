"""The built-in web page: a few files out of the package, sent with headers that let it do nothing but talk to its own server."""

from __future__ import annotations

import hashlib
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

MEDIA = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}

# What the page may do: run its own scripts and styles, show its own icon, talk to its own server. Nothing else, nowhere else.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # the browser itself refuses text that would become markup
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, but asked for anew: another version of the server has another page
}


class _File:
    """One file of the page, read once."""

    def __init__(self, name: str, content: bytes) -> None:
        self.content = content
        media = f"{MEDIA[name.rpartition('.')[2]]}; charset=utf-8"
        self.headers = HEADERS | {"Content-Type": media, "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'}

    async def __call__(self, request: Request) -> Response:
        known = request.headers.get("if-none-match", "")
        if self.headers["ETag"] in known:
            return Response(status_code=304, headers=self.headers)
        return Response(self.content, headers=self.headers)


def _load() -> dict[str, _File]:
    """Path -> file. There are no other paths, whatever a request asks for."""
    static = files("appliance.web") / "static"
    found = {entry.name: _File(entry.name, entry.read_bytes()) for entry in static.iterdir() if entry.is_file()}
    paths = {"/": found.pop("index.html"), "/favicon.ico": found["icon.svg"]}  # browsers ask for that one on their own
    return paths | {f"/ui/{name}": file for name, file in sorted(found.items())}


_FILES = _load()
PATHS = frozenset(_FILES)  # what needs no key: there is nobody's data in it
ROUTES = [Route(path, file.__call__, methods=["GET"]) for path, file in _FILES.items()]  # HEAD comes with GET
