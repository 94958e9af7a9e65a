"""The server's log: text or JSON lines, ids of requests, no keys; and GET /logs, the latest lines for the dashboard."""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

from fastapi import APIRouter
from starlette.responses import Response

from appliance.config import ServerConfig
from appliance.server.errors import JSONResponse, about
from appliance.server.redact import hide
from quant.errors import InputError

LEVELS, FORMATS = ("debug", "info", "warning", "error"), ("text", "json")
NOISY = ("uvicorn", "httpx", "httpx2", "huggingface_hub", "filelock")  # told at debug alone
KEPT, LONGEST = 500, 8000  # latest lines, characters of each
WAITING = 10_000  # lines that wait for whoever reads stderr

log = logging.getLogger("appliance.server")
requests_log = logging.getLogger("appliance.requests")
router = APIRouter()


def request_id() -> str | None:
    return (about.get() or {}).get("request_id")


def clean(record: logging.LogRecord, text: str) -> str:
    """Without keys. Lines of requests, and the engine's, are made of what has none: to look for them costs more than the rest."""
    return text if record.name == requests_log.name or getattr(record, "keyless", False) else hide(text)


class Text(logging.Formatter):
    """``2026-11-21 12:00:00.123 INFO appliance.server: message [request id]``, with a traceback below it."""

    default_msec_format = "%s.%03d"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return clean(record, super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        return f"{line} [{name}]" if (name := request_id()) else line


class Json(logging.Formatter):
    """An object a line: time, level, logger, message; request_id, exception and the record's ``fields``, where there are such."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": clean(record, record.getMessage()),
            "request_id": request_id(),
            "exception": None if (trace := _exception(record)) is None else clean(record, trace),
        }
        line = {name: value for name, value in line.items() if value is not None}
        return json.dumps(line | getattr(record, "fields", {}))


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _exception(record: logging.LogRecord) -> str | None:
    """``exc_text`` is what other formatters, or other processes, made of it."""
    return record.exc_text or (logging.Formatter().formatException(record.exc_info) if record.exc_info else None)


class Beside(logging.Handler):
    """To stderr, by a thread: a pipe that nobody empties, or a disk that hangs, costs lines (they are counted), but no answer."""

    def __init__(self) -> None:
        super().__init__()
        self.lost = 0
        self._lines: queue.Queue[str] = queue.Queue(WAITING)
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self.lost += 1
        except Exception:  # as all handlers do
            self.handleError(record)

    def _write(self) -> None:
        while True:
            line, lost = self._lines.get(), self.lost
            with contextlib.suppress(OSError, ValueError):  # the disk is full, nobody is there to read, or stderr is closed
                if lost:
                    record = {
                        "name": log.name,
                        "levelname": "WARNING",
                        "msg": f"{lost} lines were lost: the log is read too slowly",
                    }
                    sys.stderr.write(self.format(logging.makeLogRecord(record)) + "\n")
                    self.lost -= lost
                sys.stderr.write(line + "\n")
                sys.stderr.flush()
            self._lines.task_done()

    def flush(self) -> None:
        """What waits, for a second at most."""
        deadline = time.monotonic() + 1
        while self._lines.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.005)


class Ring(logging.Handler):
    """The latest lines, numbered from 1."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self.seq = 0

    def emit(self, record: logging.LogRecord) -> None:
        text = "\n".join(part for part in (record.getMessage(), _exception(record)) if part)
        if name := request_id():
            text += f" [{name}]"
        self.seq += 1  # under the handler's lock
        about = {"seq": self.seq, "time": _time(record), "level": record.levelname.lower(), "logger": record.name}
        self.lines.append({**about, "message": clean(record, text)[:LONGEST]})

    def after(self, seq: int) -> list[dict[str, Any]]:
        """Those with higher numbers; all, where the number is of an earlier server."""
        lines = list(self.lines)
        return [line for line in lines if line["seq"] > seq] if seq <= self.seq else lines


RING = Ring()


def setup(server: ServerConfig) -> None:
    """Log to stderr as the options say, and into the ring. Raises InputError."""
    if server.log_level not in LEVELS:
        raise InputError(f"--log-level is one of {', '.join(LEVELS)}, got {server.log_level!r}")
    if server.log_format not in FORMATS:
        raise InputError(f"--log-format is one of {', '.join(FORMATS)}, got {server.log_format!r}")
    stderr = Beside()
    stderr.setFormatter(Json() if server.log_format == "json" else Text())
    logging.basicConfig(level=server.log_level.upper(), handlers=[stderr, RING], force=True)
    logging.captureWarnings(True)
    if server.log_level != "debug":
        for noisy in NOISY:
            logging.getLogger(noisy).setLevel("WARNING")


def tell(text: str, server: ServerConfig, *, stream: TextIO | None = None) -> None:
    """Say something to whoever started the server: on stdout (or ``stream``) as it is, or as a line of a JSON log."""
    record = logging.makeLogRecord({"name": log.name, "levelno": logging.INFO, "levelname": "INFO", "msg": text})
    if server.log_format == "json":
        return log.handle(record)  # whatever --log-level says
    print(text, file=stream, flush=True)
    RING.handle(record)


def tell_request(record: Mapping[str, Any], *, reads: bool, first_s: float | None) -> None:
    """A line for a request that has ended, from what the audit log has of it. ``reads``: it only asked how the server is.

    ``first_s``: seconds to its first token.
    """
    took = f"{record['latency_s']:.3f} s" + (f" (first token {first_s:.3f} s)" if first_s is not None else "")
    tokens = f"{record['prompt_tokens']}+{record['generated_tokens']} tokens" if record["prompt_tokens"] else ""
    reasons = "/".join(dict.fromkeys(record["finish_reasons"]))
    more = [part for part in (record["model"], tokens, reasons, record["key"] and f"key {record['key']}") if part]
    wrong = f" {record['error_code']}" if "error_code" in record else ""
    wrong += f" ({record['error_param']})" if record.get("error_param") else ""
    message = ", ".join([f"{record['endpoint']} {record['status']}{wrong}", took, *more])
    fields = {name: value for name, value in record.items() if name not in ("time", "prompts", "answers")}
    fields["first_token_s"] = first_s and round(first_s, 4)
    requests_log.log(logging.DEBUG if reads else logging.INFO, "%s", message, extra={"fields": fields})


@router.get("/logs")
async def logs(after: int = 0) -> Response:
    """The latest lines of the log, those with a ``seq`` above ``after``; ``next`` is what to ask for next time."""
    return JSONResponse({"lines": RING.after(after), "next": RING.seq})
