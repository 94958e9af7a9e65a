"""One layer's keys and values in blocks, in the activations' type or quantized: what lies where, and how it is read.

Quantized, each token and head has a scale of its own beside its codes, chosen when it is written: nothing has to be calibrated::

    fp8_e4m3, fp8_e5m2   value = code * scale      scale = largest magnitude / largest finite code, float32
    int8                 value = code * scale      scale = largest magnitude / 127, float32
    int4                 value = code * step + least    codes 0 .. 15, two in a byte: feature 2i low, 2i + 1 high

Codes are rounded to the nearest, ties to even, and never beyond the largest. A step and a least value are rounded to float16
before codes are found with them. A scale or step below LEAST_SCALE is of a vector that is all but zero, or, in int4, all but
constant: its codes are 0. Where a checkpoint brings scales for a layer (``given``), those are stored instead, and larger values
are clipped; int4 has least values too, and takes no notice of them.

Where attention is over latents (models/latent.py), a token's values are its keys: they are one tensor, which is written, moved
and counted once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.layout import SCALED_CACHES
from quant.errors import InputError

CODES = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2, "int8": torch.int8, "int4": torch.uint8}
LARGEST = {"fp8_e4m3": 448.0, "fp8_e5m2": 57344.0, "int8": 127.0, "int4": 15.0}
LEAST_SCALE = 2.0**-100  # int4: any step that float16 has is larger


@dataclass(frozen=True, eq=False)
class KVCache:
    """One layer's paged cache. A token's slot is ``block * block_size + offset``.

    Not quantized: k and v in the activations' dtype, or another float dtype, and no scales.
    """

    k: Tensor  # [B, block_size, Hkv, D]; int4: [B, block_size, Hkv, D / 2]
    v: Tensor  # the same; or k itself, where a value is a key
    k_scale: Tensor | None = None  # float32 [B, block_size, Hkv]; int4: float16 [B, block_size, Hkv, 2], step and least
    v_scale: Tensor | None = None
    given: tuple[float, float] | None = None  # the checkpoint's scales of this layer's keys and values

    @property
    def block_size(self) -> int:
        return self.k.shape[1]

    @property
    def dtype(self) -> str:
        """As in kernels.layout: float32, bfloat16, float16, fp8_e4m3, fp8_e5m2, int8 or int4."""
        return next((name for name, code in CODES.items() if code == self.k.dtype), str(self.k.dtype).removeprefix("torch."))

    @property
    def head_dim(self) -> int:
        return self.k.shape[3] * (2 if self.k.dtype == torch.uint8 else 1)

    @property
    def values_are_keys(self) -> bool:
        return self.v is self.k

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that a block has: keys, values, and their scales where there are any."""
        parts = (self.k, self.k_scale) if self.values_are_keys else (self.k, self.v, self.k_scale, self.v_scale)
        return tuple(t for t in parts if t is not None)

    def split(self, blocks: int) -> Iterator[KVCache]:
        """Caches of ``blocks`` blocks each that follow one another in this one."""
        for parts in zip(*(tensor.split(blocks) for tensor in self.tensors), strict=True):
            k, *scale = parts if self.values_are_keys else parts[::2]
            v, *v_scale = parts if self.values_are_keys else parts[1::2]
            yield KVCache(k, v, *scale, *v_scale)

    @classmethod
    def zeros(
        cls,
        blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        *,
        dtype: str,
        device: torch.device,
        given: tuple[float, float] | None = None,
        values: bool = True,
    ) -> KVCache:
        """An empty cache of ``blocks * block_size * 2 * kv_heads * kernels.layout.kv_nbytes(dtype, head_dim)`` bytes.

        Half as many without ``values`` of its own: they are the keys then.
        InputError where int4 cannot have two features of a head in each byte.
        """
        if dtype == "int4" and head_dim % 2:
            raise InputError(f"--kv-cache-dtype is int4, but heads of {head_dim} do not fill whole bytes: take int8")
        shape = (blocks, block_size, kv_heads, head_dim // 2 if dtype == "int4" else head_dim)
        code = CODES.get(dtype) or getattr(torch, dtype)
        k = torch.zeros(shape, dtype=code, device=device)
        v = torch.zeros_like(k) if values else k
        if dtype not in SCALED_CACHES:
            return cls(k, v)
        scales, kind = ((*shape[:3], 2), torch.float16) if dtype == "int4" else (shape[:3], torch.float32)
        k_scale = torch.zeros(scales, dtype=kind, device=device)
        return cls(k, v, k_scale, torch.zeros_like(k_scale) if values else k_scale, given)


def quantize(x: Tensor, dtype: str, given: float | None = None) -> tuple[Tensor, Tensor]:
    """x [..., D] -> codes [..., D] (int4: [..., D / 2]) and scales [...] (int4: [..., 2])."""
    wide, largest = x.float(), LARGEST[dtype]
    if dtype == "int4":
        most = torch.finfo(torch.float16).max
        least = wide.amin(-1).clamp(-most, most).half()
        step = ((wide.amax(-1) - least) / largest).clamp(0, most).half()
        codes = _codes(wide - least.unsqueeze(-1), step.float()).clamp_(0, largest).round_().to(torch.uint8)
        return codes[..., ::2] | codes[..., 1::2] << 4, torch.stack([step, least], dim=-1)
    scale = wide.abs().amax(-1) / largest if given is None else torch.full(x.shape[:-1], given, device=x.device)
    codes = _codes(wide, scale).clamp_(-largest, largest)
    return (codes.round_() if dtype == "int8" else codes).to(CODES[dtype]), scale


def _codes(x: Tensor, scale: Tensor) -> Tensor:
    return torch.where(scale < LEAST_SCALE, 0.0, 1.0 / scale).unsqueeze(-1) * x


def dequantize(codes: Tensor, scales: Tensor | None) -> Tensor:
    """What ``quantize`` made, or the values of a cache that is not quantized: float32 [..., D]."""
    if scales is None:
        return codes.float()
    if codes.dtype != torch.uint8:
        return codes.float() * scales.unsqueeze(-1)
    step, least = scales.float().unsqueeze(-2).unbind(-1)  # [..., 1]
    return torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2) * step + least
