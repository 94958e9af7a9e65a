"""One answer of a server, as values that the widgets show. What a newer server adds is left aside, but for facts of requests."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from appliance.core.messages import EngineInfo, RequestStat, Stats
from appliance.tui.http import FeedError

T = TypeVar("T")

MOST = 1e18  # no number that is shown is larger


@dataclass(frozen=True, slots=True)
class Latency:
    """Durations in seconds: count and sum since the start, percentiles of the last minute (None where there were none)."""

    count: int = 0
    sum_s: float = 0.0
    window: int = 0
    p50_s: float | None = None
    p95_s: float | None = None
    p99_s: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A completion: what the engine says of it, and what the server knows of the request it belongs to."""

    stat: RequestStat
    id: str | None = None  # by which it can be cancelled
    key: str | None = None
    ttft_s: float | None = None
    speed: float | None = None  # tokens a second of late; the feed's
    facts: dict[str, Any] = field(default_factory=dict)  # all that the server says

    @property
    def place(self) -> tuple[str, int]:
        """What tells it from the others."""
        return (self.stat.request_id, self.stat.index)

    @property
    def name(self) -> str:
        """Its public id, with the numbers of its prompt and completion where there are several."""
        prompt = self.facts.get("prompt")
        numbers = [str(prompt)] if prompt else []
        if self.stat.index or (self.facts.get("n") or 1) > 1:
            numbers.append(f"{self.stat.index}")
        return "/".join([self.id or self.stat.request_id, *numbers])

    @property
    def state(self) -> str:
        """waiting, swapped, prefill 45 %, or decode. A preempted request that is read again also shows how far it is."""
        one = self.stat
        if one.state != "running":
            return one.state
        tokens = one.prompt_tokens + one.output_tokens
        if one.computed_tokens < tokens - 1:  # the newest token is always still to be computed
            return f"prefill {100 * one.computed_tokens // tokens} %"
        return "decode"

    @property
    def mean_speed(self) -> float | None:
        """Tokens a second since the first one."""
        took = self.stat.age_s - self.ttft_s if self.ttft_s is not None else 0.0
        return (self.stat.output_tokens - 1) / took if took > 0 and self.stat.output_tokens > 1 else None


@dataclass(frozen=True, slots=True)
class View:
    """One answer of /stats."""

    version: str
    model: str
    state: str  # loading, ok, draining, dead, ...
    uptime_s: float | None
    info: EngineInfo | None  # None until the model is loaded, and of servers that do not tell
    stats: Stats
    loading: tuple[int, int] | None = None  # bytes read, bytes to read
    kind: str = "appliance"  # or vllm
    about: str = ""  # what a server that tells no EngineInfo says of itself
    usage: float = 0.0  # used share of the pool
    rows: tuple[Row, ...] = ()
    listed: bool = True  # whether the server lists its requests
    ttft: Latency = Latency()
    itl: Latency = Latency()
    e2e: Latency | None = None
    hardware: dict[str, Any] = field(default_factory=dict)
    models: tuple[dict[str, Any], ...] = ()  # where a server has several: name and state of each


def parse(body: dict[str, Any]) -> View:
    """A View of the body of /stats. Raises FeedError where something is missing."""
    try:
        engine = dict(body["engine"])
        asked = engine.get("requests_now")
        rows = tuple(_row(one) for one in asked or ())
        engine["requests_now"] = tuple(row.stat for row in rows)
        stats = _make(Stats, engine)
        loading = body.get("loading")
        latency = body.get("latency") or {}
        uptime = body["uptime_s"]
        return View(
            version=str(body["version"]),
            model=str(body["model"]),
            state=str(body["state"]),
            uptime_s=None if uptime is None else float(uptime),
            info=_make(EngineInfo, body["info"]) if body["info"] else None,
            stats=stats,
            loading=(int(loading[0]), int(loading[1])) if loading else None,
            kind=body.get("kind", "appliance"),
            about=body.get("about", ""),
            usage=engine["usage"] if "usage" in engine else stats.blocks_used / max(stats.blocks_total, 1),
            rows=rows,
            listed=asked is not None,
            ttft=_make(Latency, latency.get("ttft") or {}),
            itl=_make(Latency, latency.get("itl") or {}),
            e2e=_make(Latency, latency["e2e"]) if latency.get("e2e") else None,
            hardware=body.get("hardware") or {},
            models=tuple(one for one in body.get("models") or () if isinstance(one, dict)),
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise FeedError(f"the server's /stats is not understood: {type(error).__name__}: {error}") from error


def _row(data: dict[str, Any]) -> Row:
    known = {name: data.get(name) for name in ("id", "key", "ttft_s", "facts")}
    return _make(Row, {**known, "stat": _make(RequestStat, data), "facts": data})


def _make(cls: type[T], data: dict[str, Any]) -> T:
    """Raises TypeError where a number, or a text, is something else: widgets shall not have to ask."""
    known = {}
    for one in fields(cls):  # type: ignore[arg-type]
        if one.name in data:
            value = known[one.name] = data[one.name]
            kind = str(one.type).removesuffix(" | None")
            if value is None and kind != one.type:
                continue
            if kind in ("int", "float") and not (isinstance(value, int | float) and abs(value) < MOST):
                raise TypeError(f"{one.name} is {value!r:.40}")
            if kind == "str" and not isinstance(value, str):
                raise TypeError(f"{one.name} is {value!r:.40}")
    return cls(**known)
