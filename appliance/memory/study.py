"""What people ask of a plan: how many sequences, how long, in which cache, how fast, on which cards. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from pathlib import Path

from appliance.adapters import spec_of
from appliance.config import EngineConfig
from appliance.memory.advice import advise, remedies
from appliance.memory.agreement import check_headers
from appliance.memory.cards import CARDS, Card, known_card
from appliance.memory.demand import Demand
from appliance.memory.devices import MIB, DeviceInfo
from appliance.memory.fit import fit, last
from appliance.memory.modules import Machinery
from appliance.memory.options import Crowd, Variants
from appliance.memory.plan import SHORTEST_AUTO, MemoryPlan, PlanError, Remedy, flag_text
from appliance.memory.planner import read_settings, taught, variants
from appliance.memory.roofline import Work
from appliance.memory.settings import Settings
from appliance.memory.shard import check_layout, shard, with_exchange
from appliance.memory.speed import Speed, decode_speeds, prefill_speed
from appliance.memory.states import check_states
from models.spec import ModelSpec
from quant.errors import InputError
from quant.headers import CheckpointIndex
from quant.scheme import QuantScheme, read_scheme

CACHES = {"auto": None, "fp8": "fp8_e4m3", "int8": "int8", "int4": "int4"}  # --kv-cache-dtype: Settings.kv_dtype


@dataclass(frozen=True)
class CacheRow:
    """The plan with another cache."""

    choice: str  # --kv-cache-dtype
    plan: MemoryPlan | None  # None: does not fit
    length: int  # that sequences are counted for
    long: MemoryPlan | None  # for sequences of that length; None: not one fits

    @property
    def sequences(self) -> float:
        return 0.0 if self.long is None else self.long.sequences(self.length)

    def to_dict(self) -> dict[str, object]:
        if self.plan is None:
            return {"kv_cache_dtype": self.choice, "fits": False}
        plan = self.plan
        return {
            "kv_cache_dtype": self.choice,
            "fits": True,
            "dtype": plan.kv.dtype,
            "token_bytes": plan.kv.token_bytes,
            "tokens": plan.tokens,
            "max_model_len": plan.max_model_len,
            "sequences": self.sequences,
        }


@dataclass(frozen=True)
class Study:
    """A model on a device, or on each of ``ranks`` cards: its headers are read once, and it is planned as often as is asked."""

    device: DeviceInfo
    host: DeviceInfo | None  # whose memory a card's plan must have; None: not asked
    ranks: int
    settings: Settings
    demand: Demand  # of one rank, as all below
    work: Work
    whole: tuple[ModelSpec, QuantScheme, Machinery]  # the model before it is divided
    crowd: Crowd | None = None  # what must fit at once

    @classmethod
    def read(
        cls,
        directory: Path,
        config: EngineConfig,
        device: DeviceInfo,
        *,
        host: DeviceInfo | None = None,
        ranks: int = 1,
        weakest: DeviceInfo | None = None,
    ) -> Study:
        """``weakest``: the card that decides the dtype for all. Raises InputError for bad input and models that do not divide."""
        settings = read_settings(config, device)
        index = CheckpointIndex.open(directory)
        published, scheme = read_scheme(index, config.quantization)
        spec = spec_of(published, config)
        check_headers(index, spec, scheme)
        machinery = Machinery.choose(config, spec.dtype, weakest or device, float16=spec.float16)
        check_states(spec, config, settings, ranks)
        part = shard(spec, ranks)
        check_layout(spec, part, scheme, ranks)
        demand = with_exchange(Demand.of(part, scheme, machinery, model=config.model or str(directory)), spec, ranks)
        settings = taught(settings, demand, device, machinery.ops)
        return cls(device, host, ranks, settings, demand, Work.of(part, scheme, machinery), (spec, scheme, machinery))

    @cached_property
    def plan(self) -> MemoryPlan:
        """That of the engine (appliance/memory/planner.py). Raises PlanError, with what would fit, where it does not."""
        try:
            return fit(self.demand, self.settings, self.device, self.host)
        except PlanError as error:
            raise advise(error, self.demand, self.settings, self.device, self._variants, self.host, self.crowd) from None

    @property
    def _variants(self) -> Variants:
        return variants(self.demand, *self.whole) if self.ranks == 1 else Variants()

    def asking(self, sequences: int | None, context: int | None) -> Study:
        """The same with settings for so many sequences of that context, all of which must fit at once.

        None: one sequence; the shortest context that is of use. InputError for a context that the model does not have.
        """
        given = self.settings.max_len
        crowd = Crowd(sequences or 1, context or min(SHORTEST_AUTO, given or self.demand.max_len))
        self._check_context(crowd.tokens)
        most = None if context is None and given is None else max(crowd.tokens, given or 0)
        return replace(self, crowd=crowd, settings=replace(self.settings, max_len=most, max_seqs=self._running(crowd.sequences)))

    @property
    def options(self) -> dict[str, object]:
        """Of EngineConfig, with which the crowd was looked at."""
        found = {"max_num_seqs": self.settings.max_seqs, "max_model_len": self.settings.max_len}
        return {name: value for name, value in found.items() if self.crowd is not None and value is not None}

    @property
    def flags(self) -> str:
        """The same as they are given to ``appliance serve`` and ``plan``."""
        return " ".join(flag_text(*option) for option in self.options.items())

    def refusal(self) -> PlanError | None:
        """Why it does not fit, with what would make it enough."""
        try:
            _ = self.plan
        except PlanError as error:
            return error
        return None

    def enough(self) -> bool:
        """Whether the model fits, with all sequences that were asked for."""
        plan = self.other()
        return plan is not None and (self.crowd is None or self.crowd.fits(plan))

    def remedies(self) -> list[Remedy]:
        """What makes it enough."""
        return remedies(self.demand, self.settings, self.device, self._variants, self.host, self.crowd)

    def other(self, **changes: object) -> MemoryPlan | None:
        """The plan with other Settings; None where it does not fit."""
        try:
            return fit(self.demand, replace(self.settings, **changes), self.device, self.host)  # type: ignore[arg-type]
        except InputError:  # a PlanError, or a cache that its heads do not fill
            return None

    def longest(self, sequences: int, context: int | None = None) -> MemoryPlan | None:
        """The plan with the longest context of which so many sequences fit at once; None where there is none of two tokens.

        No longer than --max-model-len, where that is given, but for a ``context`` that is asked about.
        """

        def room(length: int) -> MemoryPlan | None:
            plan = self.other(max_len=length, max_seqs=self._running(sequences))
            return plan if plan is not None and Crowd(sequences, length).fits(plan) else None

        most = self.settings.max_len or self.demand.max_len
        length = last(lambda n: room(n) is not None, 2, max(most, context or 0))
        return None if length is None else room(length)

    def _running(self, sequences: int) -> int:
        """--max-num-seqs where so many are asked about."""
        return max(sequences, self.settings.max_seqs or 0)

    def at_length(self, length: int) -> MemoryPlan | None:
        """The plan, made for longer sequences where it must be; None where not one fits. InputError where the model has none."""
        self._check_context(length)
        return self.plan if length <= self.plan.max_model_len else self.other(max_len=length)

    def _check_context(self, length: int) -> None:
        if length > self.demand.max_len:
            raise InputError(f"--context is {length}, but the model was made for at most {self.demand.max_len} tokens")

    def larger(self, most: int = 3) -> list[Card]:
        """The smallest cards of the table that are enough, of different sizes; none where the plan is for a CPU.

        Of those of about one size one that most people have: a GeForce before an RTX of a workstation before others.
        """
        found: list[Card] = []
        cards = sorted(
            (c for c in CARDS if self.device.kind == "cuda" and c.memory * MIB > self.device.total), key=attrgetter("memory")
        )
        while cards and len(found) < most:
            size = cards[0].memory
            good = [card for card in cards if card.memory <= 1.1 * size and replace(self, device=card.device()).enough()]
            found += sorted(good, key=_rare)[:1]
            cards = [card for card in cards if card.memory > (1.1 * size if good else size)]
        return found

    def caches(self, length: int) -> list[CacheRow]:
        """The same plan with each kind of cache, and how many sequences of that length it is enough for."""
        found = []
        for choice, dtype in CACHES.items():
            plan = self.other(kv_dtype=dtype)
            enough = plan is None or length <= plan.max_model_len
            found.append(CacheRow(choice, plan, length, plan if enough else self.other(kv_dtype=dtype, max_len=length)))
        return found

    @property
    def unpredictable(self) -> str:
        """Why no speed is predicted; empty where one is."""
        if self.device.kind == "cpu":
            return "a CPU's memory bandwidth is not known without measuring it"
        if self.ranks > 1:
            return "what several cards lose while they wait for each other is not known"
        if known_card(self.device) is None:
            return f"{self.device.name} is not in the table of cards"
        if self.demand.moments:
            return "the reference operators are there to be right, not fast"
        if self.demand.dtype == "float32":
            return "the table of cards has no rates for float32"
        return ""

    @property
    def planned_only(self) -> str:
        """Why this version does not serve what is planned; empty where it does."""
        return "this version serves on one card" if self.ranks > 1 else ""

    def decode_speeds(self, context: int | None = None) -> list[Speed]:
        """For 1, 8, 32 and the most sequences, as far as they fit; none where nothing is predicted."""
        card = known_card(self.device)
        return [] if self.unpredictable or card is None else decode_speeds(self.plan, self.work, card, context)

    def prefill_speed(self, context: int | None = None) -> Speed | None:
        """Of one prompt; None where nothing is predicted."""
        card = known_card(self.device)
        return None if self.unpredictable or card is None else prefill_speed(self.plan, self.work, card, context)


def _rare(card: Card) -> tuple[bool, ...]:
    return "Laptop" in card.name, not card.name.startswith("GeForce"), not card.name.startswith("RTX")


def smallest(studies: Sequence[Study]) -> Study:
    """That of the card which has the fewest blocks: all cards of a model have as many. Raises PlanError where one has too few."""
    return min(studies, key=lambda study: study.plan.num_blocks)
