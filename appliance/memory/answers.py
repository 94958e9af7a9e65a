"""What a plan is enough for, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from appliance.memory.cards import Card
from appliance.memory.devices import MIB, DeviceInfo
from appliance.memory.plan import MemoryPlan, Remedy
from appliance.memory.speed import Speed
from appliance.memory.study import CacheRow, Study
from appliance.memory.text import columns, size_text
from quant.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The plan, and what it is enough for."""

    study: Study
    devices: tuple[DeviceInfo, ...]  # one for each rank
    sequences: int | None
    context: int | None
    longest: MemoryPlan | None  # for so many sequences
    long: MemoryPlan | None  # for sequences of that context
    asking: Study | None  # of what was asked for; None where that fits
    remedies: list[Remedy]  # that make what was asked for fit; none where it does
    larger: list[Card]  # and cards on which it does
    caches: list[CacheRow]
    decode: list[Speed]
    prefill: Speed | None

    @classmethod
    def of(cls, study: Study, devices: Sequence[DeviceInfo], sequences: int | None, context: int | None) -> Answers:
        """Raises PlanError where the plan itself does not fit, and InputError for questions that have no answer."""
        if sequences is not None and sequences < 1:
            raise InputError(f"--sequences is {sequences}: at least 1 is needed")
        long = None if context is None else study.at_length(context)
        longest = None if sequences is None else study.longest(sequences, context)
        short = long is None and context is not None
        if sequences is not None:
            short = longest is None or longest.max_model_len < (context or 0)
        asking = study.asking(sequences, context) if short else None
        return cls(
            asking=asking,
            remedies=asking.remedies() if asking else [],
            larger=asking.larger() if asking else [],
            devices=tuple(devices),
            study=study,
            sequences=sequences,
            context=context,
            decode=study.decode_speeds(context),
            prefill=study.prefill_speed(context),
            long=long,
            longest=longest,
            caches=study.caches(context or study.plan.max_model_len),
        )

    @property
    def fits(self) -> bool:
        """Whether what was asked for fits: so many sequences, of that context."""
        return self.asking is None

    def to_dict(self) -> dict[str, object]:
        """Stable keys: those of the plan, and what was asked."""
        asked: dict[str, object] = {}
        if self.sequences is not None:
            asked |= {"sequences": self.sequences, "longest_context": self.longest.max_model_len if self.longest else 0}
        if self.context is not None:
            asked |= {"context": self.context, "sequences_of_context": self.long.sequences(self.context) if self.long else 0.0}
        speed: dict[str, object] = {
            "measured": False,
            "reason_for_none": self.study.unpredictable or None,
            "decode": [one.to_dict() for one in self.decode],
            "prefill": self.prefill.to_dict() if self.prefill else None,
        }
        parallel = None
        if len(self.devices) > 1:
            parallel = {"cards": [device.name for device in self.devices], "planned_for": "one card", "served": False}
        cards = {} if self.fits else {"cards_that_fit": [card.name for card in self.larger]}
        remedies = {} if self.fits else {"remedies": [one.to_dict() for one in self.remedies]}
        return {
            **self.study.plan.to_dict(),
            "fits": self.fits,
            **remedies,
            **cards,
            "asked": asked,
            "cache_dtypes": [row.to_dict() for row in self.caches],
            "predicted_speed": speed,
            "tensor_parallel": parallel,
            "planned_only": self.study.planned_only or None,
        }

    def text(self) -> str:
        lines = [self.study.plan.table(), *self._asked(), *self._caches(), *self._speed()]
        note = f"Planned only: {self.study.planned_only}."
        if len(self.devices) > 1:
            names = ", ".join(device.name for device in dict.fromkeys(self.devices))
            head = f"Tensor parallel over {len(self.devices)} cards ({names})"
            lines = [head, f"  {note} Everything below is of each card.", *lines]
        elif self.study.planned_only:
            lines = [note, *lines]
        return "\n".join(lines)

    def _asked(self) -> list[str]:
        lines = []
        if self.longest is not None:
            flags = f"--max-num-seqs {self.longest.max_num_seqs} --max-model-len {self.longest.max_model_len}"
            lines.append(f"{self.sequences:,} sequences at once: up to {self.longest.max_model_len:,} tokens each ({flags})")
        elif self.sequences is not None:
            lines.append(f"{self.sequences:,} sequences at once: they do not fit, however short")
        if self.long is not None and self.context is not None:
            lines.append(f"Sequences of {self.context:,} tokens: {self.long.sequences(self.context):,.1f} fit at once")
        elif self.context is not None:
            lines.append(f"Sequences of {self.context:,} tokens: not even one fits")
        if self.sequences is not None and self.context is not None:
            verb = "fit" if self.fits else "do not fit"
            lines.append(f"{self.sequences:,} sequences of {self.context:,} tokens {verb} at once")
        if self.asking is not None:
            lines += self._remedies(self.asking.flags)
        return ["", *lines] if lines else []

    def _remedies(self, flags: str) -> list[str]:
        head = f"What would make that fit ({flags}, and one of these)" if self.remedies else "No setting makes that fit"
        lines = [head, *(f"  {one}: {one.effect}" for one in self.remedies)]
        names = ", ".join(f"{card.name} ({size_text(card.memory * MIB)})" for card in self.larger)
        return [*lines, f"  another card: the smallest that would do are {names}"] if names else lines

    def _caches(self) -> list[str]:
        rows = []
        for row in self.caches:
            if row.plan is None:
                rows.append((row.choice, "", "does not fit", "", ""))
                continue
            plan = row.plan
            name = f"auto ({plan.kv.dtype})" if row.choice == "auto" else row.choice
            cells = (size_text(plan.kv.token_bytes), f"{plan.tokens:,}", f"{plan.max_model_len:,}")
            rows.append((name, *cells, f"{row.sequences:,.1f}" if row.long is not None else ""))
        head = ("", "a token", "tokens", "longest", f"sequences of {self.context or self.study.plan.max_model_len:,}")
        return ["", "With other caches (--kv-cache-dtype)", *columns(head, rows)]

    def _speed(self) -> list[str]:
        if self.study.unpredictable:
            return ["", f"No speed is predicted: {self.study.unpredictable}."]
        head = ("sequences", "tokens each", "tok/s of each", "tok/s of all", "roof")
        rows = [
            (f"{one.sequences:,}", f"{one.tokens:,}", _range(one, one.sequences), _range(one), _digits(one.roof))
            for one in self.decode
        ]
        lines = ["", "Predicted speed, not measured (roof: all of the bandwidth and the rate that the card is sold with)"]
        lines += columns(head, rows)
        if self.prefill is not None:
            one = self.prefill
            times = f"{one.tokens / one.high:.2g} to {one.tokens / one.low:.2g} s"
            lines.append(f"  a prompt of {one.tokens:,} tokens: {_range(one)} tok/s, {times} (roof {_digits(one.roof)} tok/s)")
        return lines

    def facts(self) -> list[str]:
        """For the picture: a head, and lines of what is predicted."""
        if not self.decode:
            return []
        lines = [
            f"{one.sequences:,} sequence{'s' * (one.sequences > 1)} of {one.tokens:,} tokens: {_range(one)} tok/s"
            for one in self.decode
        ]
        return ["Predicted decode speed, not measured", *lines]


def _range(speed: Speed, among: int = 1) -> str:
    return f"{_digits(speed.low / among)} to {_digits(speed.high / among)}"


def _digits(rate: float) -> str:
    """Three digits: a prediction has no more."""
    return f"{float(f'{rate:.3g}'):,.0f}" if rate >= 10 else f"{rate:.1f}"
