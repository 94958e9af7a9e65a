"""Checkpoints written from the definitions of the formats, in plain numpy: a second opinion about what the readers should see."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from quant.checkpoint import Checkpoint

MODULE = "model.layers.0.mlp.up_proj"
NUMPY = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}


@dataclass
class Weight:
    """Codes q [N, K], zero points [G, N], scales [G, N] and each column's group."""

    q: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    group: np.ndarray
    bits: int

    @property
    def values(self) -> Tensor:
        """(q - zero) * scale in float32, [N, K]."""
        w = (self.q - self.zeros[self.group].T).astype(np.float32) * self.scales[self.group].T.astype(np.float32)
        return torch.from_numpy(w)


def make(rng: np.random.Generator, N: int, K: int, group_size: int, bits: int, *, sym: bool, order: str = "plain") -> Weight:
    """A random weight. ``order``: plain, act (balanced groups in random order) or wild (any group for any column)."""
    size = K if group_size == -1 else group_size
    groups = -(-K // size)
    group = np.arange(K) // size
    if order == "act":
        group = rng.permutation(group)
    elif order == "wild":
        group = rng.integers(0, groups, K)
    zeros = np.full((groups, N), 2 ** (bits - 1)) if sym else rng.integers(0, 2**bits, (groups, N))
    scales = rng.uniform(0.01, 0.1, (groups, N)).astype(np.float16)
    return Weight(rng.integers(0, 2**bits, (N, K)), zeros, scales, group, bits)


def stream(codes: np.ndarray, bits: int, word: int = 32) -> np.ndarray:
    """[R, C] -> words [R, ceil(C * bits / word)]: field i starts at bit i * bits of the row, low bits first."""
    rows, count = codes.shape
    table = np.zeros((rows, -(-count * bits // word) * word), np.uint8)
    for i in range(count):
        for b in range(bits):
            table[:, i * bits + b] = codes[:, i] >> b & 1
    data = np.packbits(table, axis=1, bitorder="little")
    return np.ascontiguousarray(data).view(NUMPY[word])


def planes(codes: np.ndarray, bits: int) -> np.ndarray:
    """[R, C] -> int32 [R, ceil(C / 32) * bits]: per 32 codes the low 2 or 4 bits of all, then the next bits of all, ..."""
    widths = {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}[bits]
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % 32)))
    parts = []
    for start in range(0, padded.shape[1], 32):
        low = 0
        for width in widths:
            parts.append(stream(padded[:, start : start + 32] >> low & (2**width - 1), width))
            low += width
    return np.concatenate(parts, axis=1)


def gptq(w: Weight, *, stored_zeros: np.ndarray | None = None, word: int = 32, planar: bool = False) -> dict[str, Tensor]:
    """qweight, qzeros (version 1 unless given), scales, g_idx."""
    zeros = (w.zeros - 1) % 2**w.bits if stored_zeros is None else stored_zeros
    pack = planes if planar else lambda codes, bits: stream(codes, bits, word)
    return tensors(qweight=pack(w.q, w.bits).T, qzeros=pack(zeros, w.bits), scales=w.scales, g_idx=w.group.astype(np.int32))


def awq_gemm(w: Weight) -> dict[str, Tensor]:
    """Nibble i of a word is column (0, 2, 4, 6, 1, 3, 5, 7)[i] of eight, along N."""

    def pack(codes: np.ndarray) -> np.ndarray:
        order = np.array([0, 2, 4, 6, 1, 3, 5, 7])
        columns = (np.arange(0, codes.shape[1], 8)[:, None] + order).ravel()
        return stream(codes[:, columns], 4)

    return tensors(qweight=pack(w.q.T), qzeros=pack(w.zeros), scales=w.scales)


def padded_words(groups: int, group_size: int) -> int:
    """AutoAWQ's width of the gemv zeros: words of 8 groups, rounded up to 1, 2 (group 64) or 4 (group 32)."""
    step = {32: 4, 64: 2}.get(group_size, 1)
    words = (groups + 7) // 8
    return (words + step - 1) // step * step


def awq_gemv(w: Weight, group_size: int) -> dict[str, Tensor]:
    """Plain order along K; zeros and scales per output, padded with zeros."""
    groups = len(w.scales)
    width = padded_words(groups, group_size)
    zeros = np.pad(w.zeros, ((0, width * 8 - groups), (0, 0)))
    scales = np.pad(w.scales, ((0, width * 8 - groups), (0, 0)))
    return tensors(qweight=stream(w.q, 4), qzeros=stream(zeros.T, 4), scales=scales.T)


def awq_gemv_fast(w: Weight, group_size: int) -> dict[str, Tensor]:
    """int16 words [N/4, K]; see the comments for where code (n, k) goes. qzeros = -zero * scale."""
    N, K = w.q.shape
    words = np.zeros((N // 4, K), np.uint16)
    for n in range(N):
        for k in range(K):
            a, b, c = k % 32 // 8, k % 8 // 2, k % 2  # position in a block of 32 as 4 x 4 x 2; the first two are swapped
            place = b * 8 + c * 4 + a  # and in every 8 of the result, even places come first
            flat = n % 4 * 64 + k % 64 // 32 * 32 + place  # four outputs, 64 inputs each, one after another
            words[n // 4, k // 64 * 64 + flat // 4] |= np.uint16(int(w.q[n, k]) << 4 * (flat % 4))
    groups = len(w.scales)
    depth = padded_words(groups, group_size) * 8
    pad = ((0, depth - groups), (0, 0))
    shifts = -(w.scales.astype(np.float32) * w.zeros).astype(np.float16)
    return tensors(qweight=words.view(np.int16), qzeros=np.pad(shifts, pad), scales=np.pad(w.scales, pad))


def packed(w: Weight, *, sym: bool) -> dict[str, Tensor]:
    """compressed-tensors pack-quantized: unsigned codes in a dense stream along K, zero points along N."""
    out = tensors(weight_packed=stream(w.q, w.bits), weight_scale=w.scales.T, weight_shape=np.array(w.q.shape, np.int64))
    if not sym:
        out |= tensors(weight_zero_point=stream(w.zeros, w.bits).T)
    if not np.array_equal(w.group, np.sort(w.group)):
        out |= tensors(weight_g_idx=w.group.astype(np.int32))
    return out


def tensors(**arrays: np.ndarray) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def save(directory: Path, module: dict[str, Tensor], quantization: dict[str, Any] | None, name: str = MODULE) -> Path:
    """A checkpoint directory that holds one module."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({f"{name}.{suffix}": tensor for suffix, tensor in module.items()}, directory / "model.safetensors")
    config = {} if quantization is None else {"quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def load(directory: Path, expect: tuple[int, int] | None = None, name: str = MODULE) -> Any:
    """The module's weight; nothing may be left over."""
    with Checkpoint.open(directory) as checkpoint:
        weight = checkpoint.weight(name, expect)
        assert checkpoint.leftover() == []
    return weight


def ct_config(weights: dict[str, Any], fmt: str = "pack-quantized", **more: Any) -> dict[str, Any]:
    """A quantization_config with one group."""
    group = {"targets": ["Linear"], "weights": weights, **more}
    return {"quant_method": "compressed-tensors", "format": fmt, "ignore": ["lm_head"], "config_groups": {"group_0": group}}
