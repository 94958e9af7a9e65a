"""How fast a card should be: bytes and operations of a step, and what the card is sold with. Predictions: nothing is run.

A decode step reads every weight once (of a mixture's experts those that are chosen) and the cache of every sequence; a prompt
is products and attention. Each kernel is meant to reach a share of the card's bandwidth or rate (``TARGETS``, ``PREFILL``);
those are goals for an RTX 4090, and what a card really does is measured by scripts/gpu_check. What this leaves out: drawing
tokens, steps that mix prompts with answers, other programs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from appliance.memory.cards import Card
from appliance.memory.modules import Loaded, Machinery, ends, parents, told
from models.spec import KVHeads, ModelSpec
from quant.scheme import QuantScheme

ATTENTION = "decode attention"
TARGETS = {  # share of the bandwidth, for as many rows as the key says at most
    "qkv": {16: 0.80, 32: 0.75}, "o": {16: 0.75, 32: 0.75}, "gate_up": {16: 0.88, 32: 0.75}, "down": {16: 0.85, 32: 0.75},
    "head": {16: 0.90, 32: 0.75}, ATTENTION: {16: 0.80, 32: 0.80},
}  # fmt: skip
HBM, HBM_REACH = (80, 90, 100), 0.85
"""Cards by capability whose memory is HBM, and how much of these shares is meant to be reached there: 75 % instead of 88 of an
H200's bandwidth in gate and up, 60 % instead of 70 of its rate in prompts."""
PREFILL, PREFILL_ATTENTION = 0.70, 0.50  # share of the rate
CAUTION = 0.8  # the low end of a range: this much of every share, and launches twice as long
LAUNCHES, ENDS, LAUNCH_S = 10, 8, 1e-6  # a layer, beside the layers, and the pause between two in a recorded step
ROUTING, SHARED, TOLD = 2, 6, 5
"""Launches of a layer more than these: of a mixture of experts, of an MLP beside them, of what it is told of tokens."""

Shares = Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class Limits:
    """What a card is sold with: bytes a second, operations a second of products, and of attention (float16, sums in float32)."""

    bandwidth: float
    rate: float
    attention: float

    @property
    def rates(self) -> tuple[float, float]:
        return self.rate, self.attention

    @classmethod
    def of(cls, card: Card, work: Work) -> Limits:
        """Products of rounded activations run at the rate of what they are rounded to, where the card has it."""
        rate = {"int8": card.int8, "fp8": card.fp8 or card.rate}.get(work.rounded, card.rate)
        return cls(card.bandwidth * 1e9, rate * 1e12, card.rate * 1e12)


