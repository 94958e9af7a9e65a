"""Predicted speed of a plan on a card: a range from cautious to the targets, and the roof. Nothing is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from appliance.memory.cards import Card
from appliance.memory.offload import LINK_SHARE
from appliance.memory.plan import MemoryPlan
from appliance.memory.roofline import CAUTION, LAUNCH_S, TARGETS, Limits, Work, reach

HOST_S = 0.3e-3
"""What the host works on a step that is recorded, at most: it prepares the next one meanwhile, so that the longer of both counts.
A target, not a measurement."""
LAUNCH_HOST_S = 20e-6
"""What the host works on each launch of a step that is not recorded. An estimate until it has been measured."""
SEQUENCES, CONTEXT = (1, 8, 32), 2048  # that speeds are predicted for, beside the most sequences


@dataclass(frozen=True)
class Speed:
    """Tokens a second of all sequences together."""

    sequences: int
    tokens: int  # of each: in the cache, or of the prompt
    low: float
    high: float
    roof: float  # every share 100 %

    @classmethod
    def of(cls, sequences: int, tokens: int, rate: Callable[[float | None], float]) -> Speed:
        """``rate``: tokens a second where so much of the targets is reached; None: all of the card."""
        return cls(sequences, tokens, rate(CAUTION), rate(1.0), rate(None))

    def to_dict(self) -> dict[str, object]:
        rates = {"low": round(self.low, 1), "high": round(self.high, 1), "roof": round(self.roof, 1)}
        return {"sequences": self.sequences, "tokens": self.tokens, "tokens_per_second": rates}


def decode_speeds(plan: MemoryPlan, work: Work, card: Card, context: int | None = None) -> list[Speed]:
    """Of steps of one token, for 1, 8, 32 and the most sequences of ``context`` tokens, as far as they fit."""
    length, limits = min(context or CONTEXT, plan.max_model_len), Limits.of(card, work)
    most = min(plan.max_num_seqs, int(plan.sequences(length)))

    def rate(sequences: int, share: float | None) -> float:
        reached, pause = (share or 1.0) * reach(card), LAUNCH_S if share == 1.0 else 2 * LAUNCH_S
        shares = None if share is None else TARGETS
        seconds = work.decode_s(limits, sequences, length, plan.kv.token_bytes, shares, reached, pause)
        return sequences / max(plan.offload.step_seconds(seconds, _link(card, share)), _host(plan, work, share))

    counts = sorted({count for count in (*SEQUENCES, most) if 1 <= count <= most})
    return [Speed.of(count, length, lambda share, count=count: rate(count, share)) for count in counts]  # type: ignore[misc]


def prefill_speed(plan: MemoryPlan, work: Work, card: Card, context: int | None = None) -> Speed:
    """Of one prompt, in steps of --max-num-batched-tokens."""
    length, limits = min(context or CONTEXT, plan.max_model_len), Limits.of(card, work)
    steps = -(-length // plan.max_num_batched_tokens)

    def rate(share: float | None) -> float:
        seconds = work.prefill_s(limits, length, None if share is None else share * reach(card))
        step = plan.offload.step_seconds(seconds / steps, _link(card, share))
        return length / steps / max(step, _host(plan, work, share, recorded=False))

    return Speed.of(1, length, rate)


def _host(plan: MemoryPlan, work: Work, share: float | None, *, recorded: bool = True) -> float:
    """Seconds that the host works on a step."""
    if share is None:
        return 0.0
    return (HOST_S if recorded and plan.graphs else work.launches * LAUNCH_HOST_S) / share


def _link(card: Card, share: float | None) -> float:
    """Bytes a second that weights in host memory come with."""
    return card.link if share is None else share * LINK_SHARE * card.link
