"""Long answers are written in pieces, and what all chunks of a stream have in common once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from appliance.server.beside import Pace
from appliance.server.errors import as_json

PIECE = 256 * 1024  # bytes of an answer that are sent at once


class PiecedResponse(Response):
    """JSON in the pieces that make it up: one of tens of megabytes is never there in one, and others run while it is sent."""

    media_type = "application/json"

    def __init__(self, pieces: Iterable[bytes]) -> None:
        super().__init__()
        self._pieces = [*pieces]
        self.headers["content-length"] = str(sum(map(len, self._pieces)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        size, some, pace = 0, list[bytes](), Pace()
        for piece in self._pieces:
            some.append(piece)
            if (size := size + len(piece)) >= PIECE:
                await send({"type": "http.response.body", "body": b"".join(some), "more_body": True})
                await pace()
                size, some = 0, []
        await send({"type": "http.response.body", "body": b"".join(some)})


def pieces(value: Any) -> Iterator[bytes]:
    """JSON of dicts and lists that may hold bytes: these are JSON already, within a list of one or more values."""
    if isinstance(value, dict):
        for k, (name, one) in enumerate(value.items()):
            yield b"%b%b:" % (b"," if k else b"{", to_json(name))
            yield from pieces(one)
        yield b"}" if value else b"{}"
    elif isinstance(value, list) and value and isinstance(value[0], bytes | dict):
        for k, one in enumerate(value):
            yield b"," if k else b"["
            yield from pieces(one)
        yield b"]"
    else:
        yield value if isinstance(value, bytes) else as_json(value)


def spliced(value: Any) -> bytes:
    """Its ``pieces`` in one."""
    return b"".join(pieces(value))


class Chunks:
    """Makes the chunks of a stream, of which all but the choice is the same: that is written once."""

    def __init__(self, base: Mapping[str, Any]) -> None:
        self._head = as_json(base)[:-1] + b',"choices":['

    def __call__(self, choice: dict[str, Any] | None, **more: Any) -> bytes:
        """JSON. ``choice`` None: there is none. ``more``: fields behind it."""
        one = b"" if choice is None else as_json(choice) if choice["logprobs"] is None else spliced(choice)
        return b"%b%b]%b" % (self._head, one, b"," + as_json(more)[1:] if more else b"}")
