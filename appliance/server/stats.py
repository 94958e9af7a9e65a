"""GET /stats: all that the dashboard shows, in one object: sizes, times and names of requests and keys, never their text."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from appliance.core.messages import RequestStat, Stats
from appliance.version import __version__

if TYPE_CHECKING:
    from appliance.server.hosts import Host
    from appliance.server.job import Job
    from appliance.server.site import Site
    from appliance.server.state import ServerState

WINDOW_S, MOST = 60.0, 1024  # percentiles are those of the latest so many values, none older than a minute
STATS = tuple(field.name for field in fields(Stats) if field.name != "requests_now")
REQUEST = tuple(field.name for field in fields(RequestStat))
PARAMS = ("n", "max_tokens", "temperature", "top_p", "top_k", "min_p")


class Recent:
    """Durations: how many and their sum since the start, and the percentiles of late."""

    def __init__(self) -> None:
        self.count, self.sum_s = 0, 0.0
        self._latest: deque[tuple[float, float]] = deque(maxlen=MOST)  # (monotonic time, seconds)

    def add(self, seconds: float) -> None:
        self.count += 1
        self.sum_s += seconds
        self._latest.append((time.monotonic(), seconds))

    def summary(self) -> dict[str, Any]:
        """``{"count", "sum_s"}`` since the start, ``{"window": values of the last minute, "p50_s", "p95_s", "p99_s"}``.

        A percentile is a value that occurred: the smallest one that so many percent do not exceed; None where there was none.
        """
        oldest = time.monotonic() - WINDOW_S
        values = sorted(seconds for at, seconds in self._latest if at >= oldest)
        found = {f"p{p}_s": values[-(-p * len(values) // 100) - 1] if values else None for p in (50, 95, 99)}
        return {"count": self.count, "sum_s": self.sum_s, "window": len(values), **found}


def models_of(site: Site) -> list[dict[str, Any]]:
    """The server's models, for whom ``GET /stats?model=NAME`` has more.

    ``bytes``: that it takes while loaded; ``waiting``: requests that wait for it to be loaded.
    """
    return [
        {
            "name": host.names[0],
            "names": host.names,
            "state": host.status,
            "bytes": getattr(host, "size", None),
            "waiting": host.waiting,
        }
        for host in site.hosts
    ]


async def stats_body(state: ServerState) -> dict[str, Any]:
    """The answer, of values that pydantic's JSON knows. Well under a millisecond: dashboards ask every second."""
    stats = await state.stats()
    engine = {name: getattr(stats, name) for name in STATS}
    engine["requests_now"] = _requests(state, stats)
    # As clients were told, by all engines since the start: what came has ended, or is at work.
    engine |= {"requests": state.metrics.arrived, "finished": dict(state.metrics.reasons)}
    return {
        "version": state.version,
        "model": state.names[0],
        "state": state.status,
        "uptime_s": time.monotonic() - state.shared.started,
        "info": state.shown,
        "engine": engine,
        "latency": {"ttft": state.metrics.ttft.summary(), "itl": state.metrics.itl.summary()},
        "hardware": await state.hardware.latest(),
        "loading": state.client.loading if state.status == "loading" else None,  # bytes read, bytes to read
    }


def absent_body(site: Site, host: Host) -> dict[str, Any]:
    """The same of a model that has never been loaded: nothing, but what it is called and whether it is on its way."""
    nothing = Stats()
    engine = {name: getattr(nothing, name) for name in STATS}
    return {
        "version": __version__,
        "model": host.names[0],
        "state": host.status,
        "uptime_s": time.monotonic() - site.shared.started,
        "info": None,
        "engine": {**engine, "requests_now": []},
        "latency": {"ttft": Recent().summary(), "itl": Recent().summary()},
        "hardware": {},
        "loading": None,
    }


def _requests(state: ServerState, stats: Stats) -> list[dict[str, Any]]:
    """The engine's requests with what the server knows of them: whose they are, by which id they can be aborted."""
    if not stats.requests_now:
        return []
    jobs = {submit.request_id: (job, k) for job in state.jobs for k, submit in enumerate(job.submits)}
    found = []
    for one in stats.requests_now:
        row = {name: getattr(one, name) for name in REQUEST}
        if (known := jobs.get(one.request_id)) is not None:
            row |= _of(*known, one.index)
        found.append(row)
    return found


def _of(job: Job, k: int, index: int) -> dict[str, Any]:
    """``ttft_s`` is None until the first token; ``id`` is what DELETE /v1/requests/{id} takes."""
    params, choice = job.submits[k].params, k * job.params.width + index
    return {
        "id": job.id,
        "key": job.ticket.key,
        "model": job.ticket.model,
        "prompt": k,
        "ttft_s": job.courses[choice].first_s if choice < len(job.courses) else None,
        "structured": params.structured_outputs is not None,
        "priority": job.submits[k].priority,
        **{name: getattr(params, name) for name in PARAMS},
    }
