"""What a model asks of the memory, from config.json and the headers of its files alone: never a weight, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from appliance.memory.settings import ITEM_SIZE, resolve_dtype
from kernels.layout import weight_nbytes
from models.spec import ModelSpec, ModuleShape
from quant.headers import CheckpointIndex
from quant.rules import WeightScheme
from quant.scheme import QuantScheme, read_scheme

LOGIT_ROWS = 64
"""Rows of logits that exist at a time: sampling and prompt log-probabilities work in slices of so many."""


@dataclass(frozen=True, kw_only=True)
class Demand:
    """Bytes that do not depend on utilization or lengths, and the rates of those that do."""

    model: str
    architecture: str
    quantization: str
    dtype: str
    layers: int
    kv_heads: int
    head_dim: int
    max_len: int
    weights: dict[str, int]  # by part
    slab: int  # the largest weight, dequantized
    token_bytes: int  # activations of one token of a step
    logits_row_bytes: int
    position_bytes: int  # the rotary table's row of one position

    @classmethod
    def read(cls, directory: Path, *, quantization: str | None, dtype: str, device: str) -> Demand:
        """Raises InputError (CheckpointError) for a checkpoint that is damaged or not supported."""
        config, scheme = read_scheme(CheckpointIndex.open(directory), quantization)
        spec = ModelSpec.from_config(config)
        return cls.of(spec, scheme, model=str(directory), dtype=resolve_dtype(dtype, spec.dtype, device), device=device)

    @classmethod
    def of(cls, spec: ModelSpec, scheme: QuantScheme, *, model: str, dtype: str, device: str) -> Demand:
        """The demand of a model whose every module has the shape and the scheme that the config and the headers state."""
        size = ITEM_SIZE[dtype]
        weights = dict.fromkeys(("embedding", "attention", "mlp", "head", "norms"), 0)
        slab = 0
        for module, stored in loaded_modules(spec, scheme):
            weights[module.part] += module_nbytes(module, stored, dtype=dtype, device=device)
            slab = max(slab, module.N * module.K * size if stored.quantized else 0)
        weights["norms"] = sum(numel for _, numel in spec.small_tensors()) * size
        return cls(
            model=model,
            architecture=spec.architecture,
            quantization=scheme.method,
            dtype=dtype,
            layers=spec.layers,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            max_len=spec.max_len,
            weights=weights,
            slab=slab,
            token_bytes=activation_bytes(spec, size),
            logits_row_bytes=spec.vocab * (4 + size),  # float32, and the product before it is widened
            position_bytes=spec.rope.rotary_dim * 4,
        )


def loaded_modules(spec: ModelSpec, scheme: QuantScheme) -> Iterator[tuple[ModuleShape, WeightScheme]]:
    """The weights as the loader makes them of the published ones.

    q, k and v, and gate and up, become one weight where they are stored alike; the order of an act-order down_proj moves into
    gate and up. A head that is tied to the embedding takes no memory of its own, unless the checkpoint has a quantized one.
    """
    for (_, part), run in groupby(spec.modules(), key=_slot):
        modules = [(module, scheme.for_module(module.name)) for module in run]
        if part in ("qkv", "gate_up") and len({stored for _, stored in modules}) == 1:
            (first, stored), rows = modules[0], sum(module.N for module, _ in modules)
            modules = [(replace(first, N=rows), stored)]
        elif part == "down_proj":
            modules = [(module, replace(stored, act_order=False)) for module, stored in modules]
        yield from modules
    stored_head = scheme.index.tensors if spec.tie_embeddings and scheme.index is not None else {}
    if any(name.startswith("lm_head.") and name != "lm_head.weight" for name in stored_head):
        yield ModuleShape("lm_head", spec.vocab, spec.hidden, "head", False), scheme.for_module("lm_head")


def _slot(module: ModuleShape) -> tuple[str, str]:
    """Modules of one parent and one slot can be joined."""
    parent, _, name = module.name.rpartition(".")
    return parent, {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}.get(
        name, name
    )


def module_nbytes(module: ModuleShape, stored: WeightScheme, *, dtype: str, device: str) -> int:
    """Bytes of one module as it lies in memory: a plain table for the embedding, else what ``Ops.pack`` makes of it."""
    size = ITEM_SIZE[dtype]
    if module.part == "embedding":
        return module.N * module.K * size
    kind = "dense" if not stored.quantized else "fp8" if stored.layout in ("float-quantized", "fp8-block") else "int"
    packed = weight_nbytes(
        device=device,
        dtype=dtype,
        kind=kind,
        bits=4 if stored.bits <= 4 else 8,  # 2 and 3 bits widen to 4, 5 to 7 bits to 8
        N=module.N,
        K=module.K,
        group_size=stored.block[1] if stored.block else module.K if stored.group_size == -1 else stored.group_size,
        asymmetric=not stored.symmetric,
        act_order=stored.act_order,
        activation=stored.activation,
    )
    return packed + (module.N * size if module.bias else 0)


def activation_bytes(spec: ModelSpec, size: int) -> int:
    """Bytes of activations of one token at the widest point of a decoder layer (``size`` bytes an element).

    In attention: the residual stream, its norm, the fused q/k/v, rotated copies of q and k, and the output; in the MLP: the
    residual stream, its norm, gate and up, their product, and the output. Norms work on one float32 copy. With the ids and
    positions of the token: 3 integers of 8 bytes.
    """
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    attention = 3 * spec.hidden + (q + 2 * kv) + (q + kv) + q
    mlp = 3 * spec.hidden + 3 * spec.intermediate
    return max(attention, mlp) * size + spec.hidden * 4 + 24
