"""All that crosses the engine's border: plain values, picklable, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from typing import Any

from appliance.core.params import SamplingParams


@dataclass(frozen=True, slots=True)
class Pooling:
    """Ask for a prompt's embedding: the hidden state behind its last token, from which the next one would be drawn."""

    dimensions: int | None = None  # the first so many of its numbers; None: all
    normalize: bool = True  # these to length 1


@dataclass(frozen=True, slots=True)
class Submit:
    """Ask for ``params.width`` completions of one prompt, or for its embedding. The engine answers with Events of its id."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    arrival: float  # time.monotonic() at the door
    cache_salt: str = ""  # cached prefixes are shared between requests of one salt only
    priority: int = 0  # lower goes first, under --scheduling-policy priority
    pooling: Pooling | None = None  # instead of a completion: ``params`` are those of one greedy token, which nobody is told
    adapter: str = ""  # the name of a loaded LoRA adapter, with which the model answers; "": as it is


@dataclass(frozen=True, slots=True)
class Abort:
    """Stop a request (all its completions, or the one of ``index``) and free its blocks before the next step."""

    request_id: str
    index: int | None = None
    reason: str = "abort"  # what it counts as: "stop" where the text layer found its end


@dataclass(frozen=True, slots=True)
class ResetPrefixCache:
    """Forget what is cached of earlier prompts: requests that come from now on find nothing of it."""


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Load a LoRA adapter, so that requests can name it. The engine answers with an error, or none."""

    name: str
    path: str  # a directory as PEFT writes it
    replace: bool = False  # in the place of the one of that name, where there is one


@dataclass(frozen=True, slots=True)
class UnloadAdapter:
    """Forget a LoRA adapter: requests that have it go on to their end, and then its memory is free. Answered in the same way."""

    name: str


@dataclass(frozen=True, slots=True)
class Nudge:
    """Have an engine that is idle say something: one that is stopped does not."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability, its rank (1 = the most likely) and the most likely tokens beside it."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first, or those that were asked for

    def __reduce__(self) -> tuple[Any, ...]:
        """As an Event's: there is one for every token."""
        return TokenLogprob, (self.token_id, self.logprob, self.rank, self.top)


class Unanswerable(str):
    """An error that the request itself has brought about: nothing is wrong with the engine or the model."""


@dataclass(frozen=True, slots=True)
class Event:
    """News of completion ``index`` of a request: new tokens, or its end, or both. ``finish_reason`` comes exactly once."""

    request_id: str
    index: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None  # one per token, where asked for
    prompt_logprobs: Sequence[TokenLogprob | None] | None = None  # once, before or with the first token; [0] is None
    finish_reason: str | None = None  # stop, length, abort, error
    stop_reason: int | str | None = None  # the stop token id or stop string that ended it; None for the end-of-text token
    error: str | None = None  # with finish_reason "error"; Unanswerable where the request is to blame
    preemptions: int = 0
    cached_tokens: int = 0  # prompt tokens that were found in the cache
    scheduled: float | None = None  # with the first token: time.monotonic() when a step began with it for the first time
    embedding: bytes | None = None  # with the end, where one was asked for: float32, the lowest byte first

    def __reduce__(self) -> tuple[Any, ...]:
        """There is one for every token, and the way that dataclasses are pickled takes four times as long."""
        return Event, _values(self)


_values = attrgetter(*(one.name for one in fields(Event)))


def joined(events: Iterable[Event]) -> list[Event]:
    """Fewer events that tell the same, in their order: of each completion one for all that goes on, then its end by itself.

    (Of an end whoever reads it looks at the last token: that must not be one of an earlier step.)
    """
    found: dict[tuple[str, int, bool], Event] = {}
    for event in events:
        key = event.request_id, event.index, event.finish_reason is not None
        if (before := found.get(key)) is not None:
            event = replace(
                event,
                token_ids=before.token_ids + event.token_ids,
                logprobs=(before.logprobs or ()) + (event.logprobs or ()) if before.logprobs or event.logprobs else None,
                prompt_logprobs=before.prompt_logprobs or event.prompt_logprobs,
                cached_tokens=max(before.cached_tokens, event.cached_tokens),
                scheduled=before.scheduled if before.scheduled is not None else event.scheduled,
            )
        found[key] = event
    return list(found.values())


@dataclass(frozen=True, slots=True)
class RequestStat:
    """One request as the dashboard shows it."""

    request_id: str
    index: int
    state: str  # running, waiting, swapped
    prompt_tokens: int
    output_tokens: int
    computed_tokens: int
    blocks: int
    age_s: float
    preemptions: int
    cached_tokens: int = 0  # prompt tokens that were found in the cache
    host_blocks: int = 0  # blocks of host memory, while it is swapped out
    adapter: str = ""  # the name of its LoRA adapter


