"""Quantized weights as other programs read them: AutoAWQ's, GPTQ's and compressed-tensors' tensors, and their configs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant.algorithms.grid import Grid, Quantized
from quant.bits import pack_nibbles
from quant.errors import InputError

FORMATS = ("awq", "gptq", "compressed-tensors")
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
    allowed = {"awq": (4,), "gptq": (2, 3, 4, 8), "compressed-tensors": (2, 3, 4, 8)}[form]
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
    return {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed}[form](weight)


def check_shape(form: str, name: str, N: int, K: int, grid: Grid) -> None:
    """Raises InputError for a module of N outputs and K inputs whose shape the format cannot say."""
    if grid.group_size != -1 and K % grid.group_size:
        raise InputError(f"--group-size {grid.group_size} does not divide the {K} inputs of {name}: take a divisor, or -1")
    per_word = 32 // grid.bits if 32 % grid.bits == 0 else 32
    if form == "awq" and N % 8:
        raise InputError(f"{name} has {N} outputs: the format awq needs a multiple of 8; take --format compressed-tensors")
    if form == "gptq" and (N % per_word or K % per_word):
        raise InputError(
            f"{name} is {N} x {K}: the format gptq needs multiples of {per_word} at {grid.bits} bits; "
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


def _gptq(weight: Quantized) -> dict[str, Tensor]:
    """Version 1: words along K, [K * bits / 32, N]; zero points less one; the group of each input."""
    bits, size = weight.grid.bits, weight.grid.size(weight.codes.shape[1])
    codes, groups = weight.codes, torch.arange(weight.codes.shape[1]) // size
    if weight.perm is not None:
        codes, g_idx = torch.empty_like(codes), torch.empty_like(groups)
        codes[:, weight.perm], g_idx[weight.perm] = weight.codes, groups
        groups = g_idx
    return {
        "qweight": pack_stream(codes, bits).t().contiguous(),
        "qzeros": pack_stream(weight.zeros - 1 & (2**bits - 1), bits),
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
    form: str, grid: Grid, others: Mapping[str, Grid | None], *, act_order: bool, more: Mapping[str, Any]
) -> dict[str, Any]:
    """``quantization_config`` of config.json. ``others``: modules that are not on ``grid``; None for those left as they are.

    ``more``: what else is told of how it was made. Raises InputError where the format cannot say it.
    """
    return {"awq": _awq_section, "gptq": _gptq_section, "compressed-tensors": _compressed_section}[form](
        grid, others, act_order, more
    )


def _awq_section(grid: Grid, others: Mapping[str, Grid | None], act_order: bool, more: Mapping[str, Any]) -> dict[str, Any]:
    for name, other in others.items():
        if other is not None:
            raise InputError(
                f"{name} has {other.bits} bits: the format awq has one width for all; take --format compressed-tensors"
            )
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": grid.bits,
        "group_size": grid.group_size,
        "zero_point": not grid.symmetric,
        "modules_to_not_convert": ["lm_head", *others],
        **more,
    }


def _gptq_section(grid: Grid, others: Mapping[str, Grid | None], act_order: bool, more: Mapping[str, Any]) -> dict[str, Any]:
    """Modules that differ are named in ``dynamic``, as GPTQModel does; vLLM asks it for the names of fused modules."""
    dynamic = {}
    for bits, names in _by_bits(others).items():
        for pattern in _patterns(names):
            dynamic[f"{'+' if bits else '-'}:{pattern}"] = {"bits": bits} if bits else {}
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": grid.bits,
        "group_size": grid.group_size,
        "desc_act": act_order,
        "sym": grid.symmetric,
        "lm_head": False,
        **({"dynamic": dynamic} if dynamic else {}),
        **more,
    }


def _compressed_section(
    grid: Grid, others: Mapping[str, Grid | None], act_order: bool, more: Mapping[str, Any]
) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": _ct_weights(grid), "input_activations": None}}
    for bits, names in _by_bits(others).items():
        if bits:
            made = _ct_weights(replace(grid, bits=bits))
            targets = [f"re:{pattern}" for pattern in _patterns(names)]
            groups[f"group_{len(groups)}"] = {"targets": targets, "weights": made, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head", *(name for name, other in others.items() if other is None)],
        **more,
    }


def _ct_weights(grid: Grid) -> dict[str, Any]:
    return {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "channel" if grid.group_size == -1 else "group",
        "group_size": None if grid.group_size == -1 else grid.group_size,
        "dynamic": False,
    }


def _by_bits(others: Mapping[str, Grid | None]) -> dict[int, list[str]]:
    """Names by bits, 0 for those left as they are."""
    found: dict[int, list[str]] = {}
    for name, grid in others.items():
        found.setdefault(grid.bits if grid else 0, []).append(name)
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
