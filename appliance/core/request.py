"""One completion in flight. ``computed`` chases ``len(tokens)``: prefill, chunk, decode and resume are one line."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from appliance.core.messages import Pooling, RequestStat
from appliance.core.params import SamplingParams
from appliance.core.repetition import Repetition
from appliance.core.thinking import Thinking

T = TypeVar("T")


class Adapter(NamedTuple):
    """A LoRA adapter that is loaded."""

    name: str
    number: int  # that no other has, nor one of that name that is loaded later


@dataclass(eq=False, slots=True)
class Request:
    """State of completion ``index`` of a submitted request."""

    request_id: str
    index: int
    tokens: list[int]  # prompt, then what was sampled
    prompt_len: int
    params: SamplingParams
    max_total: int  # len(tokens) at which it ends with "length"
    seed: int  # 64 bits; with the position it decides the random number, so batch mates and preemption do not
    arrival: float
    eos_token_ids: frozenset[int] = frozenset()  # end it with "stop" (empty under ignore_eos)
    priority: int = 0  # lower goes first
    salt: str = ""  # prefixes are shared between requests of one salt only
    adapter: Adapter | None = None  # with which it is answered
    pooling: Pooling | None = None  # its embedding is wanted, and the token that comes with it is nobody's
    leader: Request | None = None  # of its siblings, the one that computes the prompt for all
    beam: bool = False  # what it samples is taken by its group, and not by commit
    held: bool = False  # waits for its group's decision, or for its grammar
    guide: Any = None  # where it is in its grammar; the runtime's
    thinking: Thinking | None = None  # what it has left to think
    repetition: Repetition | None = None  # whether it says the same again and again
    made: dict[str, Any] = field(default_factory=dict)  # what ``once`` made, shared with its siblings
    said: Any = None  # what its next tokens are guessed from; appliance.core.drafts'
    computed: int = 0  # tokens whose keys and values are in the cache, or will be after the steps under way
    landed: int = 0  # of those, how many no step under way has still to compute
    ahead: int = 0  # tokens that the steps under way will add
    blocks: array[int] = field(default_factory=lambda: array("i"))  # ids of its blocks, in order
    host: array[int] = field(default_factory=lambda: array("i"))  # where its blocks are in host memory, while it is swapped out
    keys: list[bytes] = field(default_factory=list)  # of its full blocks, as far as they were asked for
    ticket: tuple[int, int] = (0, 0)  # place in the order of service
    running: bool = False
    seat: int = -1  # its place among those that run, which nobody else has; -1: it does not run
    stops: tuple[int, ...] = ()  # after so many tokens its states are worth keeping, in order
    turn: int = 0  # len(tokens) from which on it makes room for others, by when it was admitted last
    cached: int = 0  # prompt tokens that were in the cache when it was admitted first
    scheduled: float | None = None  # time.monotonic() of the first step that it had a part in
    preemptions: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def key(self) -> tuple[str, int]:
        return (self.request_id, self.index)

    @property
    def root(self) -> bytes:
        """What the keys of its blocks begin with: those of other salts or adapters have other content for the same tokens."""
        salt = self.salt.encode()
        return salt if self.adapter is None else salt + b"\xff" + self.adapter.number.to_bytes(8)  # a byte that no text has

    @property
    def known(self) -> int:
        """Tokens, with those that are being sampled."""
        return len(self.tokens) + self.ahead

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are still to be computed."""
        return self.known - self.computed

    @property
    def output_len(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def stat(self, now: float) -> RequestStat:
        """As the dashboard shows it; ``now``: time.monotonic()."""
        return RequestStat(
            request_id=self.request_id,
            index=self.index,
            state="running" if self.running else "swapped" if self.host else "waiting",
            prompt_tokens=self.prompt_len,
            output_tokens=self.output_len,
            computed_tokens=self.computed,
            blocks=len(self.blocks),
            age_s=now - self.arrival,
            preemptions=self.preemptions,
            cached_tokens=self.cached,
            host_blocks=len(self.host),
            adapter=self.adapter.name if self.adapter else "",
        )

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What its parameters are in the form that each token asks for: lists may be as long as a vocabulary."""
        if (found := self.made.get(name)) is None:
            found = self.made[name] = make()
        return found

    def append(self, token: int) -> None:
        """Take a sampled token, and see whether it ends the request (stop strings are the text layer's)."""
        self.tokens.append(token)
        if self.output_len >= self.params.min_tokens:
            if token in self.eos_token_ids:
                self.finish_reason = "stop"
            elif self.params.stop_token_ids and token in self.once("stop", lambda: frozenset(self.params.stop_token_ids or ())):
                self.finish_reason, self.stop_reason = "stop", token
        if self.finish_reason is None and len(self.tokens) >= self.max_total:
            self.finish_reason = "length"
        repeats = self.repetition is not None and self.repetition.found(self.tokens, self.prompt_len)
        if repeats and self.finish_reason is None and self.output_len >= self.params.min_tokens:
            self.finish_reason, self.stop_reason = "repetition", "repetition_detected"  # vLLM's words
