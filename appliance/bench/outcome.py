"""What is seen of one request: when which part of its answer came. Times are perf_counter's, in seconds; no clock is read."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from appliance.bench.http import EventReader


@dataclass(slots=True)
class Outcome:
    """Filled by ``feed``. ``error`` is a kind of error that several requests may share, ``detail`` what was said."""

    number: int
    intended: float = 0.0  # when the request should have begun: latencies count from here
    sent: float | None = None  # when it did begin
    asked_tokens: int = 0
    times: list[float] = field(default_factory=list)  # when each piece of the answer came
    end: float = 0.0
    prompt_tokens: int | None = None  # by the server's own count
    completion_tokens: int | None = None
    text: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    finished: float | None = None  # when that came
    error: str | None = None
    detail: str = ""
    _events: EventReader = field(default_factory=EventReader)

    @property
    def ok(self) -> bool:
        return self.error is None

    @property
    def tokens(self) -> int:
        """As the server counts them; where it does not, a piece is taken for a token."""
        return len(self.times) if self.completion_tokens is None else self.completion_tokens

    @property
    def ttft(self) -> float | None:
        return self.times[0] - self.intended if self.times else None

    @property
    def last(self) -> float:
        """When it was known that no more comes, or the last piece where that is not told."""
        return max([*self.times[-1:], *([] if self.finished is None else [self.finished])], default=self.end)

    @property
    def e2e(self) -> float:
        return self.last - self.intended

    @property
    def gaps(self) -> list[float]:
        """Between the pieces of the answer, as its reader waits for them."""
        return [b - a for a, b in zip(self.times, self.times[1:])]

    @property
    def tpot(self) -> float | None:
        """Time for each token after those of the first piece, taken to be one; None where there is no other."""
        return (self.last - self.times[0]) / (self.tokens - 1) if self.times and self.tokens > 1 else None

    def feed(self, body: bytes, now: float) -> None:
        """A part of the answer, cut anywhere."""
        for data in self._events.feed(body):
            self._take(data, now)

    def finish(self, now: float) -> None:
        """The answer is complete: nothing is held back, and what never came is an error."""
        for data in self._events.finish():
            self._take(data, now)
        self.end = now
        if self.error is None and not self.times:
            self.fail("no token came", "the stream ended without any")
        elif self.error is None and self.finish_reason is None and self.completion_tokens is None:
            self.fail("the stream ended early", "no finish_reason came")

    def embedded(self, body: bytes, now: float) -> None:
        """The answer to a request for embeddings, which comes as a whole."""
        self.end = now
        try:
            answer = json.loads(body)
            vectors = [one["embedding"] for one in answer["data"]]
        except (ValueError, KeyError, TypeError):
            return self.fail("an answer without embeddings", body[:200].decode(errors="replace"))
        if not all(vectors):
            return self.fail("an empty embedding")
        usage = answer.get("usage")
        self.prompt_tokens, self.completion_tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None, 0

    def fail(self, kind: str, detail: str = "") -> None:
        """The first error counts."""
        if self.error is None:
            self.error, self.detail = kind, " ".join(detail.split())[:300]

    def _take(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            return
        try:
            chunk = json.loads(data)
        except ValueError:
            return self.fail("an event that is not JSON", data[:200].decode(errors="replace"))
        if not isinstance(chunk, dict):
            return self.fail("an event that is no object", data[:200].decode(errors="replace"))
        if error := chunk.get("error"):
            said = error if isinstance(error, dict) else {"message": str(error)}
            kind = said.get("code") or said.get("type") or "unnamed"
            return self.fail(f"error in the stream: {kind}", str(said.get("message")))
        before = self.completion_tokens
        if isinstance(usage := chunk.get("usage"), dict):
            self.prompt_tokens = usage.get("prompt_tokens", self.prompt_tokens)
            self.completion_tokens = usage.get("completion_tokens", before)
        choices = chunk.get("choices") or []
        pieces = [self._choice(choice) for choice in choices]
        if self.finish_reason is not None and self.finished is None:
            self.finished = now
        more = usage is not None and bool(choices) and (self.completion_tokens or 0) > (before or 0)
        ends_empty = self.finish_reason is not None and not self.times  # an answer of nothing: its end is what one waits for
        if more or any(pieces) or (choices and ends_empty):
            self.times.append(now)

    def _choice(self, choice: dict[str, Any]) -> bool:
        """Whether there is a token in it: text of any kind, or none without it being the start or the end of an answer."""
        delta = choice.get("delta")
        reason = choice.get("finish_reason")
        self.finish_reason = reason or self.finish_reason
        if delta is None:  # a completion's token may have no text: a special one, or a part of a character
            self.text.append(text := choice.get("text") or "")
            return bool(text) or not reason
        text = delta.get("content") or ""
        self.text.append(text)
        return bool(text or delta.get("reasoning_content") or delta.get("reasoning") or delta.get("tool_calls"))


def refused(status: int, body: bytes) -> tuple[str, str]:
    """An answer's status and body as an error's kind and what was said."""
    kind, text = f"HTTP {status}", body[:300].decode(errors="replace")
    try:
        found = json.loads(body)
        error = found.get("error", found)
    except (ValueError, AttributeError):
        return kind, text
    said = error if isinstance(error, dict) else {"message": error}
    code = said.get("code") if isinstance(said.get("code"), str) else said.get("type")
    return kind + (f" {code}" if code else ""), str(said.get("message") or text)
