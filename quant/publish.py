"""Quantized weights as other programs read them: AutoAWQ's, GPTQ's and compressed-tensors' tensors, and their configs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant.algorithms.grid import Grid, Quantized
from quant.bits import pack_nibbles
from quant.errors import InputError

FORMATS = ("awq", "gptq", "gptq_v2", "compressed-tensors")
HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
SLAB = 1 << 22  # values that are packed at a time
QKV, GATE_UP = r"self_attn\.(q|k|v|qkv)_proj", r"mlp\.(gate|up|gate_up)_proj"
KINDS = {
    **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj"), QKV),
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj"), GATE_UP),
}  # by which readers that fuse modules ask
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word is this one of its eight columns


def grid_for(form: str, bits: int, group_size: int, symmetric: bool, scale_dtype: torch.dtype) -> Grid:
    """The grid that a format can say. Raises InputError where it cannot say this one."""
    if form not in FORMATS:
        raise InputError(f"--format is {form!r}: one of {', '.join(FORMATS)} is needed")
    allowed = (4,) if form == "awq" else (2, 3, 4, 8)
    if bits not in allowed:
        raise InputError(f"--bits is {bits}: the format {form} has {', '.join(map(str, allowed))}")
    if group_size != -1 and (group_size < 8 or group_size % 8):
        raise InputError(f"--group-size is {group_size}: a multiple of 8, or -1 (a scale for each output), is needed")
    # Version 1 of GPTQ stores zero points less one, and readers differ about what is below 0.
    # GPTQ's are stored in float16, and cast to the model's type before use.
    dtype = torch.float16 if form == "awq" else scale_dtype
    return Grid(bits, group_size, symmetric, dtype, least_zero=1 if form == "gptq" else 0)


def tensors_of(form: str, weight: Quantized) -> dict[str, Tensor]:
    """The tensors of one module, by what follows its name. Raises InputError where its shape cannot be said."""
    if form in ("gptq", "gptq_v2"):
        return _gptq(weight, offset=1 if form == "gptq" else 0)
    return _awq(weight) if form == "awq" else _compressed(weight)


def check_shape(form: str, name: str, N: int, K: int, grid: Grid) -> None:
    """Raises InputError for a module of N outputs and K inputs whose shape the format cannot say."""
    if grid.group_size != -1 and K % grid.group_size:
        raise InputError(f"--group-size {grid.group_size} does not divide the {K} inputs of {name}: take a divisor, or -1")
    per_word = 32 // grid.bits if 32 % grid.bits == 0 else 32
    if form == "awq" and N % 8:
        raise InputError(f"{name} has {N} outputs: the format awq needs a multiple of 8; take --format compressed-tensors")
    if form in ("gptq", "gptq_v2") and (N % per_word or K % per_word):
        raise InputError(
            f"{name} is {N} x {K}: the format {form} needs multiples of {per_word} at {grid.bits} bits; "
            "take --format compressed-tensors"
        )


def _awq(weight: Quantized) -> dict[str, Tensor]:
    """gemm: words of eight columns, [K, N / 8]."""
    return {
        "qweight": _awq_words(weight.codes.t().contiguous()),
        "qzeros": _awq_words(weight.zeros),
        "scales": weight.scales,
    }


def _awq_words(values: Tensor) -> Tensor:
    """uint8 [R, C] below 16 -> int32 [R, C / 8]."""
    eights = values.unflatten(1, (-1, 8))[:, :, AWQ_ORDER].to(torch.int64)
    return _as_int32((eights << (4 * torch.arange(8))).sum(2))


def _gptq(weight: Quantized, offset: int) -> dict[str, Tensor]:
    """Words along K, [K * bits / 32, N]; zero points less ``offset``, which is 1 in version 1; the group of each input."""
    bits, size = weight.grid.bits, weight.grid.size(weight.codes.shape[1])
    codes, groups = weight.codes, torch.arange(weight.codes.shape[1]) // size
    if weight.perm is not None:
        codes, g_idx = torch.empty_like(codes), torch.empty_like(groups)
        codes[:, weight.perm], g_idx[weight.perm] = weight.codes, groups
        groups = g_idx
    return {
        "qweight": pack_stream(codes, bits).t().contiguous(),
        "qzeros": pack_stream(weight.zeros - offset & (2**bits - 1), bits),
        "scales": weight.scales.to(torch.float16),
        "g_idx": groups.to(torch.int32),
    }


def _compressed(weight: Quantized) -> dict[str, Tensor]:
    """pack-quantized: words along K, [N, ceil(K * bits / 32)]; zero points packed along N."""
    bits, (N, K) = weight.grid.bits, weight.codes.shape
    found = {
        "weight_packed": pack_stream(weight.codes, bits),
        "weight_scale": weight.scales.t().contiguous(),
        "weight_shape": torch.tensor([N, K], dtype=torch.int64),
    }
    if not weight.grid.symmetric:
        found["weight_zero_point"] = pack_stream(weight.zeros, bits).t().contiguous()
    return found


def pack_stream(values: Tensor, bits: int) -> Tensor:
    """uint8 [R, C] below 2 ** bits -> int32 [R, ceil(C * bits / 32)]: a dense little-endian stream in each row."""
    if bits in (4, 8):
        data = pack_nibbles(values) if bits == 4 else values
        data = pad(data, (0, -data.shape[1] % 4)).contiguous()
        return data.view(-1).view(torch.int32).view(data.shape[0], -1)  # a single row may have any stride
    words = [_bits(part, bits) for part in values.split(max(1, SLAB // values.shape[1]))]
    return torch.cat(words)


def _bits(values: Tensor, bits: int) -> Tensor:
    """The same for any width, by way of a byte for each bit."""
    flags = values.unsqueeze(2).bitwise_right_shift(torch.arange(bits, dtype=torch.uint8)).bitwise_and_(1).flatten(1)
    eights = pad(flags, (0, -flags.shape[1] % 32)).unflatten(1, (-1, 8))
    return (eights << torch.arange(8, dtype=torch.uint8)).sum(2, dtype=torch.uint8).view(torch.int32)


def _as_int32(words: Tensor) -> Tensor:
    """int64 values below 2 ** 32 -> int32 of the same bits."""
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def config_section(
    form: str,
    grid: Grid,
    others: Mapping[str, Grid | None],
    *,
    act_order: bool,
    static_groups: bool = False,
    kv_scales: bool = False,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """``quantization_config`` of config.json. ``others``: modules that are not on ``grid``; None for those left as they are.

    Embedding and head are as they were unless ``others`` has a grid for them, which may be the same. ``act_order``: columns were
    rounded in order of their importance; ``static_groups``: their groups are those of neighbours all the same. ``kv_scales``:
    there are scales of keys and values in FP8. ``more``: what else is told of how it was made. Raises InputError where the format
    cannot say it.
    """
    others = {HEAD: None, EMBEDDING: None, **others}
    if form == "compressed-tensors":
        return {**_compressed_section(grid, others, act_order, kv_scales), **more}
    if others[EMBEDDING] is not None:
        raise InputError(f"--embedding-bits: the format {form} has no quantized embeddings; take --format compressed-tensors")
    if form == "awq":
        return {**_awq_section(grid, others), **more}
    return {**_gptq_section(form, grid, others, act_order, static_groups), **more}


def _awq_section(grid: Grid, others: Mapping[str, Grid | None]) -> dict[str, Any]:
    """Layers' modules that are left as they are stand in ``dynamic``, too: GPTQModel reads no modules_to_not_convert."""
    for name, other in others.items():
        if other is not None:
            why = "no quantized head" if name == HEAD else "one width for all"
            raise InputError(f"{name} has {other.bits} bits: the format awq has {why}; take --format compressed-tensors")
    kept = [name for name in others if name != EMBEDDING]
    dynamic: dict[str, dict[str, int]] = {f"-:{pattern}": {} for pattern in _patterns(name for name in kept if name != HEAD)}
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": grid.bits,
        "group_size": grid.group_size,
        "zero_point": not grid.symmetric,
        "modules_to_not_convert": kept,
        **({"dynamic": dynamic} if dynamic else {}),
    }


