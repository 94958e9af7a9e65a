"""What is replayed: a trace on a model, over the memory that the model leaves on the card; ours and what it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gpu_predict import CARD, Model
from replay_cost import Llama, Roofline
from replay_rivals import Reserved
from replay_sim import Replay, Result
from replay_trace import Job, azure, mooncake, sharegpt

from appliance.core.blocks import BlockPool
from appliance.core.request import Request
from appliance.core.scheduler import Scheduler
from appliance.memory.giving_way import GivingWay

SHORT = 512  # tokens of a prompt
OURS, PLAIN = "paged, prefix cache", "paged, no prefix cache"


@dataclass(frozen=True)
class Setup:
    """A trace on a model.

    ``few``: how many of its first requests the many runs under load take; 0: there are none. ``longest``: what is reserved for
    every request by those who reserve; 0: what the trace's longest takes.
    """

    name: str
    model: Model
    jobs: list[Job]
    few: int
    longest: int = 0

    @cached_property
    def cost(self) -> Roofline:
        return Roofline(self.model)

    @property
    def tokens(self) -> int:
        return self.model.plan.tokens

    @property
    def limits(self) -> dict[str, int]:
        return {"max_num_batched_tokens": self.model.plan.max_num_batched_tokens, "max_num_seqs": self.model.plan.max_num_seqs}

    def paged(
        self, tokens: float | None = None, *, size: int = 0, host: float = 0, caching: bool = True, auto: bool = False
    ) -> Scheduler:
        """The engine's. ``tokens`` of room (the plan's), ``host`` bytes of host memory; ``auto``: swap where that is cheaper."""
        size = size or self.model.plan.kv.block_size
        second = BlockPool(int(host) // (size * self.cost.token_bytes), size) if host else None
        pool = BlockPool(int(tokens or self.tokens) // size, size)
        cost = GivingWay.of(self.model.spec, CARD, size * self.cost.token_bytes, self.model.plan.weight_bytes)

        def swaps(request: Request) -> bool:
            return not auto or cost.swap_s(-(-request.computed // size)) < cost.recompute_s(request.computed)

        return Scheduler(pool, host=second, caching=caching, swaps=swaps, turn=cost.turn, **self.limits)

    def systems(self) -> dict[str, Callable[[], Any]]:
        """Ours and what it is compared with, the kindest first."""
        longest = self.longest or max(job.total for job in self.jobs)

        def exact(request: Request) -> int:
            return request.max_total

        def most(request: Request) -> int:
            return longest

        plain = {PLAIN: lambda: self.paged(caching=False)} if self.jobs[0].shared else {}
        return {
            OURS: self.paged,
            **plain,
            "contiguous, exact length": lambda: Reserved(self.tokens, exact, **self.limits),
            "contiguous, longest": lambda: Reserved(self.tokens, most, **self.limits),
            "whole batches, exact length": lambda: Reserved(self.tokens, exact, whole_batches=True, **self.limits),
            "whole batches, longest": lambda: Reserved(self.tokens, most, whole_batches=True, **self.limits),
        }

    def run(self, jobs: Sequence[Job], scheduler: Any, **how: Any) -> Result:
        return Replay(jobs, scheduler, self.cost, **how).run()


def setups(data: Path, requests: int | None) -> list[Setup]:
    traces, llama, old = data / "traces", Llama("Llama-3.1-8B"), Model("Llama-2-7B")
    conv, code = (azure(traces / f"AzureLLMInferenceTrace_{name}.csv") for name in ("conv", "code"))
    longest = old.plan.max_model_len
    middle = [job for job in conv if job.total <= longest]
    short = [job for job in conv if job.prompt <= SHORT]
    found = [
        Setup("Azure conv", llama, conv, 1500),
        Setup("Azure code", llama, code, 1000),
        Setup("Mooncake", llama, mooncake(traces / "mooncake_conversation.jsonl"), 700),
        Setup("ShareGPT", llama, sharegpt(traces / "sharegpt_sample.json"), 0),
        Setup("Azure conv, Llama-2-7B", old, middle, 1000),
        Setup("short Azure conv, Llama-2-7B", old, short, 0, longest),
    ]
    if requests is None:
        return found
    return [replace(s, jobs=s.jobs[:requests], few=min(s.few, requests)) for s in found]
