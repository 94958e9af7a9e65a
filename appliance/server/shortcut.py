"""From the engine's news to the client's socket in one call, for the many tokens about which there is nothing special."""

from __future__ import annotations

from collections.abc import Callable

from appliance.core.messages import Event
from appliance.server.respond import sse
from appliance.text.output import Delta


class Shortcut:
    """Of a job with one completion that is streamed: no task is woken and no generator goes on for a token, most of the work.

    The task that streams begins and ends the answer, and takes all that is out of the ordinary: the end, errors, what a slow
    client has to wait for. It never waits with a piece in its hands when the job waits for news, so nothing is overtaken.
    """

    def __init__(self, chunk: Callable[[Delta], bytes | None]) -> None:
        """``chunk``: what the stream's next event tells (JSON), or None where there is nothing to tell."""
        self._chunk = chunk
        self.write: Callable[[bytes], bool] | None = None  # to the client, once the answer has begun; False: it has to wait

    def takes(self, event: Event) -> bool:
        return self.write is not None and event.finish_reason is None and self.write(b"")  # the client reads

    def send(self, delta: Delta) -> None:
        assert self.write is not None
        if (data := self._chunk(delta)) is not None:
            self.write(sse(data))
