"""What the dashboard knows of one server: its latest answer, the rates that follow from its counters, its log."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from appliance.core.messages import Stats
from appliance.tui.http import FeedError, Source, base_url, fetch
from appliance.tui.view import Latency, Row, View, parse

__all__ = ["HISTORY", "Feed", "FeedError", "LogLine", "Rates", "base_url", "fetch", "parse"]

HISTORY = 600  # samples kept
TRAIL = 120  # samples of a request's speed kept
LOG_LINES = 1000


@dataclass(frozen=True, slots=True)
class Rates:
    """Between two answers: tokens a second; the mean time to a first token, and how busy the machine was (where known)."""

    prompt: float = 0.0
    generation: float = 0.0
    ttft: float | None = None
    busy: float | None = None  # of the first card, or of the processor: 0 to 1


@dataclass(frozen=True, slots=True)
class LogLine:
    time: str  # ISO 8601, or ""
    level: str  # debug, info, warning, error, critical, or ""
    logger: str
    message: str


class Recorder(Protocol):
    def add(self, url: str, kind: str, payload: Any) -> None: ...


class Feed:
    """Polls one server. ``poll`` never raises for a server that is away: it keeps the last view and says since when."""

    def __init__(
        self,
        source: Source,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        recorder: Recorder | None = None,
    ) -> None:
        self.source, self.url, self.recorder = source, source.url, recorder
        self.wall = wall
        self._clock = clock
        self.starting = False  # the server was started here, and has not answered yet
        self.child: str | None = None  # why the server that was started here has ended
        self.reset()

    def reset(self) -> None:
        """As if nothing had been seen."""
        self._forget()
        self.error: str | None = None
        self.away_since: float | None = None  # wall() of the first poll that failed
        self.log: deque[LogLine] = deque(maxlen=LOG_LINES)
        self.log_total = 0  # lines that came, also those that were dropped since
        self.log_error: str | None = None
        self._log_next = 0
        self._polled = 0.0  # the clock at the last answer

    def _forget(self) -> None:
        self.view: View | None = None
        self.history: deque[Rates] = deque(maxlen=HISTORY)
        self.peak = Rates()
        self.trails: dict[tuple[str, int], deque[float | None]] = {}  # speeds of the requests that are shown

    def next_model(self) -> None:
        """Of a server with several, ask about the next one."""
        names = [str(one.get("name")) for one in self.view.models] if self.view else []
        if self.view and len(names) > 1:
            at = names.index(self.view.model) if self.view.model in names else -1
            self.source.model = names[(at + 1) % len(names)]

    def poll(self) -> None:
        """Ask once. Blocks until the answer or the time-out."""
        try:
            body = self.source.stats()
            view = parse(body)
        except FeedError as error:
            self.fail(str(error))
            if self.recorder:
                self.recorder.add(self.url, "error", str(error))
            return
        self.take(view, self._clock())
        if self.recorder:
            self.recorder.add(self.url, "stats", body)

    def fail(self, why: str) -> None:
        self.error = why
        self.away_since = self.away_since or self.wall()
        self.history.append(Rates())

    def take(self, view: View, now: float) -> None:
        """An answer that came when the clock said ``now``."""
        if self.view is not None and self.view.model != view.model:
            self._forget()  # another model's counters say nothing of this one's
        view = replace(view, rows=self._rows(view))
        if self.view is not None:
            self._note(self._rates(self.view, view, elapsed=now - self._polled))
        self.view, self.error, self.away_since, self._polled = view, None, None, now

    def poll_log(self) -> None:
        """Ask for the lines that are new. Says in ``log_error`` where there are none to be had."""
        try:
            body = self.source.log(self._log_next)
            lines, self._log_next = body["lines"], int(body["next"])
            self.take_log(lines)
            self.log_error = None
        except FeedError as error:
            self.log_error = str(error)
            return
        except (KeyError, TypeError, ValueError) as error:
            self.log_error = f"the server's /logs is not understood: {type(error).__name__}: {error}"
            return
        if self.recorder and lines:
            self.recorder.add(self.url, "log", lines)

    def take_log(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            words = (str(line.get(name) or "") for name in ("time", "level", "logger", "message"))
            self.log.append(LogLine(*words))
        self.log_total += len(lines)

    def _note(self, rates: Rates) -> None:
        self.history.append(rates)
        self.peak = Rates(max(self.peak.prompt, rates.prompt), max(self.peak.generation, rates.generation))

    def _rates(self, old: View, new: View, *, elapsed: float) -> Rates:
        more = {"ttft": _mean(old.ttft, new.ttft), "busy": busy(new)}
        prompt, generation = self._tokens(old.stats, new.stats, elapsed=elapsed)
        return Rates(prompt, generation, **more)

    def _tokens(self, old: Stats, new: Stats, *, elapsed: float) -> tuple[float, float]:
        """The engine dates its counters, and an idle one leaves them as they are: so its clock counts, but no idle time."""
        prompt, generation = new.prompt_tokens - old.prompt_tokens, new.generation_tokens - old.generation_tokens
        if prompt < 0 or generation < 0:  # the server was started again
            return 0.0, 0.0
        if new.time <= old.time:  # in the middle of a step, or idle
            before = self.history[-1] if new.running and self.history else Rates()
            return before.prompt, before.generation
        seconds = new.time - old.time
        if not old.running and not old.waiting:
            seconds = min(seconds, elapsed)
        return (prompt / seconds, generation / seconds) if seconds > 0 else (0.0, 0.0)

    def _rows(self, view: View) -> tuple[Row, ...]:
        """With their speeds: by the answer before where they were in it, else by their first token's time."""
        before = {row.place: row for row in self.view.rows} if self.view else {}
        took = view.stats.time - self.view.stats.time if self.view else 0.0
        rows = []
        for row in view.rows:
            old, speed = before.get(row.place), row.mean_speed
            if row.state != "decode":
                speed = None
            elif old is not None and took > 0 and old.stat.output_tokens:
                speed = (row.stat.output_tokens - old.stat.output_tokens) / took
                speed = speed if old.speed is None else (speed + old.speed) / 2  # a poll is shorter than some steps
            elif old is not None and old.speed is not None:
                speed = old.speed
            rows.append(replace(row, speed=speed))
        trails = {row.place: self.trails.get(row.place) or deque(maxlen=TRAIL) for row in rows}
        for row in rows:
            trails[row.place].append(row.speed)
        self.trails = trails
        return tuple(rows)


def _mean(old: Latency, new: Latency) -> float | None:
    """Of what was counted between two answers."""
    count = new.count - old.count
    return max(new.sum_s - old.sum_s, 0.0) / count if count > 0 else None


def busy(view: View) -> float | None:
    """How busy the device that computes is, 0 to 1."""
    cards = view.hardware.get("gpus") or []
    on_card = bool(cards) and (view.info is None or not view.info.device.startswith("cpu"))
    source = cards[0] if on_card else view.hardware.get("cpu") or {}
    found = source.get("utilization")
    return float(found) if isinstance(found, int | float) else None
