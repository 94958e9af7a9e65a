"""How much of the server one key may use: token buckets, a count of requests at work, and a quota for a day.

All of it runs on the monotonic clock: a wall clock that is set, or jumps, locks nobody out and lets nobody in. Libraries for this
(``limits``, ``pyrate-limiter``) count hits of a known size, by the wall clock; the size of a request is known here when it has
ended, so that a bucket must be able to owe: hence these few lines.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from appliance.core.params import RequestError

DAY_S = 86400.0
EPSILON = 1e-6  # units that rounding may lose
Clock = Callable[[], float]  # seconds, never backwards


class RateLimited(RequestError):
    """429. ``retry_after``: seconds until it may be asked again; ``hopeless`` where no waiting helps."""

    def __init__(self, message: str, retry_after: float, *, hopeless: bool = False) -> None:
        super().__init__(message, code="rate_limit_exceeded", status=429)
        self.retry_after, self.hopeless = retry_after, hopeless


@dataclass(frozen=True)
class Limits:
    """None: no limit. Tokens are those of prompts and of answers together."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    concurrency: int | None = None
    max_prompt_tokens: int | None = None  # in one prompt
    max_output_tokens: int | None = None  # in one answer, which ends there with "length"


class Bucket:
    """Holds up to ``size`` units, a minute's worth, and fills evenly. It may owe: what is known late is charged late."""

    def __init__(self, size: int, clock: Clock) -> None:
        self.size, self._clock = size, clock
        self._level, self._at = float(size), clock()

    @property
    def level(self) -> float:
        now = self._clock()
        self._level = min(self.size, self._level + max(0.0, now - self._at) * self.size / 60)
        self._at = now
        return self._level

    def take(self, units: float) -> None:
        self._level = self.level - units

    def wait_s(self, units: float) -> float:
        """Seconds until it holds so many units."""
        return max(0.0, units - self.level - EPSILON) * 60 / self.size


@dataclass
class Account:
    """What one key has used."""

    limits: Limits
    clock: Clock = time.monotonic
    running: int = 0  # requests at work
    _buckets: dict[str, Bucket] = field(default_factory=dict)
    _day: float = 0.0  # when the day began: with the first use after the one before was over
    _used: int = 0  # tokens of this day

    def __post_init__(self) -> None:
        self._day = self.clock()

    def day(self) -> tuple[float, int]:
        """(seconds since this day began, tokens used in it)."""
        used = self._today()
        return self.clock() - self._day, used

    def resume(self, age_s: float, used: int) -> None:
        """Go on with such a day."""
        self._day, self._used = self.clock() - age_s, used

    def change(self, limits: Limits) -> None:
        """Other limits from now on; what was used stays used where the limit is the same one."""
        for name in ("requests_per_minute", "tokens_per_minute"):
            if getattr(limits, name) != getattr(self.limits, name):
                self._buckets.pop(name, None)
        self.limits = limits

    def _bucket(self, name: str) -> Bucket | None:
        size = getattr(self.limits, name)
        if size is None:
            return None
        if name not in self._buckets:
            self._buckets[name] = Bucket(size, self.clock)
        return self._buckets[name]

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count a request while it is at work. Raises RateLimited; what is refused costs nothing."""
        most = self.limits.concurrency
        if most is not None and self.running >= most:
            raise RateLimited(f"this key has {self.running} requests at work, and its limit is {most}", 1)
        bucket = self._bucket("requests_per_minute")
        if bucket and (wait := bucket.wait_s(1)) > 0:
            raise RateLimited(f"this key's limit is {bucket.size} requests per minute; try again in {_time(wait)}", wait)
        self._check_tokens(1)  # in debt? then it need not be read at all
        if bucket:
            bucket.take(1)
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    def prompt(self, tokens: int) -> None:
        """Charge a prompt, before it is computed. Raises RateLimited, and then charges nothing."""
        self._check_tokens(tokens)
        self.tokens(tokens)

    def tokens(self, tokens: int) -> None:
        """Charge tokens that have been computed."""
        if bucket := self._bucket("tokens_per_minute"):
            bucket.take(tokens)
        self._used = self._today() + tokens

    def _check_tokens(self, tokens: int) -> None:
        bucket, day = self._bucket("tokens_per_minute"), self.limits.tokens_per_day
        for size, name in ((self.limits.tokens_per_minute, "minute"), (day, "day")):
            if size is not None and tokens > size:
                raise RateLimited(
                    f"the request has {tokens} tokens, and this key's limit is {size} tokens per {name}", 60, hopeless=True
                )
        if day is not None and (over := self._today() + tokens - day) > 0:
            wait = self._day + math.ceil(over / day) * DAY_S - self.clock()
            raise RateLimited(f"this key has used {self._used} of its {day} tokens per day; try again in {_time(wait)}", wait)
        if bucket and (wait := bucket.wait_s(tokens)) > 0:
            raise RateLimited(f"this key's limit is {bucket.size} tokens per minute; try again in {_time(wait)}", wait)

    def _today(self) -> int:
        """Tokens used in this day of 24 hours, and what days before it owe: an answer's are known when the quota may be spent."""
        if days := int((self.clock() - self._day) // DAY_S):
            self._used = max(0, self._used - days * (self.limits.tokens_per_day or self._used))
            self._day = self._day + days * DAY_S if self._used else self.clock()
        return self._used

    def headers(self) -> dict[str, str]:
        """OpenAI's x-ratelimit-*, for the limits that there are."""
        found = {}
        for kind in ("requests", "tokens"):
            if bucket := self._bucket(f"{kind}_per_minute"):
                found[f"x-ratelimit-limit-{kind}"] = str(bucket.size)
                found[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(bucket.level)))
                found[f"x-ratelimit-reset-{kind}"] = _time(bucket.wait_s(bucket.size))
        return found


def _time(seconds: float) -> str:
    """As OpenAI writes it: 80ms, 1.5s, 6m0s, 3h0m0s."""
    seconds = round(seconds, 3)
    if seconds < 1:
        return f"{math.ceil(round(seconds * 1000))}ms"
    if seconds < 60:
        return f"{math.ceil(round(seconds * 10, 3)) / 10:g}s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s"
