"""How one module's weight is stored, and the rules by which a config says so (no torch)."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class WeightScheme:
    """How one module's weight is stored. ``DENSE`` is an unquantized one."""

    layout: str
    """dense, awq-gemm, awq-gemv, awq-gemv-fast, gptq, pack-quantized, int-quantized, float-quantized, fp8-block,
    mxfp4, nvfp4 or rows."""
    bits: int = 16
    group_size: int = -1
    """Inputs that share a scale; -1: one scale per output, or one for the whole weight."""
    symmetric: bool = True
    act_order: bool = False
    zero_offset: int = 0
    """The zero point is the stored value plus this (GPTQ v1: 1)."""
    activation: str | None = None
    """int8-token or fp8-token: one scale per token, made at run time. int8-tensor or fp8-tensor: one published scale, which this
    project does not apply, since unrounded activations are closer to the original model. None: activations stay as they are."""
    zero_borrow: bool = False
    """GPTQ v1 as GPTQModel and AutoRound write it: the 1 was subtracted from whole words, so a zero point of 0 borrows from its
    neighbour."""
    planar: bool = False
    """GPTQModel's gptq_p, and its 5-, 6- and 7-bit weights: bit planes instead of a dense stream of fields."""
    block: tuple[int, int] | None = None
    """(outputs, inputs) that share one scale."""

    @property
    def quantized(self) -> bool:
        return self.layout != "dense"


DENSE = WeightScheme("dense")
MXFP4, NVFP4 = WeightScheme("mxfp4", 4, 32), WeightScheme("nvfp4", 4, 16)
ROWS = {8: WeightScheme("rows", bits=8), 4: WeightScheme("rows", bits=4, group_size=32, symmetric=False)}
"""What quant.rows makes of an unquantized weight while it is loaded, by bits."""
EMBEDDINGS = ("embed_tokens", "embed_tokens_per_layer", "wte", "word_embeddings")
ONLINE = {"int8": ROWS[8], "int8_per_channel_weight_only": ROWS[8], "int4": ROWS[4]}
"""``--quantization`` of unquantized checkpoints: what the weights of their layers are rounded to. The long name is vLLM's."""


@dataclass(frozen=True)
class Rule:
    """Modules whose name fits ``pattern`` have ``scheme``. Kinds: name (equal), regex (re.match), part (substring), class."""

    kind: str
    pattern: str
    scheme: WeightScheme

    def matches(self, name: str) -> bool:
        if self.kind == "name":
            return name == self.pattern
        if self.kind == "regex":
            return re.match(self.pattern, name) is not None
        if self.kind == "part":
            return self.pattern in name
        return self.pattern == class_of(name)


@dataclass(frozen=True)
class Settings:
    """A parsed config: the first rule that matches decides; modules of decoder layers that none matches have ``default``."""

    method: str  # awq, gptq, auto-round, compressed-tensors, fp8, mxfp4, modelopt or none
    rules: tuple[Rule, ...]
    default: WeightScheme
    source: str  # where this was read


def class_of(name: str) -> str:
    """The class that configs mean by a module: Embedding for token tables, else Linear (norms are never asked for)."""
    return "Embedding" if name.rsplit(".", 1)[-1] in EMBEDDINGS else "Linear"
