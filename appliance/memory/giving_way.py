"""What it costs that a sequence gives way to others: to be copied to host memory and back, or to be computed again. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from appliance.core.step import Return
from appliance.memory.cards import known_card
from appliance.memory.devices import DeviceInfo
from models.spec import ModelSpec

MODES = ("auto", "swap", "recompute")
CPU_COPY, CPU_RATE = 5e9, 0.3e12
"""Bytes and operations a second on a CPU: little of the one and much of the other, for a machine of few cores; swapping there is
cheaper by far with any figures that are true of a machine."""
UNKNOWN_LINK, UNKNOWN_RATE = 12e9, 60e12  # of a card that is not in the table: PCIe 3 with 16 lanes, and an RTX 3090's products
LINK_SHARE, RATE_SHARE = 0.8, 0.6  # what is reached of a link, and of a card's rate with prompts
CPU_BANDWIDTH, UNKNOWN_BANDWIDTH = 20e9, 400e9  # bytes a second that a step of single tokens reads
RETURNS = 4
"""So many times what its return took a request may go on before it makes room: at most a fifth of the time goes into returns."""


@dataclass(frozen=True)
class GivingWay:
    """Of one model on one device."""

    copy_s: float  # of a block, one way
    read_s: float  # of a block, by a step of single tokens
    step_s: float  # of such a step, without blocks: its weights are read
    linear_s: float  # of a token, in all products of the layers
    pair_s: float  # of a query and a key, in all layers
    state_s: float = 0.0  # of a sequence's states, in a step of single tokens: they are read and written

    @classmethod
    def of(cls, spec: ModelSpec, device: DeviceInfo, block_bytes: int, weight_bytes: int) -> GivingWay:
        """``weight_bytes``: of all weights as they are stored."""
        card = known_card(device) if device.kind == "cuda" else None
        bandwidth = CPU_BANDWIDTH if device.kind == "cpu" else UNKNOWN_BANDWIDTH if card is None else card.bandwidth * 1e9
        link, rate = (CPU_COPY, CPU_RATE) if device.kind == "cpu" else (UNKNOWN_LINK, UNKNOWN_RATE)
        if card is not None:
            link, rate = card.link, card.rate * 1e12
        if device.kind != "cpu":
            link, rate = LINK_SHARE * link, RATE_SHARE * rate
        weights, active = spec.linear_parameters
        read_bytes = weight_bytes * active / weights  # about: of a mixture of experts a token reads those that it goes through
        pair_s = 4 * spec.heads * sum(heads.size for heads in spec.by_layer) / rate
        net = spec.recurrent
        state_s = 0.0 if net is None else 2 * sum(spec.linear) * net.state_bytes / bandwidth
        return cls(block_bytes / link, block_bytes / bandwidth, read_bytes / bandwidth, 2 * active / rate, pair_s, state_s)

    def swap_s(self, blocks: int) -> float:
        """There and back."""
        return 2 * blocks * self.copy_s

    def recompute_s(self, tokens: int) -> float:
        return tokens * self.linear_s + tokens * (tokens + 1) / 2 * self.pair_s

    def turn(self, back: Return) -> int:
        """How many tokens make up for a return, at the pace at which those who run have theirs together."""
        paid = self.recompute_s(back.end) - self.recompute_s(back.start) + 2 * back.copied * self.copy_s
        return int(RETURNS * paid * back.running / (self.step_s + back.running * self.state_s + back.used * self.read_s))
