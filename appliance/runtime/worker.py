"""The engine in a process of its own; appliance/runtime/client.py starts it and talks to it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

from appliance.core.messages import Abort, Event, LoadAdapter, Nudge, ResetPrefixCache, Submit, UnloadAdapter
from appliance.core.params import RequestError
from appliance.runtime.logs import send_lines
from appliance.runtime.pace import come_first
from quant.errors import InputError

log = logging.getLogger("appliance.worker")

STATS_INTERVAL = 0.2  # seconds between snapshots while steps run
QUIET_S = 0.5  # without a message: whoever has waited for this engine has asked by then


def serve(conn: Connection) -> None:
    """The engine process: load, then take messages and step until the pipe closes or None arrives."""
    config, level = conn.recv()
    send_lines(level)
    come_first()  # all threads begin later
    begun = time.perf_counter()
    from appliance.runtime.engine import Engine  # imports torch: seconds, and the client shall be told why it waits

    try:
        engine = Engine.load(config, _Progress(conn), import_s=time.perf_counter() - begun, alone=True)
    except Exception as error:  # of any library: the client tells it in a line
        log.debug("loading failed", exc_info=True)
        foreseen = isinstance(error, InputError | RuntimeError | MemoryError | OSError)
        text = str(error) if foreseen else f"{type(error).__name__}: {error}"
        conn.send(("failed", text or type(error).__name__, isinstance(error, InputError | OSError)))
        return
    conn.send(("ready", engine.info, engine.stats()))
    last, prepared, reading = time.monotonic(), config.skip_tokenizer_init, False
    while True:
        events: list[Event] = []
        try:
            if not (prepared or engine.has_work or conn.poll(QUIET_S)):  # there is nobody whom it would keep waiting
                conn.send(("reading", True))  # before it keeps this thread waiting
                engine.prepare()
                prepared = reading = True
            while conn.poll(0 if engine.has_work else None):
                message = conn.recv()
                if message is None:
                    return
                events += handle(engine, conn, message)
                if not engine.has_work:
                    break
            if engine.reading != reading:
                reading = not reading
                conn.send(("reading", reading))
            events += engine.step()
        except EOFError:
            return
        except Exception as error:
            conn.send(("failed", f"the engine failed: {type(error).__name__}: {error}", False))
            raise
        now = time.monotonic()
        fresh = now - last >= STATS_INTERVAL or not engine.has_work
        last = now if fresh else last
        conn.send(("events", events, engine.stats() if fresh else None))


def handle(
    engine: Any, conn: Connection, message: Submit | Abort | ResetPrefixCache | Nudge | LoadAdapter | UnloadAdapter
) -> list[Event]:
    """Take one message; a refusal goes straight back to the client that waits for it."""
    if isinstance(message, Abort):
        return engine.abort(message.request_id, message.index, message.reason)
    if isinstance(message, Nudge):  # what is said after each step will do
        return []
    if isinstance(message, ResetPrefixCache):
        engine.reset_prefix_cache()
        return []
    if isinstance(message, LoadAdapter | UnloadAdapter):
        conn.send(("adapter", _adapter(engine, message)))
        return []
    try:
        engine.submit(message)
    except RequestError as error:
        conn.send(("refused", message.request_id, str(error), error.param, error.code, error.status))
    return []


def _adapter(engine: Any, message: LoadAdapter | UnloadAdapter) -> str | None:
    """What is wrong with it, where it cannot be done."""
    try:
        if isinstance(message, LoadAdapter):
            engine.adapters.load(message.name, message.path, replace=message.replace)
        else:
            engine.adapters.unload(message.name)
    except (InputError, OSError) as error:
        return str(error)
    return None


class _Progress:
    """Reports loading at most ten times a second."""

    def __init__(self, conn: Connection) -> None:
        self.conn, self.last = conn, 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last >= 0.1 or done >= total:
            self.last = now
            self.conn.send(("loading", done, total))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches the whole group; the server decides when the engine ends
    try:
        serve(Connection(int(sys.argv[1])))
    except (BrokenPipeError, ConnectionResetError):
        log.warning("the server is gone; the engine ends")
    except Exception:
        log.exception("the engine process ends")
        os._exit(1)  # now: requests shall not be sent to one that is being taken down
    os._exit(0)  # nothing to save, and torch's own teardown takes a good part of a second


if __name__ == "__main__":
    main()