def _gptq_section(
    form: str, grid: Grid, others: Mapping[str, Grid | None], act_order: bool, static_groups: bool
) -> dict[str, Any]:
    """Modules that differ are named in ``dynamic``, as GPTQModel does; vLLM asks it for the names of fused modules."""
    dynamic = {}
    for other, names in _by_grid({name: other for name, other in others.items() if name != EMBEDDING}).items():
        if other != grid:
            for pattern in _patterns(name for name in names if other is not None or name != HEAD):
                dynamic[f"{'+' if other else '-'}:{pattern}"] = _override(other, grid) if other else {}
    return {
        "quant_method": "gptq",
        "checkpoint_format": form,
        "bits": grid.bits,
        "group_size": grid.group_size,
        "desc_act": act_order and not static_groups,
        "static_groups": act_order and static_groups,
        "sym": grid.symmetric,
        "lm_head": others[HEAD] is not None,
        **({"dynamic": dynamic} if dynamic else {}),
    }


def _override(other: Grid, grid: Grid) -> dict[str, int]:
    pairs = {"bits": (other.bits, grid.bits), "group_size": (other.group_size, grid.group_size)}
    return {name: its for name, (its, usual) in pairs.items() if its != usual or name == "bits"}


def _compressed_section(grid: Grid, others: Mapping[str, Grid | None], act_order: bool, kv_scales: bool) -> dict[str, Any]:
    """Linears are on ``grid``, others are named. vLLM's head is no Linear, and its embeddings may have no name, only a class."""
    groups = {"group_0": _ct_group(["Linear"], grid, act_order)}
    for other, names in _by_grid(others).items():
        if other is None:
            continue
        targets = [f"re:{pattern}" for pattern in _patterns(name for name in names if name != EMBEDDING)]
        if EMBEDDING in names:
            groups[f"group_{len(groups)}"] = _ct_group(["Embedding"], other, False)
        if targets and other == grid:
            groups["group_0"]["targets"] += targets
        elif targets:
            groups[f"group_{len(groups)}"] = _ct_group(targets, other, act_order)
    kv = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name, other in others.items() if other is None and name != EMBEDDING],
        "kv_cache_scheme": kv if kv_scales else None,
    }


