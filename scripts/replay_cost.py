"""How long a card takes for a step: bytes and operations, by the shares of an RTX 4090 that docs/gpu-predictions.md states.

A product reads its weights once for all rows, or computes them, whichever takes longer; the head has the rows that are sampled.
Attention of one row reads its sequence's cache; that of a prompt's chunk computes every pair of a query and a key it sees, or
reads the cache, whichever takes longer. Launches take their time in every step. Blocks to and from the host go over the bus, and
nothing runs meanwhile. Left out, as there: drawing tokens, and that work of both kinds in a step might overlap.
"""

from __future__ import annotations

from functools import cache, cached_property
from typing import Any, Protocol

from gpu_predict import (
    ATTENTION,
    AWQ,
    BANDWIDTH,
    ENDS,
    LAUNCH_S,
    LAUNCHES,
    LLAMA,
    PREFILL,
    PREFILL_ATTENTION,
    RATE,
    TARGETS,
    Model,
    at_rows,
)

BUS = 25e9  # bytes a second between pinned host memory and the card: four fifths of PCIe 4.0 x16, as the engine assumes


class Cost(Protocol):
    """What a step costs in seconds; the simulator counts the work."""

    def step(self, rows: int, sampled: int, cached: int, pairs: int, context: int) -> float:
        """``rows`` tokens, ``sampled`` of which the head sees; ``cached`` tokens that single rows attend to; chunks of prompts
        see ``pairs`` of queries and keys in ``context`` tokens."""

    def cross(self, tokens: int) -> float:
        """Move the cache of ``tokens`` tokens between the card and the host."""

    def copy(self, tokens: int) -> float:
        """Copy it within the card."""


class Llama(Model):
    """Llama-3.1-8B in 4 bits: the shape of the published config.json, quantized as the models of docs/gpu-predictions.md."""

    @cached_property
    def config(self) -> dict[str, Any]:
        return {
            **LLAMA, "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0,
            "hidden_act": "silu", "torch_dtype": "float16", "quantization_config": AWQ,
        }  # fmt: skip


class Roofline:
    """Cost of a model's steps on the card of docs/gpu-predictions.md."""

    def __init__(self, model: Model) -> None:
        spec = model.spec
        weights: dict[tuple[str, int, int], int] = {}  # (slot, bytes, operations a row): how many there are
        for slot, nbytes, one in model.weights:
            key = slot, nbytes, 2 * one.module.N * one.module.K
            weights[key] = weights.get(key, 0) + 1

        def products(rows: int, head: bool) -> float:
            return sum(
                count * max(nbytes / BANDWIDTH / at_rows(TARGETS[slot], rows), ops * rows / RATE / PREFILL)
                for (slot, nbytes, ops), count in weights.items()
                if (slot == "head") == head and rows
            )

        self.products = cache(products)
        self.token_bytes = model.plan.kv.token_bytes
        self.read_s = self.token_bytes / BANDWIDTH / at_rows(TARGETS[ATTENTION], 1)
        self.pair_s = 4 * spec.heads * spec.head_dim * spec.attention_layers / RATE / PREFILL_ATTENTION
        self.launch_s = (LAUNCHES * spec.layers + ENDS) * LAUNCH_S

    def step(self, rows: int, sampled: int, cached: int, pairs: int, context: int) -> float:
        attention = cached * self.read_s + max(pairs * self.pair_s, context * self.read_s)
        return self.launch_s + self.products(rows, False) + self.products(sampled, True) + attention

    def cross(self, tokens: int) -> float:
        return tokens * self.token_bytes / BUS

    def copy(self, tokens: int) -> float:
        return 2 * tokens * self.token_bytes / BANDWIDTH
