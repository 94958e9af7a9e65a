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
CPU_SLAB, CPU_SLAB_ROWS = 4 << 20, 64  # bytes, or at least so many outputs, that the CPU's products expand at a time


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
    slab: int  # for expanding quantized weights
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
        slab, rounds = 0, False
        for module, stored in loaded_modules(spec, scheme):
            weights[module.part] += module_nbytes(module, stored, dtype=dtype, device=device)
            slab = max(slab, slab_bytes(module, size=size, device=device) if stored.quantized else 0)
            rounds |= stored.activation == "int8-token"
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
            token_bytes=activation_bytes(spec, size=size, product=product_bytes(dtype=dtype, device=device, rounds=rounds)),
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


def slab_bytes(module: ModuleShape, *, size: int, device: str) -> int:
    """Workspace of one product with a quantized weight: a CPU expands a slab of it at a time, a card all of it."""
    if device == "cpu":
        return 2 * max(CPU_SLAB, CPU_SLAB_ROWS * module.K * 4)
    return module.N * module.K * size


def product_bytes(*, dtype: str, device: str, rounds: bool) -> int:
    """Bytes that a product needs for each input and output beside the output itself.

    With activations rounded to int8 (``rounds``): float32 copies and an int32 result. A CPU multiplies float16 in float32.
    """
    return 12 if rounds else 4 if (device, dtype) == ("cpu", "float16") else 0


def activation_bytes(spec: ModelSpec, *, size: int, product: int) -> int:
    """Bytes of activations of one token at the widest point of a decoder layer.

    ``size`` is that of an element, ``product`` as product_bytes has it. Always live: the residual stream and its norm (2 hidden).
    In attention: q, k and v, their norms or rotated copies (with 8 bytes a feature of q while those are made), the result. In the
    MLP: gate and up while they are made (and a slab of the outputs at a time, where a CPU expands the weight), or with their
    product. And 24 bytes for ids, positions and slots. The peak measured on a CPU, with 4096 tokens, hidden size
    512 and MLPs of 256 and 4096 in each dtype, is 4 MiB below to 42 MiB above this: what the allocator keeps is in RUNTIME.
    """
    hidden, inner = spec.hidden, spec.intermediate
    qkv = spec.q_size + 2 * spec.kv_size
    attention = (2 * qkv + spec.q_size) * size + max(8 * spec.q_size, (hidden + qkv) * product)
    slab = min(2 * inner, max(CPU_SLAB_ROWS, CPU_SLAB // (hidden * size))) * size
    mlp = max(3 * inner * size, 2 * inner * (size + product) + slab + hidden * product)
    return 2 * hidden * size + max(attention, mlp) + 24