@dataclass(frozen=True)
class Work:
    """What a step has to do."""

    kinds: tuple[tuple[str, int, Loaded, int], ...]  # slot, bytes as packed, weight, how many are like it; with the head
    layers: int
    attention_layers: int  # of these, those that read a cache
    heads: int
    kv: tuple[KVHeads, ...]  # of each of these
    windows: tuple[int | None, ...]  # sliding window of each of these; empty: all see everything
    rounded: str  # what activations of most products are rounded to: int8, fp8, or "" where they are not
    chosen: tuple[int, int] = (1, 1)  # experts that a token goes through, of how many
    more: int = 0  # launches of layers with experts, or that are told of tokens
    state_bytes: int = 0  # of a sequence, in layers that have states: read and written for each token
    first: tuple[tuple[Loaded, int], ...] = ()  # what each token of a prompt goes through; empty: all but the head

    @classmethod
    def of(cls, spec: ModelSpec, scheme: QuantScheme, machinery: Machinery) -> Work:
        before = [(made, 1) for _, made, _ in told(spec, scheme, machinery)[1:]]
        found = [*_layers(spec, scheme), *before]
        first = [*_layers(spec.part(range(spec.storing)), scheme), *before] if any(spec.shared) else []
        found.append((ends(spec, scheme, machinery).head, 1))
        kinds = [
            ("o" if one.slot in ("router", "ba", "told") else one.slot, one.nbytes(machinery), one, count) for one, count in found
        ]
        chosen = (spec.mixture.active, spec.mixture.experts) if spec.mixture else (1, 1)
        more, rounded = 0 if spec.per_layer is None else TOLD * spec.layers, _rounded(found, machinery)
        if spec.mixture is not None:
            more += (ROUTING + (SHARED if spec.mixture.shared else 0)) * (spec.layers - len(spec.mixture.dense_layers))
        windows = tuple(window for layer, window in enumerate(spec.windows) if not spec.is_linear(layer))
        sizes = spec.layers, spec.attention_layers, spec.heads, spec.by_layer
        states = 0 if spec.recurrent is None else spec.recurrent.state_bytes * sum(spec.linear)
        return cls(tuple(kinds), *sizes, windows, rounded, chosen, more, states, tuple(first))

    @property
    def weights(self) -> tuple[tuple[str, int, Loaded], ...]:
        """(slot, bytes as packed, weight) of the layers' and the head, not the embedding."""
        return tuple((slot, nbytes, one) for slot, nbytes, one, count in self.kinds for _ in range(count))

    @property
    def launches(self) -> int:
        """Of a decode step."""
        return LAUNCHES * self.layers + self.more + ENDS

    @property
    def weight_bytes(self) -> int:
        return sum(nbytes * count for _, nbytes, _, count in self.kinds)

    def used(self, one: Loaded, tokens: int) -> tuple[float, float]:
        """(the share of it that is read, the tokens that are multiplied with it) in a step of so many tokens.

        Of experts in the mean, where all are chosen equally often.
        """
        if one.module.part != "experts":
            return 1.0, tokens
        share = self.chosen[0] / self.chosen[1]
        return 1 - (1 - share) ** tokens, tokens * share

    def seen(self, context: int) -> float:
        """Tokens of the cache that a sequence's next token reads, in the mean over the bytes that are stored of a token."""
        if not self.windows:
            return context
        sizes = [heads.count * heads.size for heads in self.kv]
        read = (size * min(context, window or context) for size, window in zip(sizes, self.windows, strict=True))
        return sum(read) / sum(size for size, heads in zip(sizes, self.kv, strict=True) if not heads.shared)

    def decode_s(
        self,
        limits: Limits,
        sequences: int,
        context: int,
        token_bytes: int,
        shares: Shares | None,
        share: float = 1.0,
        pause: float = LAUNCH_S,
    ) -> float:
        """Seconds of a step of one token for each sequence of ``context`` tokens, whose cache is ``token_bytes`` a token.

        ``shares`` None: the roof, with every share 100 % and no pauses. ``share``: how much of them all is reached; ``pause``:
        seconds between two launches.
        """
        total = 0.0
        for slot, nbytes, one, count in self.kinds:
            reached = 1.0 if shares is None else share * at_rows(shares[slot], sequences)
            read, tokens = self.used(one, sequences)
            seconds = max(nbytes * read / limits.bandwidth, 2 * tokens * one.module.N * one.module.K / limits.rate)
            total += count * seconds / reached
        reached = 1.0 if shares is None else share * at_rows(shares[ATTENTION], sequences)
        total += sequences * (self.seen(context) * token_bytes + 2 * self.state_bytes) / limits.bandwidth / reached
        return total if shares is None else total + self.launches * pause

    def prefill_ops(self, prompt: int) -> tuple[float, float]:
        """(of products, of attention) for one prompt: every pair of a query and a key that it sees.

        The last token alone goes through layers that store nothing; what the head does with it is not counted.
        """
        inner = [(one, count) for slot, _, one, count in self.kinds if slot != "head"]
        every, first = self._linear_ops(inner), self._linear_ops(self.first or inner)
        windows = self.windows or (None,) * self.attention_layers
        pairs = sum(
            heads.size * (min(prompt, window or prompt) if heads.shared else _pairs(prompt, window))
            for heads, window in zip(self.kv, windows, strict=True)
        )
        return float(first * (prompt - 1) + every), 4 * pairs * self.heads

    def _linear_ops(self, weights: Iterable[tuple[Loaded, int]]) -> float:
        """Of a token."""
        return sum(2 * count * self.used(one, 1)[1] * one.module.N * one.module.K for one, count in weights)

    def prefill_s(self, limits: Limits, prompt: int, share: float | None) -> float:
        """Seconds of one prompt, at that share of the targets; None: at the full rate."""
        products, attention = (ops / rate for ops, rate in zip(self.prefill_ops(prompt), limits.rates, strict=True))
        return products + attention if share is None else (products / PREFILL + attention / PREFILL_ATTENTION) / share


def _layers(spec: ModelSpec, scheme: QuantScheme) -> list[tuple[Loaded, int]]:
    """Weights of all layers, and how many are like each."""
    return [(one, parent.count) for parent in parents(spec, scheme) for one in parent.joined]


def _pairs(prompt: int, window: int | None) -> float:
    """Pairs of a query and a key that it sees."""
    inside = min(prompt, window or prompt)
    return inside * (inside + 1) / 2 + (prompt - inside) * inside


def _rounded(weights: list[tuple[Loaded, int]], machinery: Machinery) -> str:
    """By weight: that which most operations have."""
    found: dict[str, int] = {}
    for one, count in weights:
        asked = (one.stored.activation or "").removesuffix("-token")
        kind = "int8" if one.kind == "int" and machinery.activation == "int8" else asked
        found[kind] = found.get(kind, 0) + count * one.module.N * one.module.K
    return max(found, key=lambda kind: found[kind])


def reach(card: Card) -> float:
    """How much of the targets for an RTX 4090 is meant to be reached on another card."""
    return HBM_REACH if card.capability in HBM else 1.0


def at_rows(shares: Mapping[int, float], rows: int) -> float:
    """The share for the least number of rows that is enough; that for the most where none is."""
    return shares[min((most for most in shares if most >= rows), default=max(shares))]
