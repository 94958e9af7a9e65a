"""What a client is told that speaks plain HTTP to a port of HTTPS: without it, all it sees is a connection that closes."""

from __future__ import annotations

import ssl
from functools import partial
from typing import Any

from pydantic_core import to_json

from appliance.server.errors import error_body

_BODY = to_json(error_body("this port speaks HTTPS: the address has to begin with https://", status=400))
_ANSWER = b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(
    _BODY
)


class _Handshake(ssl.SSLObject):
    """Whose first answer goes to ``outgoing`` unencrypted where OpenSSL knows what came for HTTP; then it waits for the end."""

    outgoing: ssl.MemoryBIO | None = None

    def do_handshake(self) -> None:
        try:
            super().do_handshake()
        except ssl.SSLError as error:
            if error.reason != "HTTP_REQUEST" or self.outgoing is None:
                raise
            self.outgoing.read()  # an alert, which is no HTTP
            self.outgoing.write(_ANSWER + _BODY)
            self.outgoing = None
            raise ssl.SSLWantReadError from None  # for which the event loop sends what is there


def answer_plain_http(context: ssl.SSLContext) -> None:
    """Have connections of a server's ``context`` answer clients that do not encrypt."""
    context.sslobject_class = _Handshake
    context.wrap_bio = partial(_wrapped, context)  # type: ignore[method-assign]


def _wrapped(context: ssl.SSLContext, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, **more: Any) -> ssl.SSLObject:
    made = ssl.SSLContext.wrap_bio(context, incoming, outgoing, **more)
    assert isinstance(made, _Handshake)
    made.outgoing = outgoing
    return made
