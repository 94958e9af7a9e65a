"""What the dashboard knows: the server's /stats, asked for again and again, and the rates that follow from its counters."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar
from urllib.parse import urlsplit

from appliance.core.messages import EngineInfo, RequestStat, Stats
from quant.errors import InputError

T = TypeVar("T")

HISTORY = 600  # samples kept
TIMEOUT = 5.0  # seconds to wait for an answer


class FeedError(InputError):
    """The server does not answer, or not as expected; says which."""


@dataclass(frozen=True, slots=True)
class View:
    """One answer of /stats."""

    version: str
    model: str
    state: str  # loading, ok, draining, dead
    uptime_s: float
    info: EngineInfo | None  # None until the model is loaded
    stats: Stats
    loading: tuple[int, int] | None = None  # bytes read, bytes to read


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens a second between two answers."""

    prompt: float = 0.0
    generation: float = 0.0


def base_url(url: str) -> str:
    """``url`` with a scheme and without a trailing slash. Raises InputError where it is none."""
    full = url if "://" in url else f"http://{url}"
    parts = urlsplit(full)
    try:
        port_ok = parts.port != 0
    except ValueError:
        port_ok = False
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_ok:
        raise InputError(f"--url {url!r} is not the address of a server: it looks like http://127.0.0.1:8000")
    return full.rstrip("/")


def fetch(url: str, api_key: str | None = None) -> dict[str, Any]:
    """GET ``url``/stats. Raises FeedError. Asks the server itself, never a proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        with opener.open(urllib.request.Request(f"{url}/stats", headers=headers), timeout=TIMEOUT) as answer:
            body = json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code == 401:
            raise FeedError(f"{url} asks for a key: give one of its own as --api-key, or in APPLIANCE_API_KEY") from error
        raise FeedError(f"{url}/stats answers {error.code} {error.reason}: is this an appliance server?") from error
    except ValueError as error:
        raise FeedError(f"{url}/stats does not answer in JSON: is this an appliance server?") from error
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise FeedError(f"no answer from {url}: {getattr(reason, 'strerror', None) or reason}") from error
    if not isinstance(body, dict):
        raise FeedError(f"{url}/stats is not a JSON object: is this an appliance server?")
    return body


def parse(body: dict[str, Any]) -> View:
    """A View of the body of /stats; fields that a newer server adds are left aside. Raises FeedError where one is missing."""
    try:
        engine = dict(body["engine"])
        engine["requests_now"] = tuple(_make(RequestStat, request) for request in engine["requests_now"])
        loading = body.get("loading")
        return View(
            version=body["version"],
            model=body["model"],
            state=body["state"],
            uptime_s=float(body["uptime_s"]),
            info=_make(EngineInfo, body["info"]) if body["info"] else None,
            stats=_make(Stats, engine),
            loading=(int(loading[0]), int(loading[1])) if loading else None,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FeedError(f"the server's /stats is not understood: {type(error).__name__}: {error}") from error


def _make(cls: type[T], data: dict[str, Any]) -> T:
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    return cls(**{name: value for name, value in data.items() if name in known})


class Feed:
    """Polls one server. ``poll`` never raises for a server that is away: it keeps the last view and says since when."""

    def __init__(
        self, url: str, *, source: Callable[[str], dict[str, Any]] = fetch, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.url = base_url(url)
        self.view: View | None = None
        self.error: str | None = None
        self.away_since: float | None = None  # time.time() of the first poll that failed
        self.history: deque[Rates] = deque(maxlen=HISTORY)
        self.peak = Rates()
        self._source, self._clock = source, clock
        self._polled = 0.0  # the clock at the last answer

    def poll(self) -> None:
        """Ask once. Blocks until the answer or the time-out."""
        try:
            view = parse(self._source(self.url))
        except FeedError as error:
            self.error = str(error)
            self.away_since = self.away_since or time.time()
            self.history.append(Rates())
            return
        now = self._clock()
        if self.view is not None:
            self._note(self._rates(self.view.stats, view.stats, elapsed=now - self._polled))
        self.view, self.error, self.away_since, self._polled = view, None, None, now

    def _note(self, rates: Rates) -> None:
        self.history.append(rates)
        self.peak = Rates(max(self.peak.prompt, rates.prompt), max(self.peak.generation, rates.generation))

    def _rates(self, old: Stats, new: Stats, *, elapsed: float) -> Rates:
        """The engine dates its counters, and an idle one leaves them as they are: so its clock counts, but no idle time."""
        prompt, generation = new.prompt_tokens - old.prompt_tokens, new.generation_tokens - old.generation_tokens
        if prompt < 0 or generation < 0:  # the server was started again
            return Rates()
        if new.time <= old.time:  # in the middle of a step, or idle
            return self.history[-1] if new.running and self.history else Rates()
        seconds = new.time - old.time
        if not old.running and not old.waiting:
            seconds = min(seconds, elapsed)
        return Rates(prompt / seconds, generation / seconds) if seconds > 0 else Rates()
