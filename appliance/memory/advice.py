"""What would make a model fit, each found by planning again with it: what is advised is known to work.

Ranked by what it costs, the mildest first: memory that is free anyway; swap space; a cache in FP8 (docs/kv-cache.md has what that
does to the answers); slower prompts; fewer requests at once; slower decoding; a head in int8; layers of an unquantized model in
int8 or int4; a cache in int4; a shorter context; weights that are streamed from the host; fewer threads; another checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from appliance.memory.demand import Demand
from appliance.memory.devices import DeviceInfo
from appliance.memory.fit import fit, last
from appliance.memory.options import Crowd, Option, Variants, options
from appliance.memory.plan import MemoryPlan, PlanError, Remedy
from appliance.memory.settings import Settings
from appliance.memory.text import size_text
from quant.errors import InputError

SETTINGS = {field.name for field in fields(Settings)}
MODEST = 256, 16
"""Tokens and sequences of a step, at least, where several things change: with fewer, much speed is lost for little memory."""


Plan = Callable[[Mapping[str, object]], MemoryPlan | None]


def advise(
    error: PlanError,
    demand: Demand,
    settings: Settings,
    device: DeviceInfo,
    variants: Variants | None = None,
    host: DeviceInfo | None = None,
    crowd: Crowd | None = None,
) -> PlanError:
    """The error, with the remedies that work; else the plain truth."""
    if found := remedies(demand, settings, device, variants, host, crowd):
        return PlanError(f"{error}. What would fit: {', or '.join(map(str, found))}", tuple(found))
    return PlanError(f"{error}. No setting makes it fit on this device: it needs one with more memory, or a smaller model")


def remedies(
    demand: Demand,
    settings: Settings,
    device: DeviceInfo,
    variants: Variants | None = None,
    host: DeviceInfo | None = None,
    crowd: Crowd | None = None,
) -> list[Remedy]:
    """What makes the model fit, with the crowd; where no single change does, one set of changes."""
    variants = variants or Variants()

    def plan(changes: Mapping[str, object]) -> MemoryPlan | None:
        changed = {name: value for name, value in changes.items() if name in SETTINGS}
        others = {name: value for name, value in changes.items() if name not in changed and name != "demand"}
        chosen = variants.made(**others) if others and variants.made else changes.get("demand", demand)
        assert isinstance(chosen, Demand)
        try:
            found = fit(chosen, replace(settings, **changed), device, host)  # type: ignore[arg-type]
        except InputError:  # a PlanError, or a cache that its heads do not fill
            return None
        return found if crowd is None or crowd.fits(found) else None

    def known(*least: int) -> list[Option]:
        found = options(demand, settings, device, variants, *least, crowd=crowd)
        return [option for option in found if not (crowd and option.field in ("max_seqs", "max_len"))]

    good = _undominated([remedy for option in known() if (remedy := alone(plan, option)) is not None])
    if not good:
        small = ("threads",) if device.kind == "cuda" else ("threads", "max_seqs")  # little memory each, and much speed
        usual = [option for option in known(*MODEST) if option.field not in small]
        together = combined(plan, usual) or combined(plan, known())
        good = [] if together is None else [together]
    for words, smaller in (variants.quantized or {}).items():
        for option in (None, *(option for option in known() if crowd and option.field == "kv_dtype")):
            changes, flags = (option.change(option.values[0]), option.flags(option.values[0])) if option else ({}, {})
            if (found := plan({"demand": smaller, **changes})) is not None:
                effect = f"weights of {size_text(found.weight_bytes)}, at some cost in quality; {room(found)}"
                tokens, length = found.tokens, found.max_model_len
                good.append(Remedy(options=flags, effect=effect, tokens=tokens, max_model_len=length, instead=words))
                break
    return good


def alone(plan: Plan, option: Option) -> Remedy | None:
    """The mildest value of an option that, changed alone, makes the model fit."""
    index = _first(option.values, lambda value: plan(option.change(value)) is not None)
    return None if index is None else _remedy(plan, [(option, option.values[index])])


def _undominated(found: Sequence[Remedy]) -> list[Remedy]:
    """Without those that change more than another does, and give no more."""
    return [
        one
        for one in found
        if not any(
            other.options.keys() < one.options.keys() and other.tokens >= one.tokens and other.max_model_len >= one.max_model_len
            for other in found
        )
    ]


def combined(plan: Plan, known: Sequence[Option]) -> Remedy | None:
    """Several changes: the mildest that together suffice, without those that then turn out not to be needed.

    Each of the rest is at its mildest value that does, from the costliest on.
    """
    chosen: list[tuple[Option, Any]] = []
    for option in known:
        if plan(_changes(chosen)) is None and option.values:
            chosen.append((option, option.values[-1]))
    if plan(_changes(chosen)) is None:
        return None
    for place in reversed(range(len(chosen))):
        option, before, after = chosen[place][0], chosen[:place], chosen[place + 1 :]
        if plan(_changes([*before, *after])) is not None:
            chosen = [*before, *after]
            continue
        index = _first(
            option.values,
            lambda value, a=before, one=option, b=after: plan(_changes([*a, (one, value), *b])) is not None,  # type: ignore[misc]
        )
        assert index is not None
        chosen[place] = option, option.values[index]
    return _remedy(plan, chosen)


def _changes(chosen: Sequence[tuple[Option, Any]]) -> dict[str, Any]:
    return {name: value for option, choice in chosen for name, value in option.change(choice).items()}


def _remedy(plan: Plan, chosen: Sequence[tuple[Option, Any]]) -> Remedy:
    found = plan(_changes(chosen))
    assert found is not None
    flags = {name: value for option, choice in chosen for name, value in option.flags(choice).items()}
    cost = ", ".join(dict.fromkeys(option.cost for option, _ in chosen))
    return Remedy(options=flags, effect=f"{cost}; {room(found)}", tokens=found.tokens, max_model_len=found.max_model_len)


def room(plan: MemoryPlan) -> str:
    return f"room for {plan.tokens:,} tokens, {plan.max_model_len:,} in one sequence"


def _first(values: Sequence[object], good: Callable[[object], bool]) -> int | None:
    """Index of the first good value, where all those after a good one are good."""
    found = last(lambda n: good(values[len(values) - 1 - n]), 0, len(values) - 1)
    return None if found is None else len(values) - 1 - found