@dataclass(frozen=True, slots=True)
class Stats:
    """The engine at one moment. Counters only grow. Feeds /stats, /metrics, the dashboard and the log alike."""

    time: float = 0.0  # time.monotonic()
    steps: int = 0
    running: int = 0
    waiting: int = 0
    swapped: int = 0  # of those that wait: their keys and values are in host memory
    held: int = 0  # of those that wait: not for a place, but for a grammar or their beams
    blocks_total: int = 0
    blocks_used: int = 0
    blocks_shared: int = 0  # of these, those that more than one sequence refers to
    blocks_kept: int = 0  # of the others, those whose content may be wanted again
    block_size: int = 16
    block_map: str = ""  # a character a block (or an even sample of very many): "." blank, "+" kept, "#" used, "&" shared
    swap_total: int = 0  # blocks of host memory
    swap_used: int = 0  # by requests that are swapped out
    swap_kept: int = 0  # by cached prefixes
    prompt_tokens: int = 0  # counter: prompt tokens computed
    generation_tokens: int = 0  # counter
    requests: int = 0  # counter: completions that arrived
    finished: dict[str, int] = field(default_factory=dict)  # counter by finish_reason
    preemptions: int = 0  # counter
    swaps: int = 0  # counter: of these, to host memory
    prefix_queries: int = 0  # counter: prompt tokens looked up in the prefix cache
    prefix_hits: int = 0  # counter: of these, found
    prefix_host_hits: int = 0  # counter: of these, in host memory
    drafts: int = 0  # counter: guesses of what comes next, of any number of tokens
    drafted: int = 0  # counter: their tokens
    drafts_right: int = 0  # counter: of these, the right ones
    copied_blocks: dict[str, int] = field(default_factory=dict)  # counter: out to host memory, in from there, copy in the pool
    last_step_s: float = 0.0
    last_step_tokens: int = 0
    step_tokens: int = 0  # counter: of all steps
    step_sizes: dict[int, int] = field(default_factory=dict)  # counter: steps by k, of more than 2**(k-1) and up to 2**k tokens
    rss_bytes: int = 0
    requests_now: tuple[RequestStat, ...] = ()  # at most 64, oldest first
    adapters_running: tuple[str, ...] = ()  # names of the LoRA adapters of those that run
    adapters_waiting: tuple[str, ...] = ()  # and of those that wait


COUNTERS = (
    *("steps", "step_tokens", "step_sizes", "prompt_tokens", "generation_tokens", "requests", "finished", "preemptions", "swaps"),
    *("prefix_queries", "prefix_hits", "prefix_host_hits", "drafts", "drafted", "drafts_right", "copied_blocks"),
)


def continued(before: Stats, now: Stats) -> Stats:
    """``now`` of an engine that took over from others, which had counted what ``before`` says."""
    return replace(now, **{name: _both(getattr(before, name), getattr(now, name)) for name in COUNTERS})


def _both(one: Any, other: Any) -> Any:
    return {key: one.get(key, 0) + other.get(key, 0) for key in one | other} if isinstance(one, dict) else one + other


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the engine says of itself once it is ready."""

    model: str  # as the user named it
    directory: str
    architecture: str
    quantization: str
    dtype: str
    device: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    ready_s: float  # from the start of loading
    plan: dict[str, object]  # MemoryPlan.to_dict()
    priorities: bool = False  # whether requests may bring one
    forks: bool = True  # whether a sequence can go on from what another one has: completions from one prompt, beams from a beam
    hidden_size: int = 0  # numbers of an embedding
    max_loras: int = 0  # LoRA adapters that can be loaded at a time; 0: none, since the engine was not told to
    adapters: tuple[str, ...] = ()  # names of those that were loaded at start
    kernels: str = ""  # what computes: reference, torch, or the instruction set of native kernels
    startup: dict[str, float] = field(default_factory=dict)  # seconds of its parts; "ready": of all of them


# Category -> where MemoryPlan.to_dict() has its bytes. The first ones are the device's, and add up to the plan's total.
PLAN_PARTS = {
    "weights": ("weights_bytes", "total"),
    "kv_cache": ("kv_cache", "bytes"),
    "workspace": ("workspace_bytes", "total"),
    "graphs": ("graphs_bytes", "total"),
    "states": ("states", "bytes"),
    "runtime": ("runtime_bytes",),
    "budget": ("budget_bytes",),
    "swap": ("swap", "bytes"),
    "grammars": ("grammars_bytes", "total"),
    "host": ("host_bytes", "total"),
}


def plan_bytes(plan: Mapping[str, Any]) -> dict[str, int]:
    """What a plan says of each category, as far as it does."""
    found = {}
    for category, path in PLAN_PARTS.items():
        value: Any = plan
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        if isinstance(value, int):
            found[category] = value
    if "swap" in found:
        found["swap"] += int(plan["swap"].get("ghosts_bytes", 0))  # what is remembered of blocks that went there
    return found
