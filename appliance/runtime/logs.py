"""The engine process's log lines on their way to the server: records as JSON on its stderr, among whatever else is written there.

Its stderr, and not the socket pair: any thread may log at any time, and what a dying process says last comes through as well.
"""

from __future__ import annotations

import json
import logging
from typing import IO

MARK = b"\x1e{"  # a record's line begins so; others are those of libraries, and of Python's own tracebacks
LONGEST = 65_536  # bytes of a line that are taken at once

log = logging.getLogger("appliance.engine.stderr")


class _Line(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        known = {"name": record.name, "levelno": record.levelno, "levelname": record.levelname, "created": record.created}
        trace = self.formatException(record.exc_info) if record.exc_info else None
        return "\x1e" + json.dumps({**known, "msg": record.getMessage(), "exc_text": trace})


def send_lines(level: int) -> None:
    """In the engine process: what is logged goes to the server, which writes it as it writes its own."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Line())
    logging.basicConfig(level=level, handlers=[handler])


def take_lines(stream: IO[bytes]) -> None:
    """In a thread of the server: hand everything on to the loggers here, until the engine process has ended."""
    with stream:
        while raw := stream.readline(LONGEST):
            take_line(raw)


def take_line(raw: bytes) -> None:
    if raw.startswith(MARK):
        try:
            record = logging.makeLogRecord({**json.loads(raw[1:]), "keyless": True})  # the engine is told of no keys
            logging.getLogger(record.name).handle(record)
            return
        except (ValueError, TypeError, AttributeError):
            pass  # another thread wrote into it, or it is too long
    if text := raw.decode(errors="replace").rstrip():
        log.warning("%s", text)
