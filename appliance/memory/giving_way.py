"""What it costs that a sequence gives way to others: to be copied to host memory and back, or to be computed again. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from appliance.memory.cards import known_card
from appliance.memory.devices import DeviceInfo
from models.spec import ModelSpec

MODES = ("auto", "swap", "recompute")
CPU_COPY, CPU_RATE = 5e9, 0.3e12
"""Bytes and operations a second on a CPU: little of the one and much of the other, for a machine of few cores; swapping there is
cheaper by far with any figures that are true of a machine."""
UNKNOWN_LINK, UNKNOWN_RATE = 12e9, 60e12  # of a card that is not in the table: PCIe 3 with 16 lanes, and an RTX 3090's products
LINK_SHARE, RATE_SHARE = 0.8, 0.6  # what is reached of a link, and of a card's rate with prompts


@dataclass(frozen=True)
class GivingWay:
    """Of one model on one device."""

    copy_s: float  # of a block, one way
    linear_s: float  # of a token, in all products of the layers
    pair_s: float  # of a query and a key, in all layers

    @classmethod
    def of(cls, spec: ModelSpec, device: DeviceInfo, block_bytes: int) -> GivingWay:
        card = known_card(device) if device.kind == "cuda" else None
        link, rate = (CPU_COPY, CPU_RATE) if device.kind == "cpu" else (UNKNOWN_LINK, UNKNOWN_RATE)
        if card is not None:
            link, rate = card.link, card.rate * 1e12
        if device.kind != "cpu":
            link, rate = LINK_SHARE * link, RATE_SHARE * rate
        weights = sum(m.N * m.K for m in spec.modules() if m.part in ("attention", "mlp"))
        return cls(block_bytes / link, 2 * weights / rate, 4 * spec.layers * spec.heads * spec.head_dim / rate)

    def swap_s(self, blocks: int) -> float:
        """There and back."""
        return 2 * blocks * self.copy_s

    def recompute_s(self, tokens: int) -> float:
        return tokens * self.linear_s + tokens * (tokens + 1) / 2 * self.pair_s
