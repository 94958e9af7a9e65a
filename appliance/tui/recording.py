"""What was seen, kept in a file and shown again: JSON lines, a time stamp each, gzip where the name ends in .gz.

The first line is ``{"recording": 1, "time": s since 1970, "servers": [url, ...]}``; the others
``{"t": s since then, "s": which server, KIND: what came}``, where KIND is stats (the body of /stats), info (its ``info``, told
when it changes), log (lines) or error (why there was no answer).
"""

from __future__ import annotations

import bisect
import gzip
import json
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from appliance.tui.feed import HISTORY, Feed
from appliance.tui.http import FeedError
from appliance.tui.view import parse
from quant.errors import InputError

MOST_BYTES = 256 << 20  # of JSON: hours of a busy server
FLUSH_S = 5.0
SPEEDS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


class Recording:
    """Writes a session. Threads may add at the same time. Bounded: says in ``stopped`` why it takes no more."""

    def __init__(self, path: Path, urls: Sequence[str], *, most: int = MOST_BYTES, wall: Callable[[], float] = time.time) -> None:
        """Raises InputError where the file cannot be written."""
        self.path, self.stopped = path, ""
        self._urls, self._most, self._wall, self._begun = list(urls), most, wall, wall()
        self._size, self._flushed = 0, self._begun
        self._infos: dict[str, Any] = {}
        self._lock = threading.Lock()
        try:  # 0600: names of keys and the log are nobody else's
            self._raw = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")
        except OSError as error:
            raise InputError(f"--record {path}: {error.strerror}") from None
        self._file: IO[bytes] | gzip.GzipFile = self._raw
        if path.suffix == ".gz":
            self._file = gzip.GzipFile(fileobj=self._raw, mode="wb", compresslevel=6, filename="")
        self._write({"recording": 1, "time": self._begun, "servers": self._urls})

    def add(self, url: str, kind: str, payload: Any) -> None:
        """Never raises: a full disk ends the recording, and not the dashboard."""
        with self._lock:
            if self.stopped:
                return
            if kind == "stats":
                payload = dict(payload)
                info = payload.pop("info", None)
                if info != self._infos.get(url, ...):
                    self._infos[url] = info
                    self._frame(url, "info", info)
            self._frame(url, kind, payload)

    def _frame(self, url: str, kind: str, payload: Any) -> None:
        try:
            self._write({"t": round(self._wall() - self._begun, 3), "s": self._urls.index(url), kind: payload})
        except OSError as error:
            self.stopped = error.strerror or str(error)
        if self._size >= self._most:
            self.stopped = f"{self._most >> 20} MiB are full"

    def _write(self, line: dict[str, Any]) -> None:
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        self._size += len(data)
        self._file.write(data)
        if self._wall() - self._flushed >= FLUSH_S:
            self._flushed = self._wall()
            self._file.flush()

    def close(self) -> None:
        with self._lock:
            self.stopped = self.stopped or "closed"
            try:
                self._file.close()
                self._raw.close()
            except OSError:  # told already, when it was written
                return


@dataclass(frozen=True, slots=True)
class Frame:
    t: float
    server: int
    kind: str
    raw: bytes  # parsed when it is shown: a long recording is large

    @property
    def payload(self) -> Any:
        return json.loads(self.raw)[self.kind]


class Replay:
    """A recording as it is played: where it is, how fast it goes. Feeds take what is due."""

    def __init__(self, path: Path) -> None:
        """Raises InputError where the file is no recording. One that breaks off is played as far as it goes."""
        lines = _lines(path)
        first = next(lines, b"")
        try:
            head = json.loads(first)
            self.begun, self.urls = float(head["time"]), [str(url) for url in head["servers"]]
            known = head["recording"] == 1
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"--replay {path}: this is no recording of `appliance tui --record`") from error
        if not known:
            raise InputError(f"--replay {path}: recorded by a later version (form {head['recording']}, known is 1)")
        self.frames = [_frame(path, number, line, len(self.urls)) for number, line in enumerate(lines, 2) if line.endswith(b"\n")]
        self._times = [frame.t for frame in self.frames]
        self.length = self._times[-1] if self.frames else 0.0
        self.position, self.speed, self.playing = 0.0, 1.0, True
        self._next = 0  # the first frame that is not shown yet
        self._infos: dict[int, Any] = {}
        self.feeds = [Feed(_Gone(url), wall=lambda: self.begun + self.position) for url in self.urls]

    @property
    def ended(self) -> bool:
        return self.position >= self.length

    def advance(self, seconds: float) -> bool:
        """So much time of the viewer's goes by. Whether there was news in it."""
        shown = self._next
        if self.playing:
            self.show_until(min(self.position + seconds * self.speed, self.length))
            self.playing = not self.ended
        return self._next > shown

    def seek(self, seconds: float) -> None:
        """Go to a place. Going back, the feeds are filled anew, with as much history as they keep."""
        target = min(max(seconds, 0.0), self.length)
        if target < self.position:
            for feed in self.feeds:
                feed.reset()
            end = bisect.bisect_right(self._times, target)
            self._next = max(0, end - HISTORY * max(len(self.feeds), 1))
            self._infos = {}
            for frame in reversed(self.frames[: self._next]):
                if frame.kind == "info" and frame.server not in self._infos:
                    self._infos[frame.server] = frame.payload
        self.show_until(target)

    def faster(self, steps: int) -> None:
        self.speed = SPEEDS[min(max(SPEEDS.index(self.speed) + steps, 0), len(SPEEDS) - 1)]

    def show_until(self, target: float) -> None:
        end = bisect.bisect_right(self._times, target)
        for frame in self.frames[self._next : end]:
            self.position = frame.t
            self._show(frame)
        self._next, self.position = max(end, self._next), target

    def _show(self, frame: Frame) -> None:
        feed, payload = self.feeds[frame.server], frame.payload
        if frame.kind == "info":
            self._infos[frame.server] = payload
        elif frame.kind == "log":
            feed.take_log(payload)
        elif frame.kind == "error":
            feed.fail(str(payload))
        elif frame.kind == "stats":
            try:
                feed.take(parse({**payload, "info": self._infos.get(frame.server)}), frame.t)
            except FeedError as error:  # recorded by another version
                feed.fail(str(error))


class _Gone:
    """Nobody is asked: this was long ago."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.model: str | None = None

    def stats(self) -> dict[str, Any]:
        raise FeedError("this is a recording")

    def log(self, after: int) -> dict[str, Any]:
        raise FeedError("this is a recording")

    def cancel(self, request_id: str) -> str:
        return "this is a recording: there is nothing to cancel"


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        if isinstance(error, gzip.BadGzipFile):
            raise InputError(f"--replay {path}: this is no gzip file") from None
        return  # whoever wrote it was killed
    except OSError as error:
        raise InputError(f"--replay {path}: {error.strerror or error}") from None


def _frame(path: Path, number: int, line: bytes, servers: int) -> Frame:
    try:
        found = json.loads(line)
        kind = next(name for name in found if name not in ("t", "s"))
        frame = Frame(float(found["t"]), int(found["s"]), kind, line)
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise InputError(f"--replay {path}: line {number} is damaged") from error
    if not 0 <= frame.server < servers:
        raise InputError(f"--replay {path}: line {number} is of a server that is not there")
    return frame
