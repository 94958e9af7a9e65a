"""The operators of an NVIDIA card: the kernels of this folder behind the seam. On CPU tensors Triton's interpreter runs them."""

from __future__ import annotations

import os
from functools import partial

import torch
from torch import Tensor

from kernels.ops import Clamp, Ops, Weight
from kernels.triton import stack, weights
from kernels.triton.argmax import argmax
from kernels.triton.attention import attention
from kernels.triton.delta import delta
from kernels.triton.elementwise import gelu_mul, silu_mul
from kernels.triton.embedding import embedding, packed_rows
from kernels.triton.experts import join_experts, mix
from kernels.triton.matmul import UNKNOWN, Card, matmul
from kernels.triton.norm import rms_norm, rms_norm_add
from kernels.triton.rope import rope_store
from kernels.triton.sampling import sample
from kernels.triton.select import kth_largest
from quant.tensor import QuantTensor


def make_ops(device: torch.device) -> Ops:
    """The Triton operators on a card (or, in the interpreter, on the CPU). Nothing is compiled before it is first called."""
    card = this_card(device)

    def pack(
        weight: QuantTensor | Tensor,
        *,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        gated: bool = False,
        gelu: bool = False,
        clamp: Clamp | None = None,
        activation: str = "auto",
    ) -> Weight:
        if clamp is not None or (
            isinstance(weight, QuantTensor) and weight.kind == "fp4"
        ):  # the memory plan refuses gpt-oss before
            raise ValueError("no kernel for cards knows 4-bit floats, or a gate that is clamped")
        here = weight.on(device) if isinstance(weight, QuantTensor) else weight.to(device)
        bias = None if bias is None else bias.to(device)
        return weights.pack(here, dtype=dtype, bias=bias, gated=gated, gelu=gelu, activation=activation)

    return Ops(
        name="triton",
        device=device,
        pack=pack,
        matmul=partial(matmul, card=card),
        embedding=look_up,
        rms_norm=normalize,
        rope_store=rope_store,
        attention=partial(attention, multiprocessors=card.multiprocessors),
        silu_mul=silu_mul,
        gelu_mul=gelu_mul,
        delta=delta,
        ungated=weights.ungated,
        mix=partial(mix, card=card),
        join_experts=join_experts,
        argmax=argmax,
        kth_largest=kth_largest,
        bind=partial(stack.bind, embedding=look_up, card=card),
        sample=sample,
    )


def normalize(x: Tensor, weight: Tensor, *, eps: float, offset: float = 0.0, residual: Tensor | None = None) -> Tensor:
    """As kernels.ops.RMSNorm."""
    if residual is None:
        return rms_norm(x, weight, eps=eps, offset=offset)
    return rms_norm_add(x, residual, weight, eps=eps, offset=offset)


def this_card(device: torch.device) -> Card:
    """APPLIANCE_FP16_SUMS=1 in the environment asks for sums in float16 where they are faster (kernels/triton/half.py)."""
    if device.type != "cuda":
        return UNKNOWN
    found = torch.cuda.get_device_properties(device)
    half = os.environ.get("APPLIANCE_FP16_SUMS") == "1"
    return Card(found.multi_processor_count, 10 * found.major + found.minor, found.name, half)


def look_up(ids: Tensor, table: Tensor | Weight, dtype: torch.dtype) -> Tensor:
    """As kernels.ops.Embedding."""
    if isinstance(table, Tensor):
        return embedding(ids, table, dtype)
    if not isinstance(table, weights.TritonWeight):
        raise TypeError(f"a {type(table).__name__} was packed for other operators than those in Triton")
    return packed_rows(ids, table, dtype)
