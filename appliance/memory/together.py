"""Several models on one device: how much memory each gets, and which of them can be loaded at the same time. No torch.

Where all of them fit with a context of LEAST tokens each, what is left of the budget is shared out evenly, and none gives way.
Where they do not, or where options say how much a model shall have, each is planned by itself, and models give way to each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from appliance.config import EngineConfig
from appliance.memory.devices import DeviceInfo, this_device
from appliance.memory.fit import MARGIN, budget_of
from appliance.memory.plan import MemoryPlan, PlanError
from appliance.memory.planner import make_plan, read_settings
from appliance.memory.proofs import device_kind
from appliance.memory.settings import parse_length
from appliance.memory.text import size_text
from quant.errors import InputError

LEAST = 4096
"""Tokens of context that every model must have room for where memory is shared out; fewer, if it was made for fewer."""
MANY = 12
"""Models of which all sets are tried: a few hundredths of a second."""
SIZED = ("gpu_memory_utilization", "gpu_memory_reserve", "kv_cache_memory_bytes")  # options that say how much a model gets


@dataclass(frozen=True)
class Wish:
    """A model that is to be served. ``config.model`` is what the user calls it, ``directory`` where it is."""

    name: str
    directory: Path
    config: EngineConfig


@dataclass(frozen=True)
class Seats:
    """The plans of all models, in the order given, and the memory (bytes) that those loaded at a time share."""

    names: tuple[str, ...]
    plans: tuple[MemoryPlan, ...]
    budget: int
    source: str  # of the budget, in words

    def fits(self, chosen: Sequence[int]) -> bool:
        """Whether the models of these numbers can be loaded at the same time, as far as the device and its host go."""
        plans = [self.plans[k] for k in chosen]
        hosts = [plan.host_budget for plan in plans if plan.host_budget is not None]
        beside = sum(sum(plan.host.values()) for plan in plans)
        return sum(plan.total for plan in plans) <= self.budget and (not hosts or beside <= min(hosts))

    @property
    def all_fit(self) -> bool:
        return self.fits(range(len(self.plans)))

    def groups(self) -> list[tuple[int, ...]]:
        """The largest sets of models that fit together, none of them part of another; of more than MANY models, some of these."""
        everyone = range(len(self.plans))
        if self.all_fit:
            return [tuple(everyone)]
        if len(everyone) > MANY:  # each model with as many as fit beside it, small ones first
            return sorted({self._beside(one) for one in everyone})
        found: list[tuple[int, ...]] = []
        for size in range(len(self.plans), 0, -1):
            for chosen in combinations(range(len(self.plans)), size):
                if self.fits(chosen) and not any(set(chosen) <= set(larger) for larger in found):
                    found.append(chosen)
        return found

    def _beside(self, one: int) -> tuple[int, ...]:
        chosen = [one]
        for other in sorted(range(len(self.plans)), key=lambda k: self.plans[k].total):
            if other != one and self.fits([*chosen, other]):
                chosen.append(other)
        return tuple(sorted(chosen))

    def text(self) -> str:
        """A line for each model, then which of them fit together."""
        wide = max(len(name) for name in self.names)
        lines = [f"{'Model':<{wide}}{'weights':>12}{'KV cache':>12}{'in all':>12}{'context':>10}{'at once':>9}"]
        for name, plan in zip(self.names, self.plans):
            sizes = "".join(f"{size_text(size):>12}" for size in (plan.weight_bytes, plan.kv_bytes, plan.total))
            lines.append(f"{name:<{wide}}{sizes}{plan.max_model_len:>10,}{plan.sequences(plan.max_model_len):>9.1f}")
        lines.append(f"Budget {size_text(self.budget)}: {self.source}")
        if self.all_fit:
            lines.append("All of them fit together: none gives way to another.")
        else:
            sets = "; ".join(" + ".join(self.names[k] for k in group) for group in self.groups())
            lines.append(f"Together fit: {sets}. A model that does not fit beside those loaded is loaded when it is asked for,")
            lines.append("and the one that was idle longest gives way. gpu_memory_utilization of each says how much it may take.")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, object]:
        return {
            "budget_bytes": self.budget,
            "budget_source": self.source,
            "models": {name: plan.to_dict() for name, plan in zip(self.names, self.plans)},
            "fit_together": [[self.names[k] for k in group] for group in self.groups()],
        }


def seats(wishes: Sequence[Wish], base: EngineConfig, device: DeviceInfo | None = None) -> Seats:
    """Plan all models for one device (default: this machine's), with nothing of them loaded yet.

    ``base``: the options that are said for all, whose --gpu-memory-utilization is the share that all may take together. Raises
    InputError for bad input, and PlanError where one of them does not even fit by itself.
    """
    kinds = {device_kind(wish.config.device) for wish in wishes}
    if len(kinds) > 1:
        raise InputError(f"models of one server are on one device, but device is {' and '.join(sorted(kinds))}")
    if device is None:
        device = this_device(kinds.pop())
    budget, source = budget_of(read_settings(base, device), device)
    sized = any(getattr(wish.config, option) != getattr(base, option) for wish in wishes for option in SIZED)
    plans = None if sized or base.kv_cache_memory_bytes is not None else _shared(wishes, budget, device)
    if plans is None:
        plans = [_alone(wish, device) for wish in wishes]
        budget = max(budget, *(plan.total for plan in plans)) if sized else budget
    return Seats(tuple(wish.name for wish in wishes), tuple(plans), budget, source)


def settled(config: EngineConfig, plan: MemoryPlan) -> EngineConfig:
    """The options with which an engine has what the plan says, whatever else is loaded beside it by then."""
    return replace(
        config,
        max_model_len=plan.max_model_len,
        max_num_seqs=plan.max_num_seqs,
        kv_cache_memory_bytes=plan.kv_bytes,
        gpu_memory_utilization=None,
    )


@contextmanager
def named(name: str) -> Iterator[None]:
    """Errors say of which model they are."""
    try:
        yield
    except PlanError as error:
        raise PlanError(f"{name}: {error}", error.remedies) from None
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def _alone(wish: Wish, device: DeviceInfo) -> MemoryPlan:
    with named(wish.name):
        return make_plan(wish.directory, wish.config, device)


def _shared(wishes: Sequence[Wish], budget: int, device: DeviceInfo) -> list[MemoryPlan] | None:
    """Plans whose totals are together within the budget; None where there is not enough for all."""
    try:
        needs = [_least(wish, budget, device).total for wish in wishes]
        spare = (budget - sum(needs)) // len(wishes)
        return None if spare < 0 else [_within(wish, need + spare, device) for wish, need in zip(wishes, needs)]
    except PlanError:
        return None


def _least(wish: Wish, budget: int, device: DeviceInfo) -> MemoryPlan:
    """The smallest plan of any use: one sequence of LEAST tokens, or of the length that was asked for, and no prefix kept."""
    with named(wish.name):
        length = parse_length(wish.config.max_model_len)
    if length is None:
        length = min(LEAST, _within(wish, budget, device).max_model_len)
    sequences = 1 if wish.config.max_num_seqs == "auto" else wish.config.max_num_seqs
    config = replace(wish.config, max_model_len=length, max_num_seqs=sequences, enable_prefix_caching=False)
    return _within(replace(wish, config=config), budget, device)


def _within(wish: Wish, budget: int, device: DeviceInfo) -> MemoryPlan:
    """The plan for a device that has no more than this to give."""
    config = replace(wish.config, gpu_memory_utilization=1.0, gpu_memory_reserve=None)
    with named(wish.name):
        return make_plan(wish.directory, config, replace(device, available=min(device.available, budget + MARGIN[device.kind])))