def _ct_group(targets: list[str], grid: Grid, act_order: bool) -> dict[str, Any]:
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "channel" if grid.group_size == -1 else "group",
        "group_size": None if grid.group_size == -1 else grid.group_size,
        "dynamic": False,
    }
    if act_order and grid.group_size != -1:
        weights["actorder"] = "static"  # which is all that is left of it: groups are always of neighbours
    return {"targets": targets, "weights": weights, "input_activations": None}


def _by_grid(others: Mapping[str, Grid | None]) -> dict[Grid | None, list[str]]:
    """Names by what they are on; None for those left as they are."""
    found: dict[Grid | None, list[str]] = {}
    for name, grid in others.items():
        found.setdefault(grid, []).append(name)
    return found


def _patterns(names: Iterable[str]) -> list[str]:
    """Regular expressions that fit these names alone, and the fused modules that they are parts of; one for each kind."""
    layers: dict[str, list[str]] = {}
    for name in names:
        found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        layers.setdefault(KINDS.get(found[2], re.escape(found[2])) if found else re.escape(name), []).append(
            found[1] if found else ""
        )
    return [
        rf"^model\.layers\.({'|'.join(dict.fromkeys(numbers))})\.{kind}$" if numbers[0] else rf"^(.*\.)?{kind}$"
        for kind, numbers in layers.items()
    ]
